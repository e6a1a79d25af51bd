"""Chunk by chunk on a KV cache: read, commit, roll out, replay. Training and streaming share this
code.

A rollout's gradient touches each chunk once, at its exit step, and never flows through the cache.
So

    trajectory = rollout(...)    all chunks without gradient: the state of each before its exit
                                 step, and the cache
    video      = replay(...)     the exit steps of all chunks in one differentiable forward, which
                                 reads that cache

which equals the sequential computation: a chunk of the replay sees its own frames as they are,
noisy, and earlier ones as the cache has them, clean.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.flow.transition import euler, renoise
from salt_jax.models.denoiser import Network
from salt_jax.models.kv_cache import (
    CachePolicy,
    KVCache,
    Sight,
    View,
    append,
    chunk_views,
    look_back,
    more_room,
)
from salt_jax.rollout.parallel import Solver, noise_at
from salt_jax.types import Latent, Params, Prediction


class Trajectory(NamedTuple):
    """What a rollout leaves behind. Nothing in it carries a gradient."""

    x: Latent  # each chunk before its exit step
    sigma: Any  # float32 [B, F], the exit step's level of each frame
    x0: Latent  # what the exit steps said; the clean frames that were committed
    cache: KVCache

    @property
    def before(self) -> int:
        """Slots of the cache that were filled when the rollout began."""
        return self.cache.slots - self.x.shape[1]


def generate_chunk(
    network: Network,
    params: Params,
    cache: KVCache,
    text: Any,
    levels: Any,
    exit_step: Any,
    solver: Solver,
    keys: Any,
    size: int,
    policy: CachePolicy,
    jump: Any = 0,
) -> tuple[Latent, Latent]:
    """One chunk from noise: its state before the exit step, and the clean estimate of that
    update.

    Args:
      text: one for each video, as embedding or as `Network.read_text` gave it.
      levels: float32 [n], falling from 1; entries past the exit step are not looked at.
      exit_step: int in [0, n), may be traced: the update whose output is kept. K - 1 for samples.
      solver: static; "cm" re-noises with noise of its own for each level and frame.
      keys: [B], one for each video; all its noise comes from it.
      size: frames of the chunk, static.
      jump: see `models.kv_cache.look_back`.
    """
    sight = look_back(cache, policy, size, jump)
    b, shape = cache.x0.shape[0], cache.x0.shape[2:]
    denoise = lambda x, sigma: network.denoise(params, x, jnp.full(b, sigma), text, sight)

    def arrive(i, x, said):
        """The state at level i, given what was said of the one before; one place draws noise, so it
        compiles once.
        """
        if solver == "cm":
            return renoise(
                said.x0, noise_at(keys, levels[i], sight.frames, shape), jnp.full(b, levels[i])
            )
        return euler(
            x, said.velocity, jnp.full(b, levels[jnp.maximum(i - 1, 0)]), jnp.full(b, levels[i])
        )

    def update(i, states):
        x = arrive(i, *states)
        return x, denoise(x, levels[i])

    # Before the first update nothing was said: the state at level 1 is noise, by either solver.
    nothing = jnp.zeros((b, size, *shape))
    x = nothing if solver == "cm" else noise_at(keys, levels[0], sight.frames, shape)
    x, said = jax.lax.fori_loop(0, exit_step + 1, update, (x, Prediction(nothing, nothing)))
    return x, said.x0


def commit(
    network: Network, params: Params, cache: KVCache, x0: Latent, text: Any, policy: CachePolicy
) -> KVCache:
    """The clean pass: the only way frames get into a cache. They see what the chunk saw."""
    sight = look_back(cache, policy, x0.shape[1])
    return append(cache, network.keys_values(params, x0, text, sight), x0, policy)


def recache(
    network: Network, params: Params, cache: KVCache, text: Any, policy: CachePolicy
) -> KVCache:
    """The same frames read again under another text (LongLive's prompt switch), as `commit` would
    have read them.

    A frame sees its own chunk and the ones before it, as far as they are in the cache: what was
    forgotten is not seen again. Chunks are found by the frames' numbers, so nothing depends on how
    full the cache is or where it was cut. Where nothing was forgotten, reading under the same text
    changes nothing.
    """
    if not cache.slots:
        return cache
    slots = jnp.arange(cache.slots, dtype=jnp.int32)
    chunk = jnp.where(
        cache.frames < policy.first, 0, 1 + (cache.frames - policy.first) // policy.chunk
    )
    earlier = chunk[None] <= chunk[:, None]
    seen = jnp.sum(earlier & (slots < cache.filled)[None], axis=1)
    seen = jnp.maximum(seen, 1)  # an empty slot sees something, or it would hold NaN
    positions = slots if policy.positions == "relative" else cache.frames
    everything = slice(0, cache.slots)
    view = View(everything, (everything,), (), positions, positions, seen)
    k, v = network.keys_values(params, cache.x0, text, Sight((view,), None, cache.frames))
    return replace(cache, k=k, v=v)


def rollout(
    network: Network,
    params: Params,
    text: Any,
    levels: Any,
    exit_step: Any,
    solver: Solver,
    keys: Any,
    shape: tuple[int, ...],
    policy: CachePolicy,
    cache: KVCache | None = None,
    first: tuple[Any, Any] | None = None,
) -> Trajectory:
    """Makes the next frames of a video, all of them without gradient.

    Args:
      shape: (F, H, W, C) of the frames to make, static.
      cache: what to go on from, every slot of it filled; None starts a video. Others as in
        `generate_chunk`.
      first: levels and exit step of the video's first chunk, where they are not those of the
        others.

    Raises:
      ValueError: the frames do not split into chunks.
    """
    params, text = jax.lax.stop_gradient((params, text))
    frames, before = shape[0], 0 if cache is None else cache.slots
    sizes = policy.sizes(frames, before)
    empty = network.empty_cache(jnp.zeros((len(keys), 0, *shape[1:])), before + frames)
    cache = empty if cache is None else more_room(cache, empty)
    read = network.read_text(params, text)

    def make(size, levels, exit_step):
        def body(cache, _):
            x, x0 = generate_chunk(
                network, params, cache, read, levels, exit_step, solver, keys, size, policy
            )
            return commit(network, params, cache, x0, read, policy), (x, x0)

        return body

    schedule, made, sigmas = (levels, exit_step), [], []
    for size, count, (grid, last) in _runs(sizes, schedule, None if before else first):
        cache, parts = jax.lax.scan(make(size, grid, last), cache, None, length=count)
        in_order = lambda p: jnp.moveaxis(p, 0, 1).reshape(p.shape[1], -1, *p.shape[3:])
        made.append(jax.tree.map(in_order, parts))
        sigmas.append(jnp.full((len(keys), size * count), grid[last]))
    x, x0 = (jnp.concatenate(parts, axis=1) for parts in zip(*made, strict=True))
    return jax.lax.stop_gradient(Trajectory(x, jnp.concatenate(sigmas, axis=1), x0, cache))


def sight_of(trajectory: Trajectory, policy: CachePolicy) -> Sight:
    """How the chunks of a rollout looked around, all at once: clean frames from its cache, their
    own as they are.
    """
    cache, before = trajectory.cache, trajectory.before
    frames = cache.frames if before else np.arange(cache.slots)
    sizes = policy.sizes(cache.slots - before, before)
    views = chunk_views(policy, sizes, frames, before, clean="memory")
    return Sight(views, (cache.k, cache.v), frames[before:])


def replay(
    network: Network, params: Params, trajectory: Trajectory, text: Any, policy: CachePolicy
) -> Prediction:
    """The exit steps of all chunks in one forward, with gradient to `params`."""
    return network.denoise(
        params, trajectory.x, trajectory.sigma, text, sight_of(trajectory, policy)
    )


def read_clip(
    network: Network, params: Params, x0: Latent, text: Any, policy: CachePolicy
) -> tuple[Any, Any]:
    """The clean keys and values of a whole clip in one pass: what committing its chunks one by one
    would cache.
    """
    frames = np.arange(x0.shape[1])
    views = chunk_views(policy, policy.sizes(x0.shape[1]), frames, 0, clean="new")
    return network.keys_values(params, x0, text, Sight(views, None, frames))


def teacher_forcing(
    network: Network, params: Params, x0: Latent, text: Any, policy: CachePolicy
) -> Sight:
    """The sight of noisy chunks that see the clean ones before them.

    Gradient runs through the clean pass too.
    """
    frames = np.arange(x0.shape[1])
    views = chunk_views(policy, policy.sizes(x0.shape[1]), frames, 0, clean="memory")
    return Sight(views, read_clip(network, params, x0, text, policy), frames)


def diffusion_forcing(frames: int, policy: CachePolicy) -> Sight:
    """The sight of chunks that see earlier ones as they are, noisy (CausVid)."""
    numbers = np.arange(frames)
    return Sight(chunk_views(policy, policy.sizes(frames), numbers, 0, clean="new"), None, numbers)


def _runs(sizes, others, first):
    """Chunks of one size and schedule that follow each other:
    [1, 3, 3] -> [(1, 1, schedule), (3, 2, schedule)].
    """
    schedules = [first or others] + [others] * (len(sizes) - 1)
    runs = []
    for size, schedule in zip(sizes, schedules, strict=True):
        if runs and runs[-1][0] == size and runs[-1][2] is schedule:
            runs[-1] = (size, runs[-1][1] + 1, schedule)
        else:
            runs.append((size, 1, schedule))
    return runs
