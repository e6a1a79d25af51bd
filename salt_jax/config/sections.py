"""Sections of a config, key by key: default, meaning with unit and source, what it must be. Those
of the method stand in `method`.

Defaults are those of the shapes world, on two CPU cores. Rows are those of docs/algorithm.md 9,
where the Salt paper is silent. `World` and `CachePolicy`, which are sections too, stand in
moving_shapes/shapes.py and models/cache_policy.py.

No jax in here, as in `choices`.
"""

from dataclasses import dataclass
from typing import Literal

from salt_jax.choices import (
    Solver,
)
from salt_jax.keys import (
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    STEPS,
    key,
)
from salt_jax.models.presets import KernelChoice, Remat

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Model:
    """Student and critic, and how all networks compute."""

    preset: str = key(
        "tiny",
        "size of student, critic and teacher: `tiny`, `small`, `long` of Moving Shapes; "
        "`wan2.1-t2v-1.3b`, `wan2.1-t2v-14b`, `wan2.1-i2v-14b`, and `wan2.1-t2v-tiny`, "
        "`wan2.1-i2v-tiny`, which are Wan in form and small",
    )
    dtype: Dtype = key(
        "float32", "type of matrix products; parameters, moments and losses are always float32"
    )
    remat: Remat = key(
        "all",
        'what the backward pass of a block recomputes: `"none"`: nothing; `"all"`: everything '
        'from the block\'s input; `"save_attention"`: all but attention; `"dots"`, '
        '`"dots_no_batch"`: all but matrix products, or those with weights; `"offload"`: as '
        '`"all"`, with the inputs in the host\'s memory',
        resume="free",
    )
    residual: Dtype = key(
        "float32",
        'tokens between blocks; `"bfloat16"` halves what `remat="all"` stores, and rounds them '
        "there ([decisions](decisions.md), 50g)",
    )
    attention: KernelChoice = key(
        "auto",
        'attention kernel: `"cudnn"` on GPU, `"splash"` on TPU, `"blocks"` (linear memory) '
        'elsewhere; `"plain"` stores all scores and has a JVP; `"auto"` chooses by the devices of '
        "the program",
        resume="free",
    )


@dataclass(frozen=True)
class Data:
    """The training clips."""

    kind: Literal["moving_shapes", "latents"] = key(
        "moving_shapes", '`"latents"`: what `launch.encode` wrote'
    )
    clip: tuple[int, ...] = key(
        (), "for kind latents: frames, height, width of a latent clip, such as `(21, 60, 104)`"
    )
    dir: str = key(
        "runs/data",
        "folder of the data set; Moving Shapes is rendered into it once, about 20 MB",
        resume="free",
        path=True,
    )
    num_train: int = key(4096, "clips of Moving Shapes to train on")
    num_test: int = key(512, "clips of Moving Shapes to test on")
    seed: int = key(0, "seed of the choice of clips", SEED)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of student and critic."""

    rank: int = key(
        0,
        "train only a product of this rank on each matrix of the blocks; 0 trains all parameters",
        NOT_NEGATIVE,
    )
    alpha: float = key(0.0, "the product is scaled by alpha / rank")


@dataclass(frozen=True)
class Optimizer:
    """AdamW behind a clip of the gradient's global norm."""

    learning_rate: float = key(2e-4, "", NOT_NEGATIVE, resume="free")
    warmup: int = key(0, "updates of linear warm-up", NOT_NEGATIVE)
    decay: bool = key(False, "cosine to 0 over the run, instead of constant")
    b1: float = key(0.0, "DMD's betas are (0, 0.999) in all peers", DECAY)
    b2: float = key(0.999, "", DECAY)
    eps: float = key(1e-8, "", NOT_NEGATIVE)
    weight_decay: float = key(0.01, "", NOT_NEGATIVE, resume="free")
    clip: float = key(10.0, "largest global norm of the gradient", POSITIVE, resume="free")


@dataclass(frozen=True)
class Ema:
    """The averaged student, which is what samples are made with."""

    decay: float = key(0.95, "", DECAY)
    start: int = key(20, "iterations; before it the EMA is a copy", NOT_NEGATIVE)


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one -1 takes the rest."""

    data: int = key(1, "copies of the state, each with a part of the batch", resume="free")
    fsdp: int = key(-1, "parts of the state and of the batch", resume="free")
    context: int = key(1, "parts of a clip's tokens", resume="free")
    tensor: int = key(1, "parts of heads and feed-forward", resume="free")


@dataclass(frozen=True)
class Sample:
    """What `launch.sample` does without flags, and what `launch.evaluate` measures."""

    num_steps: tuple[int, ...] = key((2, 4, 8), "network evaluations", STEPS, resume="free")
    solver: Solver = key("cm", "euler or cm", resume="free")

    @property
    def one(self) -> int:
        """Where one number of evaluations is wanted: the middle one."""
        return sorted(self.num_steps)[len(self.num_steps) // 2]
