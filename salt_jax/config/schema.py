"""The numbers of a run as frozen values. The only reader of a ConfigDict inside salt_jax; it adds
no default.

No jax in here, as in `choices`.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from salt_jax.choices import Solver, StopGradient
from salt_jax.config.build import build
from salt_jax.config.migrate import as_of_today
from salt_jax.config.validate import refuse_contradictions
from salt_jax.errors import UserError
from salt_jax.flow.schedule import student_levels
from salt_jax.models.memory import CachePolicy
from salt_jax.models.presets import (
    PRESETS,
    TEXT_PRESETS,
    Compute,
    KernelChoice,
    Remat,
    TextEncoderConfig,
    WanConfig,
)
from salt_jax.moving_shapes.shapes import World

CAUSAL = ("teacher_forcing", "ode_regression", "consistency")  # stages that make a student causal


def works_causally(stage: str, video: str) -> bool:
    """Whether a student of this stage works chunk by chunk."""
    return stage in CAUSAL or (stage == "distil" and video != "noised")


@dataclass(frozen=True)
class Model:
    preset: str
    dtype: typing.Literal["float32", "bfloat16"]
    remat: Remat
    residual: typing.Literal["float32", "bfloat16"]
    attention: KernelChoice


@dataclass(frozen=True)
class Data:
    kind: typing.Literal["moving_shapes", "latents"]
    clip: tuple[int, ...]
    dir: str
    num_train: int
    num_test: int
    seed: int


@dataclass(frozen=True)
class Teacher:
    kind: typing.Literal["data", "network", "closed_form"]
    preset: str
    weights: str
    dtype: typing.Literal["stored", "float32", "bfloat16"]
    accept_student: bool
    guidance: float


@dataclass(frozen=True)
class Schedule:
    train_updates: int
    anchor_updates: int
    shift: float
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Rollout:
    updates: tuple[int, ...]
    probabilities: tuple[float, ...]
    first_updates: int
    solver: Solver


@dataclass(frozen=True)
class Align:
    weight: float
    start: int
    probability: float
    margin: float
    network: typing.Literal["base", "critic", "student"]
    layers: int


@dataclass(frozen=True)
class Stream:
    max_frames: int
    overlap: int
    switch: float


@dataclass(frozen=True)
class Ode:
    updates: int
    guidance: float
    trajectories: int


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float


@dataclass(frozen=True)
class View:
    shift: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Loss:
    self_consistency: float
    stop_gradient: StopGradient


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    warmup: int
    decay: bool
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Ema:
    decay: float
    start: int


@dataclass(frozen=True)
class Mesh:
    data: int
    fsdp: int
    context: int
    tensor: int


@dataclass(frozen=True)
class Sample:
    num_updates: tuple[int, ...]
    solver: Solver


@dataclass(frozen=True)
class Recipe:
    """A whole run. Fields and their units are explained once, in configs/base.py."""

    stage: typing.Literal["denoising", "teacher_forcing", "ode_regression", "consistency", "distil"]
    video: typing.Literal["noised", "noised_chunks", "rollout"]
    init_from: str
    seed: int
    updates: int
    batch_size: int
    accumulate: int
    model: Model
    text_encoder: str
    weights: str
    data: Data
    world: World
    teacher: Teacher
    caption_dropout: float
    schedule: Schedule
    memory: CachePolicy
    rollout: Rollout
    align: Align
    stream: Stream
    ode: Ode
    lora: Lora
    view: View
    loss: Loss
    student_optimizer: Optimizer
    critic_optimizer: Optimizer
    critic_updates: int
    ema: Ema
    mesh: Mesh
    host_state: bool
    log_every: int
    save_every: int
    keep: int
    keep_every: int
    max_skipped: int
    sample: Sample

    @property
    def wan(self) -> WanConfig:
        return PRESETS[self.model.preset]

    @property
    def teacher_wan(self) -> WanConfig:
        return PRESETS[self.teacher.preset or self.model.preset]

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, C) of a clip."""
        shapes = (self.world.frames, self.world.size, self.world.size)
        frames, height, width = self.data.clip if self.data.kind == "latents" else shapes
        return frames, height, width, self.wan.out_channels

    @property
    def causal(self) -> bool:
        """Whether the student works chunk by chunk."""
        return works_causally(self.stage, self.video)

    def levels(self, num_updates: int) -> np.ndarray:
        """Noise levels of a student's updates, float32 [K + 1]: those that are listed if they are
        K, else the grid.
        """
        return student_levels(num_updates, self.schedule.shift, self.schedule.levels)

    @property
    def compute(self) -> Compute:
        types = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
        return Compute(types[self.model.dtype], self.model.remat, types[self.model.residual])

    @property
    def text(self) -> TextEncoderConfig:
        return TEXT_PRESETS[self.text_encoder]


def read_recipe(config: ConfigDict) -> Recipe:
    """ConfigDict -> Recipe.

    Raises:
      UserError: a key is missing or unknown, a value is not one of the choices, or numbers
        contradict each other.
    """
    recipe = build(Recipe, config, "config")
    for name, value, known in (
        ("config.model.preset", recipe.model.preset, PRESETS),
        ("config.teacher.preset", recipe.teacher.preset or recipe.model.preset, PRESETS),
        ("config.text_encoder", recipe.text_encoder, TEXT_PRESETS),
    ):
        if value not in known:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    refuse_contradictions(recipe)
    return recipe


def to_json(recipe: Recipe) -> str:
    """The resolved config, as written to the workdir."""
    return json.dumps(dataclasses.asdict(recipe), indent=2)


def read_workdir(workdir: str | Path) -> Recipe:
    """The recipe that a workdir was made with.

    Raises:
      UserError: its config.json is absent or damaged.
    """
    path = Path(workdir) / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error}); put the file of launch.train back"
        ) from error


def from_json(text: str, where: str | Path = "config.json") -> Recipe:
    """Reads back what `to_json` wrote, also before the last keys came. `where` it was: a name for
    errors.

    Raises:
      UserError: it is no config, or one that `read_recipe` refuses.
    """
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}); put the file of launch.train back"
        ) from error
    if not isinstance(told, dict):
        raise UserError(f"{where} is no config of a run; put the file of launch.train back")
    try:
        return read_recipe(ConfigDict(as_of_today(told)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
