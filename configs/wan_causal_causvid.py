"""CausVid's DMD at Wan 2.1 size: the student learns from noised real clips, with a level for each
chunk; no rollout.

    python -m launch.train --config=configs/wan_causal_causvid.py --workdir=runs/wan_causvid

Its levels are the published ones, of shift 8; so are those of its start, runs/wan_ode_causvid,
which is configs/wan_causal_ode.py:causvid. `:salt` is Salt (Eq. 13) instead, from :causvid_salt
there.
"""

from configs import parts


def get_config(variant: str = "plain"):
    parts.refuse_variant(variant, ("plain", "salt"))
    c = parts.wan()
    c.init_from = "runs/wan_ode_causvid"
    c.schedule.shift = c.view.shift = 8.0  # CV
    # CV: 1.3B; guidance_scale 2 in its config of 4 warped levels
    c.teacher.update(preset="", guidance=3.0)
    c.student_optimizer.b1 = c.critic_optimizer.b1 = 0.9  # CV
    c.critic_optimizer.learning_rate = 2e-6  # CV
    c.updates = 200  # CV: about 1,000 iterations
    if variant == "salt":
        c.init_from += "_salt"
        return parts.salt(c, align_start=120)
    c = parts.listed_levels(parts.four_updates(c), (1000, 757, 522))  # CV
    c.video = "noised_chunks"
    c.ema.start = c.updates  # CV: no average
    return c
