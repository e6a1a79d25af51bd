"""Causal consistency distillation: without trajectories the student learns to agree with itself one
step of the causal teacher later.
"""

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
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.stages import causal, single
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Inputs,
    Pass,
    Update,
)
from salt_jax.types import Latent, Params, PRNGKey


class ConsistencyNoise(NamedTuple):
    level: Int[Array, "b"]  # of the causal teacher's
    noise: Latent


@dataclass(frozen=True)
class Consistency:
    """The target is the averaged student."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = single.LEARNERS
    needs = ("cond", "video")
    contradictions = causal.ode_contradictions
    parts = causal.teacher_parts
    frozen = causal.frozen
    first_state = single.from_start
    records = single.records
    updates = single.updates
    passes = single.passes
    memory = causal.memory

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

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

    def mean_passes(self, learner: str) -> list[Pass]:
        (student,) = causal.mean_passes(self, learner)
        others = {"ema: forward": 2.0, "teacher: forward": 4.0}
        more = [
            student._replace(name=name, times=times, gradient="none")
            for name, times in others.items()
        ]
        return [student, *more]
