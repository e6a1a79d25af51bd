"""A whole run as one frozen value: the keys of a config that stand in no section, and the sections.

Every key is written down once, here or in `sections`. The ConfigDict that `configs/` edits
(`reading.to_config_dict`), the table in docs/guide.md (`table`), the checks (`reading.read_recipe`)
and what may change on resume (`migrate`) are derived from that.

No jax in here, as in `choices`.
"""

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from salt_jax.config.method import (
    Align,
    Loss,
    Ode,
    Renoise,
    Rollout,
    Schedule,
    Stream,
    Teacher,
)
from salt_jax.config.sections import Data, Ema, Lora, Mesh, Model, Optimizer, Sample
from salt_jax.flow.schedule import Triples, student_levels, triples
from salt_jax.keys import COUNT, NOT_NEGATIVE, SEED, SHARE, key
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.presets import (
    PRESETS,
    TEXT_PRESETS,
    Compute,
    TextEncoderConfig,
    WanConfig,
)
from salt_jax.moving_shapes.latents import clip_shape
from salt_jax.moving_shapes.shapes import World

StageName = Literal[
    "denoising", "teacher_forcing", "ode_regression", "consistency", "shortcut", "distil"
]
Video = Literal["noised", "noised_chunks", "rollout"]
CAUSAL = ("teacher_forcing", "ode_regression", "consistency")  # stages that make a student causal
MAKES_TEACHER = ("denoising",)
ANY_LEVEL = (*MAKES_TEACHER, "teacher_forcing")  # stages whose network denoises from any level


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    stage: StageName = key(
        "distil",
        '`"distil"`: DMD with the terms of Salt; `"denoising"`: train a teacher and its text '
        'encoder; `"teacher_forcing"`, `"ode_regression"`, `"consistency"`: make a student causal; '
        '`"shortcut"`: self-consistency as the only signal',
    )
    video: Video = key(
        "noised",
        "how a student under distillation makes videos: the whole clip in one step from a noised "
        'real one; `"noised_chunks"`: the same with a level for each chunk (CausVid); '
        '`"rollout"`: chunk by chunk from noise',
    )
    init_from: str = key(
        "",
        'the stage before: its workdir, or a file of `launch.export`, with LoRA or without; `""`: '
        "the student starts as `weights`",
        resume="file",
        path=True,
    )
    init_critic: bool = key(
        False,
        "whether the critic starts as that of `init_from` (LongLive's long stage), instead of as "
        "`weights`",
    )
    accept_shift: bool = key(
        False,
        "whether a few-step start in `init_from` may have been trained at another shift or other "
        "listed levels; otherwise it is refused",
        resume="free",
    )
    seed: int = key(
        0, "initial weights where fresh, order of the data, all noise in training", SEED
    )
    iterations: int = key(
        60,
        "student updates in the whole run; the peers' iterations count critic updates, five times "
        "as many (row 15)",
        COUNT,
        resume="free",
    )
    batch_size: int = key(24, "clips of an update, over all devices", COUNT)
    accumulate: int = key(
        1,
        "micro-batches of an update, computed one after the other: less accelerator memory, the "
        "same result",
        COUNT,
        resume="free",
    )
    model: Model = Model()
    text_encoder: str = key(
        "tiny", "`umt5-xxl` for the Wan presets, `wan-tiny` for the small ones of them"
    )
    weights: str = key(
        "shapes_teacher",
        "where student, critic, teacher and text encoder start: a file, a folder of "
        '`launch.convert_wan`, or the name of a shipped asset; `""`: fresh',
        resume="file",
        path=True,
    )
    data: Data = Data()
    world: World = World()
    teacher: Teacher = Teacher()
    caption_dropout: float = key(
        0.1,
        "stages denoising and teacher_forcing: share of examples with the empty caption",
        SHARE,
    )
    schedule: Schedule = Schedule()
    memory: CachePolicy = CachePolicy(3, 3, 0, 0, "absolute")
    rollout: Rollout = Rollout()
    align: Align = Align()
    stream: Stream = Stream()
    ode: Ode = Ode()
    lora: Lora = Lora()
    renoise: Renoise = Renoise()
    loss: Loss = Loss()
    student_optimizer: Optimizer = Optimizer()
    critic_optimizer: Optimizer = Optimizer(learning_rate=4e-4)
    critic_ratio: int = key(
        3, "critic updates after each student update; the peers take 5 (row 11)", COUNT
    )
    ema: Ema = Ema()
    mesh: Mesh = Mesh()
    host_state: bool = key(
        False,
        "keeps moments and the averaged student in host memory; they are on the devices only "
        "for their update",
        resume="free",
    )
    log_every: int = key(10, "iterations", COUNT, resume="free")
    save_every: int = key(20, "iterations", COUNT, resume="free")
    save_every_minutes: float = key(
        0.0,
        "minutes since the last checkpoint after which one is written, beside `save_every`; 0 is "
        "off",
        NOT_NEGATIVE,
        resume="free",
    )
    keep: int = key(2, "how many of the newest checkpoints to keep", COUNT, resume="free")
    keep_every: int = key(
        0,
        "iterations; at multiples of it a checkpoint is written and never deleted; 0 is off",
        NOT_NEGATIVE,
        resume="free",
    )
    max_skipped: int = key(
        5, "updates in a row that are not finite, which stop the run", COUNT, resume="free"
    )
    sample: Sample = Sample()

    @property
    def wan(self) -> WanConfig:
        return PRESETS[self.model.preset]

    @property
    def teacher_wan(self) -> WanConfig:
        return PRESETS[self.teacher.preset or self.model.preset]

    @property
    def features_wan(self) -> WanConfig:
        """The network of cache alignment's features."""
        return self.teacher_wan if self.align.network == "teacher" else self.wan

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a clip."""
        if self.data.kind == "moving_shapes":
            return clip_shape(self.world)
        frames, height, width = self.data.clip
        return frames, height, width, self.wan.out_channels

    @property
    def reencodes(self) -> bool:
        """Whether a VAE is part of its updates."""
        return bool(self.stream.max_frames and self.stream.reencode)

    @property
    def makes_teacher(self) -> bool:
        """Whether it trains a teacher and its text encoder, not a student."""
        return self.stage in MAKES_TEACHER

    @property
    def causal(self) -> bool:
        """Whether the student works chunk by chunk."""
        return works_causally(self.stage, self.video)

    def levels(self, num_steps: int) -> np.ndarray:
        """Noise levels of a student's steps, float32 [K + 1]: those that are listed if they are K,
        else the grid.
        """
        return student_levels(num_steps, self.schedule.shift, self.schedule.levels)

    @property
    def triples(self) -> Triples:
        """Those of Eq. 9 on the training grid."""
        s = self.schedule
        return triples(s.train_levels, s.anchor_levels, s.nearest_ends)

    @property
    def compute(self) -> Compute:
        types = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
        return Compute(types[self.model.dtype], self.model.remat, types[self.model.residual])

    @property
    def text(self) -> TextEncoderConfig:
        return TEXT_PRESETS[self.text_encoder]


def works_causally(stage: object, video: object) -> bool:
    """Whether a student of this stage works chunk by chunk; of distil its videos decide."""
    return stage in CAUSAL or (stage, video) in {("distil", "noised_chunks"), ("distil", "rollout")}
