"""LongLive, first stage: Self Forcing on a window with a sink; `:salt` adds Salt (Eq. 13).

python -m launch.train --config=configs/shapes_longlive_init.py --workdir=runs/shapes_longlive_init
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt"))
    c = parts.shapes()
    c.memory.update(window=9, sink=3)  # LL has 12 and 3 in clips of 21 frames; ours have 9
    return parts.salt(c, align_start=20) if variant == "salt" else parts.four_updates(c)
