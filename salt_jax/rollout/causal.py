"""Chunk by chunk on a KV cache: read, commit, roll out, replay. Training and streaming share this.

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
from itertools import groupby
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from salt_jax.choices import ReferenceNoise, Solver
from salt_jax.flow.transition import euler, renoise
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import CausalDenoiser, Cond
from salt_jax.models.kv_cache import (
    KVCache,
    append,
    by_age,
    grow,
    plan_next_chunk,
    take_slots,
)
from salt_jax.models.visibility import AttentionPlan, KeysValues, QueryGroup, in_time
from salt_jax.rollout.parallel import noise_at
from salt_jax.types import Conditioning, Latent, Leaf, Params, Prediction, Sigma


@flax.struct.dataclass
class Steps:
    """The denoising steps of a chunk."""

    levels: Leaf  # float32 [n], falling from 1; entries past the exit step are not looked at
    # int [] in [0, n), may be traced: the step whose output is the chunk; K - 1 for samples
    exit_step: Leaf
    # "cm" re-noises with noise of its own for each level and frame
    solver: Solver = flax.struct.field(pytree_node=False)
    first: "Steps | None" = None  # of a video's first chunk, where they are not those of the others
    # of "cm", after the first level
    noise: ReferenceNoise = flax.struct.field(pytree_node=False, default="shared")
    # noise level of the frames that are committed; the network takes them for clean
    context_noise: float = flax.struct.field(pytree_node=False, default=0.0)
    # whether what the exit step reads is kept, see `CachePolicy.context`
    keep: bool = flax.struct.field(pytree_node=False, default=False)


class ChunkSpec(NamedTuple):
    """What is static in a chunk."""

    size: int
    policy: CachePolicy


class Origin(NamedTuple):
    """What a video continues from."""

    cond: Conditioning
    cache: KVCache | None = None  # every slot of it filled; None starts a video
    # int [], number of a video's first frame, whole chunks: 0, or of cyclic positions any
    start: Int[Array, ""] | np.int32 | int = 0


class Trajectory(NamedTuple):
    """The result of a rollout. Nothing in it has a gradient."""

    x: Latent  # each chunk before its exit step
    sigma: Sigma  # float32 [B, F], the exit step's level of each frame
    x0: Latent  # what the exit steps predicted; the clean frames that were committed
    cache: KVCache

    @property
    def before(self) -> int:
        """Slots of the cache that were filled when the rollout began."""
        return self.cache.slots - self.x.shape[1]


def other_keys(keys: Key[Array, "b"]) -> Key[Array, "b"]:
    """Of noise that has nothing to do with that of `keys`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)


def generate_chunk(
    network: CausalDenoiser,
    params: Params,
    plan: AttentionPlan,
    cond: Cond,
    steps: Steps,
    keys: Key[Array, "b"],
    picture: tuple[int, ...],
) -> tuple[Latent, Latent, KeysValues | None]:
    """One chunk from noise: its state before the exit step, the clean estimate of that step, and
    where they are kept the keys and values that it read.

    Args:
      plan: of `plan_next_chunk`.
      keys: [B], one for each video; all its noise comes from it.
      picture: (H, W, C), static.
    """
    b, levels, others = len(keys), steps.levels, other_keys(keys)

    def at(i):
        return jnp.full(b, levels[i])

    def arrive(i, x, said):
        """The state at level i, from the previous prediction; one place draws noise, so it compiles
        once.
        """
        along = euler(x, said.velocity, at(jnp.maximum(i - 1, 0)), at(i))
        if steps.solver == "euler":
            return along
        draw = jnp.where(i == 0, keys, others) if steps.noise == "own" else keys
        x = renoise(said.x0, noise_at(draw, levels[i], plan.frames, picture), at(i))
        return jnp.where(i % 2 == 1, along, x) if steps.noise == "euler_between" else x

    def step(i, states):
        x = arrive(i, *states)
        return x, network.denoise(params, x, at(i), cond, plan)

    # Before the first step nothing was predicted: the state at level 1 is noise, by either solver.
    nothing = jnp.zeros((b, len(plan.frames), *picture))
    start = noise_at(keys, levels[0], plan.frames, picture) if steps.solver != "cm" else nothing
    first = (start, Prediction(nothing, nothing))
    x, said = jax.lax.fori_loop(0, steps.exit_step + (not steps.keep), step, first)
    if not steps.keep:
        return x, said.x0, None
    x = arrive(steps.exit_step, x, said)
    said, kept = network.denoise_and_keep(params, x, at(steps.exit_step), cond, plan)
    return x, said.x0, kept


def commit(
    network: CausalDenoiser,
    params: Params,
    cache: KVCache,
    x0: Latent,
    cond: Cond,
    policy: CachePolicy,
    seen: Latent | None = None,
) -> KVCache:
    """The clean pass: frames get into a cache as they are. They see what the chunk saw.

    `seen`: what the network reads in the frames' place, with a little noise.
    """
    plan = plan_next_chunk(cache, policy, x0.shape[1])
    read = network.keys_values(params, x0 if seen is None else seen, cond, plan)
    return append(cache, read, x0, policy)


def extend(
    network: CausalDenoiser,
    params: Params,
    cache: KVCache,
    cond: Cond,
    steps: Steps,
    call: tuple[Key[Array, "b"], int | Int[Array, ""]],
    spec: ChunkSpec,
) -> tuple[Latent, Latent, KVCache]:
    """The next chunk of a video: its state before the exit step, the clean estimate of that step,
    and the cache with it. `call` is (keys, how far it jumps ahead in time).
    """
    (keys, jump), policy = call, spec.policy
    plan = plan_next_chunk(cache, policy, spec.size, jump)
    steps = replace(steps, keep=not policy.clean_pass)
    picture = cache.x0.shape[2:]
    x, x0, kept = generate_chunk(network, params, plan, cond, steps, keys, picture)
    if kept is not None:
        return x, x0, append(cache, kept, x0, policy)
    seen = x0
    if steps.context_noise:
        noise = noise_at(other_keys(keys), jnp.float32(0), plan.frames, picture)
        seen = renoise(x0, noise, jnp.full(len(keys), steps.context_noise))
    return x, x0, commit(network, params, cache, x0, cond, policy, seen)


def recache(
    network: CausalDenoiser, params: Params, cache: KVCache, cond: Cond, policy: CachePolicy
) -> KVCache:
    """The same frames read again under another prompt (LongLive's prompt switch), as `commit` would
    have read them.

    A frame sees its own chunk and the ones before it, as far as they are in the cache: what was
    dropped is not seen again. Chunks are found by the frames' numbers, so nothing depends on how
    full the cache is or where it was cut. Where nothing was dropped, reading under the same prompt
    changes nothing but what was kept of noisy states, which are gone: all are read clean.
    """
    if not cache.slots:
        return cache
    cache = take_slots(cache, by_age(cache))  # so that what a frame may see stands in front of it
    slots = jnp.arange(cache.slots, dtype=jnp.int32)
    chunk = jnp.where(
        cache.frames < policy.first, 0, 1 + (cache.frames - policy.first) // policy.chunk
    )
    earlier = chunk[None] <= chunk[:, None]
    seen = jnp.sum(earlier & (slots < cache.filled)[None], axis=1)
    seen = jnp.maximum(seen, 1)  # an empty slot sees something, or it would hold NaN
    positions = in_time(policy, cache.frames, slots)
    everything = slice(0, cache.slots)
    group = QueryGroup(everything, (everything,), (), positions, positions, seen)
    plan = AttentionPlan((group,), None, cache.frames)
    k, v = network.keys_values(params, cache.x0, cond, plan)
    return replace(cache, k=k, v=v)


def rollout(
    network: CausalDenoiser,
    params: Params,
    origin: Origin,
    steps: Steps,
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
    policy: CachePolicy,
) -> Trajectory:
    """Makes the next frames of a video, all of them without gradient.

    Args:
      keys: [B], as in `generate_chunk`.
      shape: (F, H, W, C) of the frames to make, static.

    Raises:
      ValueError: the frames do not split into chunks.
    """
    params, cond = jax.lax.stop_gradient((params, origin.cond))
    frames, before = shape[0], 0 if origin.cache is None else origin.cache.slots
    sizes = policy.sizes(frames, before)
    empty = network.empty_cache(len(keys), before + frames, shape[1:])
    empty = replace(empty, end=jnp.asarray(origin.start, jnp.int32))
    cache = empty if origin.cache is None else grow(origin.cache, empty)
    read = network.read(params, cond)

    def make(size: int, steps: Steps):
        def body(cache, _):
            spec = ChunkSpec(size, policy)
            x, x0, cache = extend(network, params, cache, read, steps, (keys, 0), spec)
            return cache, (x, x0)

        return body

    made, sigmas = [], []
    for size, own, count in _runs(sizes, steps, first=not before):
        cache, parts = jax.lax.scan(make(size, own), cache, None, length=count)
        parts = (jnp.moveaxis(p, 0, 1) for p in parts)  # [B, chunks, f, H, W, C]
        made.append([p.reshape(len(keys), -1, *p.shape[3:]) for p in parts])
        sigmas.append(jnp.full((len(keys), size * count), own.levels[own.exit_step]))
    x, x0 = (jnp.concatenate(parts, axis=1) for parts in zip(*made, strict=True))
    return jax.lax.stop_gradient(Trajectory(x, jnp.concatenate(sigmas, axis=1), x0, cache))


def _runs(sizes: tuple[int, ...], steps: Steps, first: bool) -> list[tuple[int, Steps, int]]:
    """Chunks of one size and schedule that follow each other, as (size, steps, how many).

    `first`: whether the first chunk begins a video.
    """
    own = [first and i == 0 and steps.first is not None for i in range(len(sizes))]
    runs = [(key, len(list(run))) for key, run in groupby(zip(sizes, own, strict=True))]
    return [
        (size, steps.first if alone and steps.first else steps, count)
        for (size, alone), count in runs
    ]
