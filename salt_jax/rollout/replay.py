"""What the chunks of a video see, all at once: exit steps of a rollout again, with gradient, and
whole clips that are read or trained on as they are.
"""

import numpy as np

from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import CausalDenoiser, Cond
from salt_jax.models.visibility import AttentionPlan, KeysValues, chunk_groups
from salt_jax.rollout.causal import Trajectory
from salt_jax.types import Latent, Params, Prediction


def plan_replay(
    trajectory: Trajectory, policy: CachePolicy, live_cache: bool = False
) -> AttentionPlan:
    """What the chunks of a rollout saw, all at once: clean frames in its cache, their own as they
    are.

    `live_cache`: gradient also runs through the cache, straight through to the keys and values that
    its frames had at their exit steps. The peers' caches, overwritten in place, give that gradient.
    """
    cache, before = trajectory.cache, trajectory.before
    known = not before and not policy.period  # the numbers, before the program runs
    frames = np.arange(cache.slots) if known else cache.frames
    sizes = policy.sizes(cache.slots - before, before)
    groups = chunk_groups(policy, sizes, frames, before, clean="memory")
    live = before if live_cache else None
    return AttentionPlan(groups, KeysValues(cache.k, cache.v), frames[before:], live)


def replay(
    network: CausalDenoiser,
    params: Params,
    trajectory: Trajectory,
    cond: Cond,
    policy: CachePolicy,
) -> Prediction:
    """The exit steps of all chunks in one forward, with gradient to `params`."""
    plan = plan_replay(trajectory, policy)
    return network.denoise(params, trajectory.x, trajectory.sigma, cond, plan)


def read_clip(
    network: CausalDenoiser, params: Params, x0: Latent, cond: Cond, policy: CachePolicy
) -> KeysValues:
    """The clean keys and values of a whole clip in one pass: what committing its chunks one by one
    would cache.
    """
    return network.keys_values(params, x0, cond, plan_diffusion_forcing(x0.shape[1], policy))


def plan_teacher_forcing(
    network: CausalDenoiser, params: Params, x0: Latent, cond: Cond, policy: CachePolicy
) -> AttentionPlan:
    """Noisy chunks that see the clean ones before them. The gradient runs through both passes."""
    frames = np.arange(x0.shape[1])
    groups = chunk_groups(policy, policy.sizes(x0.shape[1]), frames, 0, clean="memory")
    return AttentionPlan(groups, read_clip(network, params, x0, cond, policy), frames)


def plan_diffusion_forcing(frames: int, policy: CachePolicy) -> AttentionPlan:
    """Chunks that see earlier ones as they are, clean or noisy (CausVid)."""
    numbers = np.arange(frames)
    groups = chunk_groups(policy, policy.sizes(frames), numbers, 0, clean="new")
    return AttentionPlan(groups, None, numbers)
