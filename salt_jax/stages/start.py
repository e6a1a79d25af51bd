"""The input of the one student evaluation that gets gradient, in three ways (`config.video`).

Everything random is drawn for the whole batch at once and then cut, so an example has the same
noise however many micro-batches there are (`stages.accumulate`).
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.visibility import AttentionPlan
from salt_jax.rollout.causal import Origin, Steps, Trajectory, rollout
from salt_jax.rollout.draws import Draw, LevelTriple, draw_chunk_triples, draw_triples
from salt_jax.rollout.replay import plan_diffusion_forcing, plan_replay
from salt_jax.stages.judging import Renoised, draw_renoised
from salt_jax.stages.stage import ABSENT, Batch
from salt_jax.types import Latent, Params, PRNGKey, Sigma


class StartNoise(NamedTuple):
    """What is drawn on the device for an update of student or critic; the rest is a `Draw`."""

    renoised: Renoised
    keys: Key[Array, "b"] = ABSENT  # of the rollouts
    clip: Latent = ABSENT  # on real clips
    triple: LevelTriple = ABSENT  # its levels
    aligned: Renoised = ABSENT  # of cache alignment, where that is not `renoised`


class StartState(NamedTuple):
    """The input of the one student evaluation that gets gradient. Nothing in it has a gradient."""

    x: Latent
    sigma: Sigma
    sigma_m: Sigma  # the triple of Eq. 9; equal levels where there is none
    sigma_e: Sigma
    plan: AttentionPlan | None  # what the student sees; None: everything
    # [B, F', H, W, C], frames of the same video before it that teacher and critic see too: in
    # streaming long tuning, else F' is 0
    overlap: Latent
    trajectory: Trajectory = ABSENT  # of a rollout

    @property
    def still_plan(self) -> AttentionPlan | None:
        """`plan` without gradient through the cache."""
        return self.plan and self.plan._replace(live_from=None)

    def with_overlap(self, x0: Float[Array, "b g h w c"]) -> Float[Array, "b f h w c"]:
        """The frames of one video that teacher and critic judge, of which `x0` are the new ones."""
        return jnp.concatenate([self.overlap, x0], axis=1)

    def new(self, x: Float[Array, "b f ..."]) -> Float[Array, "b g ..."]:
        """Of the frames of `with_overlap` those that are new."""
        return x[:, self.overlap.shape[1] :]


def draw_start(key: PRNGKey, batch: Batch, recipe: Recipe) -> StartNoise:
    """What is random in an update, of the whole batch."""
    k_video, k_renoise = jax.random.split(key)
    shape = (batch.size, *recipe.clip_shape)
    renoised = draw_renoised(k_renoise, shape, recipe.renoise)
    if recipe.video == "rollout":
        keys, aligned = jax.random.split(k_video, batch.size), ABSENT
        if recipe.align.weight and recipe.align.highest:
            key = jax.random.fold_in(k_renoise, 1)
            aligned = draw_renoised(key, shape, recipe.renoise, recipe.align.highest)
        return StartNoise(renoised, keys, aligned=aligned)
    k_triple, k_noise = jax.random.split(k_video)
    table, levels = recipe.triples, recipe.levels(recipe.schedule.train_levels)
    if recipe.video == "noised_chunks":
        sizes = recipe.memory.sizes(shape[1])
        triple = draw_chunk_triples(k_triple, batch.size, sizes, levels, table)
    else:
        triple = draw_triples(k_triple, batch.size, levels, table)
    return StartNoise(renoised, clip=jax.random.normal(k_noise, shape), triple=triple)


def noised_clip(batch: Batch, noise: StartNoise, recipe: Recipe) -> StartState:
    """A noised real clip (backward simulation off, Salt App. B), whole or with a level for each
    chunk.
    """
    x0, (sigma, sigma_m, sigma_e, _) = batch.video, noise.triple
    x = add_noise(x0, noise.clip, sigma)
    plan = plan_diffusion_forcing(x0.shape[1], recipe.memory) if recipe.causal else None
    return StartState(x, sigma, sigma_m, sigma_e, plan, x0[:, :0])


def self_rollout(
    student: WanDenoiser,
    params: Params,
    origin: Origin,
    steps: Steps,
    keys: Key[Array, "b"],
    recipe: Recipe,
) -> Trajectory:
    """The student's own rollout on its own, imperfect, cache."""
    frames, *picture = recipe.clip_shape
    overlap = 0 if origin.cache is None else recipe.stream.overlap
    shape = (frames - overlap, *picture)
    return rollout(student, params, origin, steps, keys, shape, recipe.memory)


def rolled_out(made: Trajectory, origin: Origin, draw: Draw, recipe: Recipe) -> StartState:
    """What a rollout leaves to its exit steps."""
    before = made.x[:, :0]
    if origin.cache is not None:
        before = origin.cache.x0[:, origin.cache.slots - recipe.stream.overlap :]
    sigma_m, sigma_e = (jnp.full(made.x.shape[:2], level) for level in (draw.sigma_m, draw.sigma_e))
    plan = plan_replay(made, recipe.memory, recipe.rollout.live_cache)
    return StartState(made.x, made.sigma, sigma_m, sigma_e, plan, before, made)


def as_steps(draw: Draw, recipe: Recipe) -> Steps:
    r = recipe.rollout
    steps = Steps(draw.levels, draw.exit_step, r.solver, context_noise=r.context_noise)
    if not r.first_steps:
        return steps
    own = replace(steps, levels=draw.first_levels, exit_step=draw.first_exit)
    return replace(steps, first=own)
