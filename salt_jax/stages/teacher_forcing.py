"""Teacher forcing: the student learns to denoise each chunk given the clean chunks before it."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from salt_jax.config.schema import Recipe
from salt_jax.flow.draws import draw_renoise_sigma
from salt_jax.flow.prediction import add_noise
from salt_jax.losses.flow_matching import flow_matching_loss, midlevel_weight
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.stages import causal, single
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Inputs,
    Parts,
    Update,
)
from salt_jax.types import Latent, Params, PRNGKey, Sigma


class ForcingNoise(NamedTuple):
    drop: Bool[Array, "b 1 1"]  # whether an example sees the empty caption
    sigma: Sigma  # [B, F], one level for each chunk
    noise: Latent


@dataclass(frozen=True)
class TeacherForcing:
    """Flow matching with a level for each chunk."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = single.LEARNERS
    needs = ("cond", "video")
    contradictions = causal.contradictions
    frozen = causal.frozen
    first_state = single.from_start
    records = single.records
    updates = single.updates
    passes = single.passes
    mean_passes = causal.mean_passes
    memory = causal.memory

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    def parts(self) -> Parts:
        return []

    def noise(self, key: PRNGKey, batch: Batch) -> ForcingNoise:
        r, b = self.recipe, batch.size
        k_drop, k_sigma, k_noise = jax.random.split(key, 3)
        sizes = r.memory.sizes(r.clip_shape[0])
        drop = jax.random.bernoulli(k_drop, r.caption_dropout, (b, 1, 1))
        among = r.renoise.shift, r.renoise.lowest, r.renoise.highest
        levels = draw_renoise_sigma(k_sigma, b * len(sizes), *among).reshape(b, -1)
        sigma = jnp.repeat(levels, np.array(sizes), axis=1, total_repeat_length=sum(sizes))
        return ForcingNoise(drop, sigma, jax.random.normal(k_noise, batch.video.shape))

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        x0, cond = inputs.batch.video, inputs.batch.cond
        drop, sigma, noise = inputs.noise
        cond = cond._replace(text=jnp.where(drop, inputs.frozen["null_text"], cond.text))
        plan = plan_teacher_forcing(self.student, params, x0, cond, self.recipe.memory)
        x = add_noise(x0, noise, sigma)
        velocity = self.student.denoise(params, x, sigma, cond, plan).velocity
        weight = midlevel_weight(sigma, self.recipe.renoise.shift)
        value = flow_matching_loss(velocity, x0, noise, weight).mean()
        return value, Aux({"teacher_forcing": value})
