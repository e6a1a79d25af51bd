"""Causal consistency distillation: without trajectories the student learns to agree with itself one
step of the causal teacher later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.flow.transition import euler
from salt_jax.losses.regression import endpoint_loss
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.causal import plan_teacher_forcing
from salt_jax.rollout.draws import Draw
from salt_jax.stages import causal
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Frozen,
    Inputs,
    Memory,
    Parts,
    Pass,
    RecordSource,
    Update,
    Weights,
)
from salt_jax.state import TrainState, first_state
from salt_jax.types import Latent, Params, PRNGKey


class ConsistencyNoise(NamedTuple):
    level: Int[Array, "b"]  # of the causal teacher's
    noise: Latent


@dataclass(frozen=True)
class Consistency:
    """The target is the averaged student."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = ("student",)
    needs = ("cond", "video")

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    def contradictions(self) -> Iterator[str]:
        return causal.ode_contradictions(self.recipe)

    def parts(self) -> Parts:
        return [("causal teacher", self.recipe.init_from or self.recipe.weights)]

    def frozen(self, weights: Weights) -> Frozen:
        return causal.frozen(self.recipe, weights)

    def first_state(self, weights: Weights) -> TrainState:
        return first_state(self.recipe, {"student": weights.start})

    def records(self, source: RecordSource) -> Sequence:
        return source.clips

    def updates(self, iteration: int) -> list[tuple[Update, Draw | None]]:
        return [(Update("student"), None)]

    def noise(self, key: PRNGKey, batch: Batch) -> ConsistencyNoise:
        k_level, k_noise = jax.random.split(key)
        count = len(causal.ode_levels(self.recipe)) - 1
        level = jax.random.randint(k_level, (batch.size,), 0, count)
        return ConsistencyNoise(level, jax.random.normal(k_noise, batch.video.shape))

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        """The student at one level against its average at the next, which one guided step of the
        teacher leads to.

        The grid is exact, in float32, and ends at 0, where the average's estimate is the state
        itself: the boundary.
        """
        r, network, frozen = self.recipe, self.student, inputs.frozen
        x0, cond, levels = inputs.batch.video, inputs.batch.cond, jnp.asarray(causal.ode_levels(r))
        level, noise = inputs.noise
        sigma, after = levels[level], levels[level + 1]
        x = add_noise(x0, noise, sigma)
        velocity = causal.forced_velocity(
            network, frozen["teacher"], x0, cond, frozen["null_text"], r
        )
        x_after = euler(x, velocity(x, sigma), sigma, after)

        def predict(params, x, sigma):
            plan = plan_teacher_forcing(network, params, x0, cond, r.memory)
            return network.denoise(params, x, sigma, cond, plan).x0

        target = predict(inputs.state.ema, x_after, after)
        value = endpoint_loss(predict(params, x, sigma), target).mean()
        return value, Aux({"consistency": value})

    def passes(self, update: Update, draw: Draw | None) -> list[Pass]:
        return self.mean_passes(update.moves)

    def mean_passes(self, learner: str) -> list[Pass]:
        student = causal.student_pass(self.recipe)
        others = [("ema: forward", 2.0), ("teacher: forward", 4.0)]
        more = [replace_pass(student, name, times) for name, times in others]
        return [student, *more]

    def memory(self, update: Update) -> Memory:
        return causal.memory(self.recipe)


def replace_pass(student: Pass, name: str, times: float) -> Pass:
    return student._replace(name=name, times=times, gradient="none")
