"""Self Forcing, and what Salt adds to it, one thing after the other (the rows of Salt Tab. 5).

    python -m launch.train --config=configs/self_forcing.py --workdir=runs/self_forcing

Variants after a colon behind the file's name: none is K = 4 and DMD alone; `naive` has
self-consistency at K = 4, `mixed` K of 2, 4 and 8, `mixed_sc` self-consistency at 8 too, `salt`
cache alignment too (Eq. 13). With any of these `release` computes the terms as the authors' code
does and `paper` as their equations say (docs/algorithm.md 9); `release` is the default of `wan`,
`paper` of Moving Shapes. `long` is in the long world, from runs/long_consistency. `wan` is at Wan
2.1 size, from an ODE regression, here runs/wan_ode, with Self-Forcing's numbers (configs/parts.py).
Cost and result: docs/results.md.
"""

from configs import parts


def get_config(options: str = ""):
    mixed = "mixed", "mixed_sc", "salt"
    size, variants = parts.read_options(options, "naive", *mixed, *parts.READINGS)
    c = parts.causal(size)
    if size != "shapes":
        c.init_from = "runs/wan_ode" if size == "wan" else "runs/long_consistency"
    released = parts.Released(start=200, noise="own")  # SR: 1,000 iterations
    if not variants & {*mixed}:
        c = parts.four_steps(c)
        c.loss.self_consistency = float("naive" in variants)
        return parts.reading(c, size, variants, released) if "naive" in variants else c
    c = parts.salt(c, size, variants, released)
    if size == "wan":
        c.iterations = 300  # 1,500 of the peers' iterations (row 14)
    c.loss.self_consistency *= "mixed" not in variants
    c.align.weight *= "salt" in variants
    return c
