"""LongLive, first stage: Self Forcing on a window with a sink.

    python -m launch.train --config=configs/longlive_init.py --workdir=runs/shapes_longlive_init

`:salt` after the file's name adds Salt (Eq. 13), `paper` or `release` as configs/self_forcing.py
has it: with `wan` the authors' LongLive. `wan` is at Wan 2.1 size, from runs/wan_ode
(--workdir=runs/wan_longlive_init), `long` in the long world, from runs/long_consistency.
"""

from configs import parts


def get_config(options: str = ""):
    size, variants = parts.read_options(options, "salt", *parts.READINGS)
    c = parts.causal(size)
    # LL has 12 and 3 in clips of 21 frames; those of Moving Shapes have 9
    c.memory.update(window=9 if size == "shapes" else 12, sink=3)
    if size == "long":
        c.init_from = "runs/long_consistency"
    if size == "wan":
        c.init_from = "runs/wan_ode"
        c.iterations = 140  # LL: 700 iterations
    if "salt" in variants:
        # SR: 1,200 iterations, and 21 frames, all parameters, no streaming: that is this stage
        c = parts.salt(c, size, variants, parts.Released(start=240, noise="euler_between"))
        if size == "wan" and "paper" in variants:
            c.align.start = 70  # half of LL's iterations
        elif size == "wan":
            c.iterations = 300  # row 14
        return c
    return parts.four_steps(c)
