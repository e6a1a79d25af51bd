"""Causal Forcing, stage 1: the teacher's network learns to denoise each chunk given the clean
chunks before it.

    python -m launch.train --config=configs/shapes_teacher_forcing.py \\
        --workdir=runs/shapes_teacher_forcing

`:frame` after the file's name works frame by frame.
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame"))
    c = parts.stage(parts.shapes(), "teacher_forcing", "")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 300
    c.batch_size = 16
    c.student_optimizer.update(learning_rate=5e-4, warmup=20)
    c.view.update(lowest=0.001, highest=1.0)
    c.log_every, c.save_every = 20, 100
    return c
