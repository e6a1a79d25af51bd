"""The sections of a config that say what is learnt: teacher, noise levels, rollouts, losses.

Written as those of `sections`. Rows are those of docs/algorithm.md 9.

No jax in here, as in `choices`.
"""

from dataclasses import dataclass
from typing import Literal

from salt_jax.choices import (
    LevelWeight,
    ReferenceExit,
    ReferenceNoise,
    Solver,
    StopGradient,
)
from salt_jax.keys import COUNT, FEW_LEVELS, LEVEL, NOT_NEGATIVE, POSITIVE, SHARE, STEPS, key


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
    nearest_ends: int = key(
        0,
        "a shortcut ends at one of so many of these that are nearest below its start; 0: at any "
        "(row 4)",
        NOT_NEGATIVE,
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
    context_noise: float = key(
        0.0, "noise level of the frames in the cache; the peers' is .00498 (row 27)", SHARE
    )
    live_cache: bool = key(
        False,
        "whether gradient runs through the cache to the keys that its frames had at their exit "
        "step, as in the peers' (row 26)",
    )


@dataclass(frozen=True)
class Align:
    """Cache alignment, Salt Eq. 11-12."""

    weight: float = key(
        0.0, "lambda_align; 0 turns the term off. VideoREPA's is 0.5 (row 21)", NOT_NEGATIVE
    )
    start: int = key(0, "iterations before it begins; the paper names 600 of its own", NOT_NEGATIVE)
    probability: float = key(
        0.5, 'of the term, in an update that can have it ("stochastically", row 22)'
    )
    num_steps: tuple[int, ...] = key(
        (), "K of the updates that can have it; `()`: each but the largest (row 22)"
    )
    lowest_exit: int = key(
        0,
        "least exit step of these; 1 leaves out those at pure noise (row 22)",
        NOT_NEGATIVE,
    )
    margin: float = key(0.1, "delta of Eq. 12, VideoREPA's (row 20)", NOT_NEGATIVE)
    network: Literal["base", "teacher", "critic", "student"] = key(
        "base",
        "network of the features: base (`weights`, frozen), teacher, critic, student (row 17)",
    )
    layers: int = key(2, "blocks before the features are taken; about 0.6 of all (row 18)")
    highest: float = key(
        0.0,
        "the noise level of the features is drawn anew, u uniform in [0, `highest`], then shift "
        "and clip of `renoise`; 0: level and noise of teacher and critic (row 19)",
        SHARE,
    )
    reference_exit: ReferenceExit = key(
        "last", 'where the reference stops: `"last"` or `"student"` (row 23)'
    )
    reference_noise: ReferenceNoise = key(
        "shared", 'its noise: `"shared"`, `"own"` or `"euler_between"` (row 23)'
    )


@dataclass(frozen=True)
class Stream:
    """Streaming long tuning (LongLive): one video continues over many updates."""

    max_frames: int = key(0, "latent frames of a video; 0 turns it off", NOT_NEGATIVE)
    overlap: int = key(3, "latent frames of the teacher's window that earlier updates made")
    switch: float = key(0.5, "probability that a video changes its prompt, once", SHARE)
    reencode: int = key(
        0,
        "latent frames of a continued video, the last of which is the first that teacher and "
        "critic see: the VAE of `weights` decodes them, and encodes their last frame as a video's "
        "first; 0: that latent as it is, as where latents are frames",
        NOT_NEGATIVE,
    )


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
class Renoise:
    """Noise levels at which teacher and critic judge a video, and at which a teacher is trained."""

    shift: float = key(5.0, "shift of uniform levels; the peers' value", POSITIVE)
    lowest: float = key(0.02, "lower clip of the levels; the peers' value", LEVEL)
    highest: float = key(0.98, "upper clip of the levels; the peers' value", LEVEL)
    score_shift: float = key(
        0.0,
        "shift of the table of 1,000 levels in which teacher and critic look up the level that "
        "they judge, noised by the table of `shift`; the peers' is 8. 0: the level itself (row 9)",
        NOT_NEGATIVE,
    )


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
    level_weight: LevelWeight = key(
        "one", '`"one_minus_sigma"`: the term counts 1 - sigma_s of its start (row 5)'
    )
