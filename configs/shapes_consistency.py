"""Causal Forcing, stage 2b: causal consistency distillation, which needs no trajectories
(Causal Forcing++).

    python -m launch.train --config=configs/shapes_consistency.py --workdir=runs/shapes_consistency

Starts from runs/shapes_teacher_forcing; `:frame` after the file's name works frame by frame.
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame"))
    c = parts.stage(parts.shapes(), "consistency", "runs/shapes_teacher_forcing")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 200
    c.batch_size = 16
    c.student_optimizer.update(learning_rate=5e-4, warmup=20)
    c.log_every, c.save_every = 20, 100
    return c
