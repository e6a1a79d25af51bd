"""Causal Forcing, stage 2a: causal ODE regression. Trajectories are made first, then learnt.

    python -m launch.train --config=configs/shapes_ode.py --workdir=runs/shapes_ode

Starts from runs/shapes_teacher_forcing; `:frame` after the file's name works frame by frame.
Self-Forcing and CausVid regress trajectories of a bidirectional teacher instead, which a causal
student cannot follow (Causal Forcing).
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame"))
    c = parts.stage(parts.shapes(), "ode_regression", "runs/shapes_teacher_forcing")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 200
    c.batch_size = 16
    c.student_optimizer.update(learning_rate=5e-4, warmup=20)
    c.log_every, c.save_every = 20, 100
    return c
