"""Causal Forcing, stage 2b: causal consistency distillation, which needs no trajectories
(Causal Forcing++).

    python -m launch.train --config=configs/wan_causal_consistency.py --workdir=runs/wan_consistency

Starts from runs/wan_teacher_forcing; `:frame` after the file's name works frame by frame.
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame"))
    c = parts.stage(parts.wan(), "consistency", "runs/wan_teacher_forcing")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 3000  # CF: at least 3,000
    c.batch_size = 8  # CF
    c.ode.update(updates=48, guidance=3.0)  # CF
    c.ema.update(decay=0.99, start=0)  # CF: the average is the target
    c.mesh.update(data=-1, fsdp=8)
    c.log_every, c.save_every = 20, 200
    return c
