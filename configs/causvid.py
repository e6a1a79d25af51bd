"""CausVid's DMD: the student learns from noised real clips, with a level for each chunk; no
rollout.

    python -m launch.train --config=configs/causvid.py --workdir=runs/shapes_causvid

Variants after a colon behind the file's name: `salt` is Salt (Eq. 13) instead, from the same start,
`paper` or `release` as configs/self_forcing.py has it (the alignment is Causal Forcing's).
`wan` is at Wan 2.1 size (--workdir=runs/wan_causvid): its levels are the published ones, of shift
8; so are those of its start, runs/wan_ode_causvid, which is configs/ode_regression.py:wan,causvid;
with `salt` runs/wan_ode_causvid_salt, which is :wan,causvid,salt there.
"""

from configs import parts
from salt_jax.keys import Config


def get_config(options: str = "") -> Config:
    size, variants = parts.read_options(options, "salt", *parts.READINGS)
    c = parts.causal(size)
    c.init_from = f"runs/{size}_ode"
    if size == "wan":
        c = numbers_of_causvid(c)
    if "salt" in variants:
        if size == "wan":
            c.init_from += "_salt"
        return parts.salt(c, size, variants, parts.Released(start=140, noise="euler_between"))
    c = parts.four_steps(c)
    if size == "wan":
        c = parts.listed_levels(c, (1000, 757, 522))  # CV
        c.ema.start = c.iterations  # CV: no average
    c.video = "noised_chunks"
    return c


def numbers_of_causvid(c: Config) -> Config:
    c.init_from = "runs/wan_ode_causvid"
    c.schedule.shift = c.renoise.shift = 8.0  # CV
    # CV: 1.3B; guidance_scale 2 in its config of 4 warped levels
    c.teacher.update(preset="", guidance=3.0)
    c.student_optimizer.b1 = c.critic_optimizer.b1 = 0.9  # CV
    c.critic_optimizer.learning_rate = 2e-6  # CV
    c.iterations = 200  # CV: about 1,000 iterations
    return c
