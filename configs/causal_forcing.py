"""Causal Forcing, stage 3: asymmetric DMD, from a causal consistency model.

    python -m launch.train --config=configs/causal_forcing.py --workdir=runs/shapes_causal_forcing

Variants after a colon behind the file's name: `salt` adds Salt (Eq. 13); `frame` works frame by
frame; `two` and `one` are its frame-wise models of 2 and 1 steps, whose first chunk takes 4. `wan`
is at Wan 2.1 size (--workdir=runs/wan_causal_forcing). It starts from runs/shapes_consistency,
frame by frame from runs/shapes_consistency_frame.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "salt", "frame", "two", "one")
    c = parts.causal(size)
    c.init_from = f"runs/{size}_consistency"
    if variants & {"frame", "two", "one"}:
        c = parts.frame_wise(c)
        c.init_from += "_frame"
    if "salt" in variants:
        if size == "wan":
            c.iterations = 300  # 1,500 of the peers' iterations (row 14)
        return parts.salt(c, align_start=120 if size == "wan" else 20)
    c = parts.four_steps(c)
    if variants & {"two", "one"}:
        k = 2 if "two" in variants else 1
        c.rollout.update(num_steps=(k,), first_steps=4)
        c.schedule.update(train_levels=k, anchor_levels=k)
    return c
