"""Causal Forcing, stage 3: asymmetric DMD at Wan 2.1 size, from a causal consistency model; `:salt`
adds Salt (Eq. 13).

    python -m launch.train --config=configs/wan_causal_forcing.py --workdir=runs/wan_causal_forcing

Other variants: `frame` and `frame_salt` work frame by frame; `two` and `one` are its frame-wise
models of 2 and 1 updates, whose first chunk takes 4. Frame-wise ones start from
runs/wan_consistency_frame.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt", "frame", "frame_salt", "two", "one"))
    c = parts.wan()
    c.init_from = "runs/wan_consistency"
    if variant in ("frame", "frame_salt", "two", "one"):
        c = parts.frame_wise(c)
        c.init_from += "_frame"
    if variant.endswith("salt"):
        c.updates = 300  # 1,500 of the peers' iterations (row 14)
        return parts.salt(c, align_start=120)
    c = parts.four_updates(c)
    if variant in ("two", "one"):
        k = {"two": 2, "one": 1}[variant]
        c.rollout.update(updates=(k,), first_updates=4)
        c.schedule.update(train_updates=k, anchor_updates=k)
    return c
