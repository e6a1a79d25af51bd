"""Self Forcing on Moving Shapes, and what Salt adds to it, one thing after the other
(the rows of Salt Tab. 5).

    python -m launch.train --config=configs/shapes_self_forcing.py --workdir=runs/self_forcing

After a colon behind the file's name: `plain` (K = 4, DMD alone), `naive` (self-consistency at
K = 4), `mixed` (K of 2, 4 and 8), `mixed_sc` (and self-consistency at 8), `salt` (and cache
alignment).
Cost and result: docs/results.md.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "naive", "mixed", "mixed_sc", "salt"))
    c = parts.shapes()
    if variant in ("plain", "naive"):
        c = parts.four_updates(c)
        c.loss.self_consistency = float(variant == "naive")
        return c
    c = parts.salt(c, align_start=20)
    c.loss.self_consistency = float(variant != "mixed")
    c.align.weight *= variant == "salt"
    return c
