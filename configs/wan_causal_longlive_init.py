"""LongLive, first stage at Wan 2.1 size: Self Forcing on a window with a sink; `:salt` adds Salt
(Eq. 13).

python -m launch.train --config=configs/wan_causal_longlive_init.py --workdir=runs/wan_longlive_init
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt"))
    c = parts.wan()
    c.init_from = "runs/wan_ode"
    c.memory.update(window=12, sink=3)  # LL
    c.updates = 140  # LL: 700 iterations
    return parts.salt(c, align_start=70) if variant == "salt" else parts.four_updates(c)
