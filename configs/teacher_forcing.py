"""Causal Forcing, stage 1: the teacher's network learns to denoise each chunk given the clean
chunks before it.

    python -m launch.train --config=configs/teacher_forcing.py --workdir=runs/shapes_teacher_forcing

`:wan` after the file's name is at Wan 2.1 size (--workdir=runs/wan_teacher_forcing), `long` in the
long world (--workdir=runs/long_teacher_forcing); `frame` works frame by frame.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "frame")
    c = parts.stage(size, variants, "teacher_forcing", "")
    if size != "wan":
        c.iterations = 300 if size == "shapes" else 2000
        c.renoise.update(lowest=0.001, highest=1.0)
        return c
    c.iterations = 2000  # CF: at least 2,000, better 5,000 to 10,000
    c.batch_size = 64  # CF: 8 x 8 GPUs
    c.renoise.update(lowest=0.00498, highest=1.0)  # CF: the table of 1,000 timesteps at shift 5
    c.ema.start = c.iterations  # CF: no average
    return c
