"""Causal Forcing, stage 2b: causal consistency distillation, which needs no trajectories (Causal
Forcing++).

    python -m launch.train --config=configs/consistency.py --workdir=runs/shapes_consistency

Starts from runs/shapes_teacher_forcing. `:wan` after the file's name is at Wan 2.1 size
(--workdir=runs/wan_consistency), `frame` works frame by frame.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "frame")
    c = parts.stage(parts.causal(size), "consistency", f"runs/{size}_teacher_forcing")
    if "frame" in variants:
        c = parts.frame_wise(c)
    if size == "shapes":
        c.iterations = 200
        c.batch_size = 16
        c.student_optimizer.update(learning_rate=5e-4, warmup=20)
        c.log_every, c.save_every = 20, 100
        return c
    c.iterations = 3000  # CF: at least 3,000
    c.batch_size = 8  # CF
    c.ode.update(num_steps=48, guidance=3.0)  # CF
    c.ema.update(decay=0.99, start=0)  # CF: the average is the target
    c.log_every, c.save_every = 20, 200
    return c
