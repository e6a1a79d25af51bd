"""The sections of a config, key by key: default, meaning with unit and source, what it must be.

Defaults are those of the shapes world, on two CPU cores. Rows are those of docs/algorithm.md 9,
where the Salt paper is silent. `World` and `CachePolicy`, which are sections too, stand in
moving_shapes/shapes.py and models/cache_policy.py.

No jax in here, as in `choices`.
"""

from dataclasses import dataclass
from typing import Literal

from salt_jax.choices import Solver, StopGradient
from salt_jax.keys import (
    COUNT,
    DECAY,
    FEW_LEVELS,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
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
class Teacher:
    """The network, or formula, whose distribution is matched."""

    kind: Literal["data", "network", "closed_form"] = key(
        "network",
        '`"network"`: `weights`, or its own; `"closed_form"`: the exact denoiser of Moving Shapes; '
        '`"data"`: none, the clips themselves (stage denoising)',
    )
    preset: str = key("", 'size of a teacher that is another network; `""`: the student\'s')
    weights: str = key(
        "",
        'file or folder of a teacher that is another network; `""`: `weights`',
        resume="file",
        path=True,
    )
    dtype: Literal["stored", "float32", "bfloat16"] = key(
        "stored", "type of its weights on the devices: as in the file, or cast"
    )
    accept_student: bool = key(
        False,
        "whether a file that is recorded as a student (causal, or of few steps) may teach; "
        "otherwise it is refused",
        resume="free",
    )
    guidance: float = key(
        2.0,
        "classifier-free guidance scale w of u + w (c - u); 1 is none. The peers' `guidance_scale` "
        "g is w = 1 + g",
    )


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the student."""

    train_levels: int = key(
        8, "T_train of Salt Eq. 9: levels at which the student is trained (row 4)", FEW_LEVELS
    )
    anchor_levels: int = key(
        4, "T(K) of Eq. 9: levels where shortcuts end; divides `train_levels` (row 4)", COUNT
    )
    shift: float = key(
        12.0, "timestep shift of these grids, and of sampling (Salt App. A.1: 12)", POSITIVE
    )
    levels: tuple[float, ...] = key(
        (),
        "the student's levels as Wan's timesteps (1000 sigma), such as `(1000, 757, 522)`, falling "
        "from 990 or above, without the 0 at the end; `()`: the grid of `train_levels` and "
        "`shift`. "
        "`train_levels`, `sample.num_steps` and, in rollouts, `rollout.num_steps` must be as many",
    )


@dataclass(frozen=True)
class Rollout:
    """How a student generates its own videos in training (backward simulation)."""

    num_steps: tuple[int, ...] = key(
        (2, 4, 8),
        "K, drawn for each optimizer update (Salt App. B); the largest must be "
        "`schedule.train_levels`",
        STEPS,
    )
    probabilities: tuple[float, ...] = key((0.2, 0.4, 0.4), "probability of each K (Salt App. B)")
    first_steps: int = key(
        0, "K of the first chunk; 0: as the others (Causal Forcing's few-step models take 4)"
    )
    solver: Solver = key("cm", "between the steps of a rollout; `cm` re-noises, as all peers do")


@dataclass(frozen=True)
class Align:
    """Cache alignment, Salt Eq. 11-12."""

    weight: float = key(
        0.0, "lambda_align; 0 turns the term off. VideoREPA's is 0.5 (row 21)", NOT_NEGATIVE
    )
    start: int = key(0, "iterations before it begins; the paper names 600 of its own", NOT_NEGATIVE)
    probability: float = key(
        0.5, 'of the term, where K is below the largest ("stochastically", row 22)'
    )
    margin: float = key(0.1, "delta of Eq. 12, VideoREPA's (row 20)", NOT_NEGATIVE)
    network: Literal["base", "critic", "student"] = key(
        "base", "network of the features: base (`weights`, frozen), critic, student (row 17)"
    )
    layers: int = key(2, "blocks before the features are taken; about 0.6 of all (row 18)")


@dataclass(frozen=True)
class Stream:
    """Streaming long tuning (LongLive): one video continues over many updates."""

    max_frames: int = key(0, "latent frames of a video; 0 turns it off", NOT_NEGATIVE)
    overlap: int = key(3, "latent frames of the teacher's window that earlier updates made")
    switch: float = key(0.5, "probability that a video changes its prompt, once", SHARE)


@dataclass(frozen=True)
class Ode:
    """The causal teacher of the stages ode_regression and consistency."""

    num_steps: int = key(48, "Euler steps of a trajectory", COUNT)
    guidance: float = key(2.0, "guidance scale w of the causal teacher along it")
    trajectories: int = key(
        512,
        "stage ode_regression: how many are made, a batch at a time, in `accumulate` portions",
        COUNT,
    )


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
class Renoise:
    """Noise levels at which teacher and critic judge a video, and at which a teacher is trained."""

    shift: float = key(5.0, "shift of uniform levels; the peers' value", POSITIVE)
    lowest: float = key(0.02, "lower clip of the levels; the peers' value", LEVEL)
    highest: float = key(0.98, "upper clip of the levels; the peers' value", LEVEL)


@dataclass(frozen=True)
class Loss:
    """The self-consistency term, Salt Eq. 8 and 10."""

    self_consistency: float = key(
        1.0,
        "lambda_SC of Eq. 10, for the mean over elements; 0 turns the term and its evaluation "
        "off (row 1)",
        NOT_NEGATIVE,
    )
    stop_gradient: StopGradient = key(
        "none",
        "`none`, `composed`, `direct`, `midpoint`: see "
        "[algorithm](algorithm.md#3-one-student-update) (row 2)",
    )


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
