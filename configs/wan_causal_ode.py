"""Causal Forcing, stage 2a: causal ODE regression. Trajectories are made first, then learnt.

    python -m launch.train --config=configs/wan_causal_ode.py --workdir=runs/wan_ode

Starts from runs/wan_teacher_forcing. After the file's name `:frame` works frame by frame,
`:causvid` is at CausVid's levels, `:causvid_salt` at eight of its shift. Self-Forcing and CausVid
regress trajectories of a bidirectional teacher instead, which a causal student cannot follow
(Causal Forcing).
"""

from configs import parts


def get_config(variant: str = "chunk"):
    parts.refuse_variant(variant, ("chunk", "frame", "causvid", "causvid_salt"))
    c = parts.stage(parts.wan(), "ode_regression", "runs/wan_teacher_forcing")
    if variant == "frame":
        c = parts.frame_wise(c)
    c.updates = 1000  # CF: at least 1,000
    # CF keeps 4 levels; Salt's rollouts visit 8
    c.schedule.update(train_updates=8, anchor_updates=8)
    c.ode.update(updates=48, guidance=6.0, trajectories=6000)  # CF; 6,000 clips are its toy set
    if variant.startswith("causvid"):
        c.schedule.shift = 8.0  # CV
    if variant == "causvid":
        c = parts.listed_levels(c, (1000, 757, 522))  # CV
    c.student_optimizer.b1 = 0.9  # CF
    c.log_every, c.save_every = 20, 200
    return c
