"""Causal Forcing, stage 2b: causal consistency distillation, which needs no trajectories (Causal
Forcing++).

    python -m launch.train --config=configs/consistency.py --workdir=runs/shapes_consistency

Starts from runs/shapes_teacher_forcing. `:wan` after the file's name is at Wan 2.1 size
(--workdir=runs/wan_consistency), `long` in the long world (--workdir=runs/long_consistency);
`frame` works frame by frame.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "frame")
    c = parts.stage(size, variants, "consistency", f"runs/{size}_teacher_forcing")
    if size != "wan":
        c.iterations = 200
        return c
    c.iterations = 3000  # CF: at least 3,000
    c.batch_size = 8  # CF
    c.ode.update(num_steps=48, guidance=3.0)  # CF
    c.ema.update(decay=0.99, start=0)  # CF: the average is the target
    return c
