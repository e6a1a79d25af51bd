"""CausVid's DMD: the student learns from noised real clips, with a level for each chunk; no
rollout.

    python -m launch.train --config=configs/shapes_causvid.py --workdir=runs/shapes_causvid

`:salt` is Salt (Eq. 13) instead, from the same start.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt"))
    c = parts.shapes()
    c.init_from = "runs/shapes_ode"
    if variant == "salt":
        return parts.salt(c, align_start=20)
    c = parts.four_updates(c)
    c.video = "noised_chunks"
    return c
