"""What is random in an update, by example, and where the update begins that the student is blamed
for.

Everything is drawn for the whole batch at once and then cut, so an example has the same noise
however many micro-batches there are (`train.accumulate`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from salt_jax.config.schema import Recipe
from salt_jax.flow.draws import draw_renoise_sigma
from salt_jax.flow.prediction import add_noise
from salt_jax.models.denoiser import Network
from salt_jax.models.kv_cache import KVCache
from salt_jax.rollout.causal import diffusion_forcing, rollout, sight_of
from salt_jax.rollout.draws import Draw, Plan, draw_chunk_plan, draw_plan
from salt_jax.types import Latent, Params, PRNGKey, Sigma

# video: Latent [B, F, H, W, C]; text: Told, or TokenIds [B, T] in stage denoising
Batch = dict[str, Any]


class Noise(NamedTuple):
    """What is drawn on the device for an update of student or critic; the rest is a `Draw`."""

    keys: Any  # [B], of the rollouts; None where clips are noised
    clip: Any  # [B, F, H, W, C], on real clips; None in rollouts
    plan: Plan | None  # its levels
    renoise: Latent  # [B, F, H, W, C], on the video that teacher and critic look at
    sigma: Sigma  # its levels, [B]


def draw_noise(key: PRNGKey, batch: Batch, recipe: Recipe) -> Noise:
    """All of it, of the whole batch."""
    k_video, k_renoise = jax.random.split(key)
    if recipe.video == "rollout":
        size = len(batch["text"])
        renoise = draw_renoise(k_renoise, (size, *recipe.clip_shape), recipe)
        return Noise(jax.random.split(k_video, size), None, None, *renoise)
    k_plan, k_noise = jax.random.split(k_video)
    s, (size, frames), shape = recipe.schedule, batch["video"].shape[:2], batch["video"].shape
    levels = recipe.levels(s.train_levels)
    if recipe.video == "noised_chunks":
        plan = draw_chunk_plan(k_plan, size, recipe.memory.sizes(frames), levels, s.anchor_levels)
    else:
        plan = draw_plan(k_plan, size, levels, s.anchor_levels)
    return Noise(
        None, jax.random.normal(k_noise, shape), plan, *draw_renoise(k_renoise, shape, recipe)
    )


def draw_renoise(key: PRNGKey, shape: tuple[int, ...], recipe: Recipe) -> tuple[Latent, Sigma]:
    """Noise and levels for teacher and critic to look at a video through."""
    k_sigma, k_noise = jax.random.split(key)
    sigma = draw_renoise_sigma(
        k_sigma, shape[0], recipe.renoise.shift, recipe.renoise.lowest, recipe.renoise.highest
    )
    return jax.random.normal(k_noise, shape), sigma


class Start(NamedTuple):
    """Where the update begins that the student is blamed for. Nothing in it carries a gradient."""

    x: Latent
    sigma: Sigma
    sigma_m: Sigma  # the triple of Eq. 9; equal levels where there is none
    sigma_e: Sigma
    sight: Any  # how the student looks around; None: at everything
    # [B, F', H, W, C] frames of the same video that the teacher sees too; F' is mostly 0
    before: Latent
    trajectory: Any  # the Trajectory of a rollout, or None


def begin(
    network: Network,
    params: Params,
    batch: Batch,
    noise: Noise,
    draw: Draw | None,
    cache: KVCache | None,
    recipe: Recipe,
) -> Start:
    """The student's state before an update, made as `config.video` says. Both optimisers see the
    same mixture.

    From a noised real clip (backward simulation off, Salt App. B), with one level or one for each
    chunk; or by the student's own rollout on its own, imperfect, cache.
    """
    policy, params = recipe.memory, jax.lax.stop_gradient(params)
    if recipe.video == "rollout":
        assert draw is not None
        shape = recipe.clip_shape
        overlap = recipe.stream.overlap if cache is not None else 0
        trajectory = rollout(
            network,
            params,
            batch["text"],
            draw.levels,
            draw.exit_step,
            recipe.rollout.solver,
            noise.keys,
            (shape[0] - overlap, *shape[1:]),
            policy,
            cache,
            (draw.first_levels, draw.first_exit) if recipe.rollout.first_steps else None,
        )
        x, sigma = trajectory.x, trajectory.sigma
        before = cache.x0[:, cache.slots - overlap :] if cache is not None else x[:, :0]
        level = lambda value: jnp.full(x.shape[:2], value)
        sight = sight_of(trajectory, policy)
        return Start(x, sigma, level(draw.sigma_m), level(draw.sigma_e), sight, before, trajectory)
    x0, plan = batch["video"], noise.plan
    assert plan is not None
    sight = diffusion_forcing(x0.shape[1], policy) if recipe.video == "noised_chunks" else None
    x = add_noise(x0, noise.clip, plan.sigma_s)
    return Start(x, plan.sigma_s, plan.sigma_m, plan.sigma_e, sight, x0[:, :0], None)
