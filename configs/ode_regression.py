"""Causal Forcing, stage 2a: causal ODE regression. Trajectories are made first, then learnt.

    python -m launch.train --config=configs/ode_regression.py --workdir=runs/shapes_ode

Starts from runs/shapes_teacher_forcing. After a colon behind the file's name `wan` is at Wan 2.1
size (--workdir=runs/wan_ode), `long` in the long world, `frame` works frame by frame; with `wan`,
`causvid` is at CausVid's levels and `causvid,salt` at eight of its shift. Self-Forcing and CausVid
regress trajectories of a bidirectional teacher instead, which a causal student cannot follow
(Causal Forcing).
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "frame", "causvid", "salt")
    before = f"runs/{size}_teacher_forcing"
    c = parts.stage(size, variants, "ode_regression", before)
    if size != "wan":
        c.iterations = 200
        return c
    c.iterations = 1000  # CF: at least 1,000
    # CF keeps 4 levels; Salt's rollouts visit 8
    c.schedule.update(train_levels=8, anchor_levels=8)
    c.ode.update(num_steps=48, guidance=6.0, trajectories=6000)  # CF; 6,000 clips are its toy set
    if "causvid" in variants:
        c.schedule.shift = 8.0  # CV
        c = c if "salt" in variants else parts.listed_levels(c, (1000, 757, 522))  # CV
    c.student_optimizer.b1 = 0.9  # CF
    return c
