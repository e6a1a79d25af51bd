"""What the configs of the causal recipes share. Not a config itself.

Sources: SF, CF, LL, CV are Self-Forcing @33593df, Causal-Forcing @1fc7bbc, LongLive v1.0 @e52d9ef,
CausVid @ca21150; their numbers are read off configs and code. Their iterations count critic
updates, five to one of the student: ours are student updates, so 600 of theirs are 120 here. Salt
is arXiv:2604.03118; where it is silent a row of docs/algorithm.md 9 is named.
"""

from typing import Any

from configs import base


def shapes() -> Any:
    """Moving Shapes, chunk by chunk, in 3 chunks of 3 frames."""
    c = base.get_config()
    c.video = "rollout"
    c.schedule.shift = 5.0  # SF, CF, LL
    return c


def wan() -> Any:
    """Wan 2.1 1.3B under a 14B teacher at 480p: 21 latent frames of 60 x 104, 7 chunks of 3."""
    c = shapes()
    c.model.update(preset="wan2.1-t2v-1.3b", dtype="bfloat16", remat="all")
    c.text_encoder = "umt5-xxl"
    c.weights = "weights/wan2.1-t2v-1.3b"
    c.data.update(kind="latents", clip=(21, 60, 104), dir="data/wan_t2v")
    c.teacher.update(preset="wan2.1-t2v-14b", weights="weights/wan2.1-t2v-14b")
    c.teacher.dtype = "bfloat16"  # it never learns, and products read it so
    c.teacher.guidance = 4.0  # SF's guidance_scale 3
    c.batch_size = 64  # SF: 64 GPUs of 1
    c.student_optimizer.learning_rate = 2e-6  # SF, Salt App. B
    c.critic_optimizer.learning_rate = 4e-7
    c.critic_updates = 5  # SF
    c.updates = 120  # SF: 600 iterations
    c.ema.update(decay=0.99, start=40)  # SF: 200 iterations
    c.mesh.update(data=-1, fsdp=8)
    c.align.layers = 18  # of 30, as VideoREPA (row 18)
    return c


def whole_clips(c: Any, variant: str) -> Any:
    """SC-DMD and its baselines without rollouts (Salt App. B: backward simulation off)."""
    c.video = "noised"
    c.batch_size = 16  # Salt App. B
    # "the same" (row 12)
    c.student_optimizer.learning_rate = c.critic_optimizer.learning_rate = 1e-6
    c.schedule.shift = 12.0  # Salt App. A.1; the grid of training is that of inference (row 10)
    c.schedule.update(train_updates=8, anchor_updates=4)  # Eq. 9: 8 levels, for 4 updates
    if variant != "sc_dmd":
        c.loss.self_consistency = 0.0
    if variant == "dmd4":
        c.schedule.train_updates = 4
    return c


def four_updates(c: Any) -> Any:
    """Rollouts of 4 updates and DMD alone: what the peers train."""
    c.rollout.update(updates=(4,), probabilities=(1.0,))
    c.schedule.update(train_updates=4, anchor_updates=4)
    c.loss.self_consistency = 0.0
    return c


def listed_levels(c: Any, levels: tuple) -> Any:
    """A student of a published list of levels (timesteps, 1000 sigma), trained and sampled at these
    alone.
    """
    c.schedule.update(train_updates=len(levels), anchor_updates=len(levels), levels=levels)
    c.rollout.update(updates=(len(levels),), probabilities=(1.0,))
    c.sample.num_updates = (len(levels),)
    return c


def salt(c: Any, align_start: int) -> Any:
    """Salt's full objective, Eq. 13: mixed steps, self-consistency at K = 8, cache alignment.

    The last is at K = 2 and 4. `align_start` in student updates; the paper names 600 iterations for
    Causal Forcing, 120 here.
    """
    c.rollout.update(updates=(2, 4, 8), probabilities=(0.2, 0.4, 0.4))  # Salt App. B
    # T(K) of Eq. 9 is T(8) in rollouts (row 4)
    c.schedule.update(train_updates=8, anchor_updates=8)
    c.loss.update(self_consistency=1.0, stop_gradient="none")  # rows 1, 2
    c.align.update(weight=0.5, start=align_start)  # row 21
    return c


def frame_wise(c: Any) -> Any:
    """One frame at a time (CF's frame-wise models)."""
    c.memory.update(chunk=1, first=1)
    return c


def stage(c: Any, name: str, before: str) -> Any:
    """A stage that makes a student causal, from the workdir of the one before."""
    c.stage, c.init_from = name, before
    return c


def refuse_variant(variant: str, known: tuple[str, ...]) -> None:
    """What a config says to a name after the colon that it does not have."""
    if variant not in known:
        raise ValueError(
            f"no variant {variant!r} of this config; after the colon stands one of "
            f"{', '.join(known)}"
        )
