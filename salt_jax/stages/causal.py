"""What the stages that make a bidirectional network causal have in common.

| stage           | the student learns                                     | Causal Forcing |
|-----------------|--------------------------------------------------------|----------------|
| teacher_forcing | to denoise each chunk given the clean chunks before it | stage 1        |
| ode_regression  | the end of the causal teacher's trajectory from any of | stage 2a       |
|                 | its few levels                                         |                |
| consistency     | without trajectories: to agree with itself one step of | stage 2b       |
|                 | the teacher later                                      |                |

The causal teacher of the last two is the network they start from. Self-Forcing and CausVid start
from an ODE regression whose teacher is bidirectional; Causal Forcing argues that a causal student
cannot follow its trajectories.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import guide
from salt_jax.flow.schedule import grid
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.visibility import chunk_pairs
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.stages.contradictions import causal_teacher, no_lora, no_rollouts
from salt_jax.stages.stage import Frozen, Memory, Parts, Pass, Stage, Update, Weights
from salt_jax.stages.weights import in_dtype
from salt_jax.types import Conditioning, Latent, Params, Sigma


def contradictions(stage: Stage) -> Iterator[str]:
    """Of all three."""
    yield from no_lora(stage.recipe)
    yield from no_rollouts(stage.recipe)


def ode_contradictions(stage: Stage) -> Iterator[str]:
    """Of the two that have a causal teacher."""
    yield from contradictions(stage)
    yield from causal_teacher(stage.recipe)


def teacher_parts(stage: Stage) -> Parts:
    """Of these two."""
    return [("causal teacher", stage.recipe.init_from or stage.recipe.weights)]


def frozen(stage: Stage, weights: Weights) -> Frozen:
    teacher = in_dtype(weights.start, stage.recipe.teacher.dtype)
    return {"teacher": teacher, "null_text": weights.null_text}


def mean_passes(stage: Stage, learner: str) -> list[Pass]:
    """A clean pass for the cache, and the noisy one that sees it."""
    r = stage.recipe
    pairs = tuple(chunk_pairs(r.memory, r.clip_shape[0]))
    return [Pass("student", r.wan, pairs, 2.0, "weights")]


def memory(stage: Stage, update: Update) -> Memory:
    """The gradient runs through the cache too."""
    return Memory(caches=2, slots=stage.recipe.clip_shape[0], forwards=2.0)


def ode_levels(r: Recipe) -> np.ndarray:
    """Levels of the causal teacher's steps, falling to 0: those of `config.ode.num_steps`, and the
    student's.
    """
    student = r.levels(r.schedule.train_levels)
    return np.union1d(student, grid(r.ode.num_steps, r.schedule.shift))[::-1]


def forced_velocity(
    network: WanDenoiser,
    params: Params,
    x0: Latent,
    cond: Conditioning,
    null_text: Float[Array | np.ndarray, "1 t d"],
    r: Recipe,
) -> Callable[[Latent, Sigma], Latent]:
    """(x, sigma) -> the guided velocity of all chunks at once, each given the clean chunks before
    it.
    """
    null = cond._replace(text=jnp.broadcast_to(null_text, cond.text.shape))
    branches = [(c, plan_teacher_forcing(network, params, x0, c, r.memory)) for c in (cond, null)]

    def velocity(x, sigma):
        given, null = (network.denoise(params, x, sigma, c, plan) for c, plan in branches)
        return guide(given, null, r.ode.guidance).velocity

    return velocity
