"""What configs share. Not a config itself.

After a config's file name and a colon stands its size, "shapes" (Moving Shapes, the default),
"long" (its long world) or "wan" (Wan 2.1 at 480p), and its variants, with commas:
`configs/longlive.py:wan,lora`.

Sources: SF, CF, LL, CV are Self-Forcing @33593df, Causal-Forcing @1fc7bbc, LongLive v1.0 @e52d9ef,
CausVid @ca21150; their numbers are read off configs and code. Their iterations count critic
updates, five to one of the student: ours are student updates, so 600 of theirs are 120 here. Salt
is arXiv:2604.03118, SR its authors' code @020d04f; where it is
silent a row of docs/algorithm.md 9 is named.
"""

from typing import NamedTuple

from configs import base
from salt_jax.keys import Config
from salt_jax.models.presets import PRESETS

SIZES = ("shapes", "long", "wan")
READINGS = ("paper", "release")


def read_options(text: str, *variants: str) -> tuple[str, set[str]]:
    """What stands after the colon: "wan,lora" -> ("wan", {"lora"}).

    Raises ValueError for a name that the config does not have.
    """
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in (*SIZES, *variants)]
    sizes = [name for name in names if name in SIZES]
    if unknown or len(sizes) > 1:
        raise ValueError(
            f"{text!r} after the colon: there stands {', '.join(SIZES)}, and any of "
            f"{', '.join(variants) or 'nothing else'}, with commas"
        )
    return (sizes or ["shapes"])[0], set(names) - set(sizes)


def causal(size: str) -> Config:
    """The base of the chunk-by-chunk recipes at a size."""
    c = base.get_config()
    c.video = "rollout"
    c.schedule.shift = 5.0  # SF, CF, LL
    return at_size(c, size)


def at_size(c: Config, size: str) -> Config:
    """A recipe for Moving Shapes at another size."""
    return {"shapes": lambda c: c, "long": long, "wan": wan}[size](c)


def long(c: Config) -> Config:
    """Endless videos of 48 x 48 pixels in clips of 21 latent frames, 7 chunks of 3; 16 tokens a
    frame.
    """
    c.world.update(size=48, frames=21, radius=9.0, softness=2.0, patch=4)
    c.world.update(starts=tuple(map(float, range(0, 48, 2))), speeds=(2.0, 4.0))
    c.model.update(preset="long", remat="none")
    c.weights = "runs/long_teacher.safetensors"
    c.batch_size = 8
    return c


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
    if size != "wan":
        c.student_optimizer.update(learning_rate=5e-4, warmup=20)
    else:
        c.caption_dropout = 0.0  # CF: none; Wan's empty text here is its negative prompt
    c.log_every, c.save_every = 20, 200 if size == "wan" else 100
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


class Released(NamedTuple):
    """What the authors' configs of the three backbones do not share."""

    start: int  # of cache alignment, in iterations; theirs count critic updates, five to one
    noise: str  # of its reference


def salt(c: Config, size: str, variants: set[str], released: Released) -> Config:
    """Salt's full objective, Eq. 13: mixed steps, self-consistency at K = 8, cache alignment at
    fewer. As the authors' code has it ("release", the default at Wan size) or as their paper does.
    """
    c.rollout.update(num_steps=(2, 4, 8), probabilities=(0.2, 0.4, 0.4))  # Salt App. B
    c.schedule.train_levels = 8
    c.loss.self_consistency, c.align.weight = 1.0, 1.0  # see `reading`
    # the paper names 600 of its iterations for Causal Forcing
    c.align.start = 120 if size == "wan" else 20
    return reading(c, size, variants, released)


def reading(c: Config, size: str, variants: set[str], released: Released) -> Config:
    """Sets how the terms that are on are computed: by the paper, or as its authors' code does."""
    if {"paper", "release"} <= variants:
        raise ValueError("paper and release are two readings of one method: name one of them")
    if "paper" in variants or (size != "wan" and "release" not in variants):
        c.schedule.anchor_levels = c.schedule.train_levels  # of rollouts (row 4)
        c.align.weight *= 0.5  # row 21
        return c
    # SR: every value below, by name
    c.schedule.update(anchor_levels=c.schedule.train_levels // 2, nearest_ends=2)  # row 4
    c.loss.self_consistency *= 0.2  # row 1
    c.loss.update(stop_gradient="composed", level_weight="one_minus_sigma")  # rows 2, 5
    c.align.weight *= 0.1  # row 21
    depth = PRESETS[c.teacher.preset or c.model.preset].num_layers
    # rows 17, 18, 19; SR: 21 of 40
    c.align.update(network="teacher", layers=round(21 / 40 * depth), highest=0.2)
    c.align.update(num_steps=(2,), lowest_exit=1, probability=1.0)  # row 22
    c.align.update(reference_exit="student", reference_noise=released.noise)  # row 23
    if size == "wan":
        c.align.start = released.start
    return c


def frame_wise(c: Config) -> Config:
    """One frame at a time (CF's frame-wise models)."""
    c.memory.update(chunk=1, first=1)
    return c
