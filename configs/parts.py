"""What configs share. Not a config itself.

After a config's file name and a colon stands its size, "shapes" (Moving Shapes, the default) or
"wan" (Wan 2.1 at 480p), and its variants, with commas: `configs/longlive.py:wan,lora`.

Sources: SF, CF, LL, CV are Self-Forcing @33593df, Causal-Forcing @1fc7bbc, LongLive v1.0 @e52d9ef,
CausVid @ca21150; their numbers are read off configs and code. Their iterations count critic
updates, five to one of the student: ours are student updates, so 600 of theirs are 120 here. Salt
is arXiv:2604.03118; where it is silent a row of docs/algorithm.md 9 is named.
"""

from configs import base
from salt_jax.keys import Config

SIZES = ("shapes", "wan")


def read_options(text: str, *variants: str) -> tuple[str, set[str]]:
    """What stands after the colon: "wan,lora" -> ("wan", {"lora"}).

    Raises ValueError for a name that the config does not have.
    """
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in (*SIZES, *variants)]
    sizes = [name for name in names if name in SIZES]
    if unknown or len(sizes) > 1:
        raise ValueError(
            f"{text!r} after the colon: there stands {' or '.join(SIZES)}, and any of "
            f"{', '.join(variants) or 'nothing else'}, with commas"
        )
    return (sizes or ["shapes"])[0], set(names) - set(sizes)


def causal(size: str) -> Config:
    """The base of the chunk-by-chunk recipes at a size."""
    c = base.get_config()
    c.video = "rollout"
    c.schedule.shift = 5.0  # SF, CF, LL
    return c if size == "shapes" else wan(c)


def wan(c: Config) -> Config:
    """Wan 2.1 1.3B under a 14B teacher at 480p: 21 latent frames of 60 x 104, 7 chunks of 3."""
    c.model.update(preset="wan2.1-t2v-1.3b", dtype="bfloat16", remat="all")
    c.text_encoder = "umt5-xxl"
    c.weights = "weights/wan2.1-t2v-1.3b"
    c.data.update(kind="latents", clip=(21, 60, 104), dir="data/wan_t2v")
    c.teacher.update(preset="wan2.1-t2v-14b", weights="weights/wan2.1-t2v-14b")
    c.teacher.dtype = "bfloat16"  # frozen, and matrix products are in bfloat16 anyway
    c.teacher.guidance = 4.0  # SF's guidance_scale 3
    c.batch_size = 64  # SF: 64 GPUs of 1
    c.student_optimizer.learning_rate = 2e-6  # SF, Salt App. B
    c.critic_optimizer.learning_rate = 4e-7
    c.critic_ratio = 5  # SF
    c.iterations = 120  # SF: 600 iterations
    c.ema.update(decay=0.99, start=40)  # SF: 200 iterations
    c.mesh.update(data=-1, fsdp=8)
    c.align.layers = 18  # of 30, as VideoREPA (row 18)
    return c


def stage(size: str, variants: set[str], name: str, before: str) -> Config:
    """A stage that makes a student causal, from the workdir of the one before."""
    c = causal(size)
    c.stage, c.init_from = name, before
    if "frame" in variants:
        c = frame_wise(c)
    if size == "shapes":
        c.batch_size = 16
        c.student_optimizer.update(learning_rate=5e-4, warmup=20)
    else:
        c.caption_dropout = 0.0  # CF: none; Wan's empty text here is its negative prompt
    c.log_every, c.save_every = 20, 100 if size == "shapes" else 200
    return c


def four_steps(c: Config) -> Config:
    """Rollouts of 4 steps and DMD alone: what the peers train."""
    c.rollout.update(num_steps=(4,), probabilities=(1.0,))
    c.schedule.update(train_levels=4, anchor_levels=4)
    c.loss.self_consistency = 0.0
    return c


def listed_levels(c: Config, levels: tuple) -> Config:
    """A student of a published list of levels (timesteps, 1000 sigma), trained and sampled at these
    alone.
    """
    c.schedule.update(train_levels=len(levels), anchor_levels=len(levels), levels=levels)
    c.rollout.update(num_steps=(len(levels),), probabilities=(1.0,))
    c.sample.num_steps = (len(levels),)
    return c


def salt(c: Config, align_start: int) -> Config:
    """Salt's full objective, Eq. 13: mixed steps, self-consistency at K = 8, cache alignment at
    K = 2 and 4.

    `align_start` in iterations; the paper names 600 of its own for Causal Forcing, 120 here.
    """
    c.rollout.update(num_steps=(2, 4, 8), probabilities=(0.2, 0.4, 0.4))  # Salt App. B
    # T(K) of Eq. 9 is T(8) in rollouts (row 4)
    c.schedule.update(train_levels=8, anchor_levels=8)
    c.loss.update(self_consistency=1.0, stop_gradient="none")  # rows 1, 2
    c.align.update(weight=0.5, start=align_start)  # row 21
    return c


def frame_wise(c: Config) -> Config:
    """One frame at a time (CF's frame-wise models)."""
    c.memory.update(chunk=1, first=1)
    return c
