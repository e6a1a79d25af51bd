"""Self Forcing at Wan 2.1 size; `:salt` after the file's name adds Salt (Eq. 13).

    python -m launch.train --config=configs/wan_causal_self_forcing.py \\
        --workdir=runs/wan_self_forcing

Numbers are Self-Forcing's (configs/parts.py); it starts from an ODE regression, here from
runs/wan_ode.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt"))
    c = parts.wan()
    c.init_from = "runs/wan_ode"
    if variant == "plain":
        return parts.four_updates(c)
    c.updates = 300  # 1,500 of the peers' iterations (row 14)
    return parts.salt(c, align_start=120)
