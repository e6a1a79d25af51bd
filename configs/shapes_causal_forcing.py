"""Causal Forcing, stage 3: asymmetric DMD, from a causal consistency model.

`:salt` after the file's name adds Salt (Eq. 13).

    python -m launch.train --config=configs/shapes_causal_forcing.py \\
        --workdir=runs/shapes_causal_forcing

Other variants: `frame` and `frame_salt` work frame by frame; `two` and `one` are its frame-wise
models of 2 and 1 updates, whose first chunk takes 4. Frame-wise ones start from
runs/shapes_consistency_frame.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt", "frame", "frame_salt", "two", "one"))
    c = parts.shapes()
    c.init_from = "runs/shapes_consistency"
    if variant in ("frame", "frame_salt", "two", "one"):
        c = parts.frame_wise(c)
        c.init_from += "_frame"
    if variant.endswith("salt"):
        return parts.salt(c, align_start=20)
    c = parts.four_updates(c)
    if variant in ("two", "one"):
        k = {"two": 2, "one": 1}[variant]
        c.rollout.update(updates=(k,), first_updates=4)
        c.schedule.update(train_updates=k, anchor_updates=k)
    return c
