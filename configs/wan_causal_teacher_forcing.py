"""Causal Forcing, stage 1: the teacher's network learns to denoise each chunk given the clean
chunks before it.

    python -m launch.train --config=configs/wan_causal_teacher_forcing.py \\
        --workdir=runs/wan_teacher_forcing

`:frame` after the file's name works frame by frame.
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame"))
    c = parts.stage(parts.wan(), "teacher_forcing", "")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 2000  # CF: at least 2,000, better 5,000 to 10,000
    c.batch_size = 64  # CF: 8 x 8 GPUs
    c.view.update(lowest=0.00498, highest=1.0)  # CF: the table of 1,000 timesteps at shift 5
    c.ema.start = c.updates  # CF: no average
    c.log_every, c.save_every = 20, 200
    return c
