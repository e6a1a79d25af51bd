"""The KV cache that a video is made on, as a plain value.

A video is made chunk by chunk. The clean keys and values of finished chunks are stored; a chunk
under way reads them (`plan_next_chunk`), and only when it is finished its own are added (`append`).
Nothing else changes a cache.

Keys are stored raw and turned to their rotary positions when they are read. So one cache serves
absolute positions (a frame keeps its number for ever), cyclic ones, and relative ones (a frame's
position is its rank among the frames that are seen). Turning them again at every read is a few
elementwise passes beside two matrix products of the same keys.
"""

from collections.abc import Callable
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.visibility import AttentionPlan, KeysValues, QueryGroup, in_time
from salt_jax.types import Latent, Leaf

SLOT_AXES = {"k": 2, "v": 2, "x0": 1, "frames": 0}


@flax.struct.dataclass
class KVCache:
    """Finished frames. Slots that hold none yet are behind them. Oldest first, until a full one
    that forgets writes over its oldest; their numbers tell (`by_age`).
    """

    k: Leaf  # [layers, B, slots, S, A, d], raw: not yet turned by rotary positions
    v: Leaf  # the same
    # float32 [B, slots, H, W, C], the frames themselves, to read them again under another prompt
    x0: Leaf
    frames: Leaf  # int32 [slots], the frames' numbers in the video
    filled: Leaf  # int32 [], how many slots hold a frame
    end: Leaf  # int32 [], number of the next frame

    @property
    def slots(self) -> int:
        return self.frames.shape[0]


def map_slots(f: Callable[..., Array], cache: KVCache, *others: KVCache) -> KVCache:
    """`cache` with f(axis of the slots, its array, those of the others) for each array of slots."""
    arrays = {
        name: f(axis, *(getattr(c, name) for c in (cache, *others)))
        for name, axis in SLOT_AXES.items()
    }
    return replace(cache, **arrays)


def append(cache: KVCache, new: KeysValues, x0: Latent, policy: CachePolicy) -> KVCache:
    """The cache with finished frames added, each in the place of the oldest behind the sink once
    all slots are filled: nothing else is moved or copied where the cache is donated.

    A cache of a policy that drops nothing must have room: callers know how many frames they ask
    for, see `refuse_overflow`.
    """
    count, ring = x0.shape[1], cache.slots - policy.sink if policy.window else 0
    oldest = policy.sink + jnp.argmin(cache.frames[policy.sink :]) if ring > 0 else 0
    start = jnp.where(cache.filled < cache.slots, cache.filled, oldest)

    def put(axis, old, new):
        new = new.astype(old.dtype)
        if not policy.window:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
        for i in range(count if cache.slots else 0):
            slot, frame = start + i, jax.lax.slice_in_dim(new, i, i + 1, axis=axis)
            if ring > 0:
                again = policy.sink + (slot - cache.slots) % ring
                slot = jnp.where(slot < cache.slots, slot, again)
            else:  # a full sink and nothing else is kept
                there = jax.lax.dynamic_slice_in_dim(old, slot, 1, axis)
                frame = jnp.where(cache.filled + i < cache.slots, frame, there)
            old = jax.lax.dynamic_update_slice_in_dim(old, frame, slot, axis)
        return old

    numbers = cache.end + jnp.arange(count, dtype=jnp.int32)
    added = replace(cache, k=new.k, v=new.v, x0=x0, frames=numbers)
    return replace(
        map_slots(put, cache, added),
        filled=jnp.minimum(cache.filled + count, cache.slots),
        end=cache.end + count,
    )


def by_age(cache: KVCache) -> Int[Array, "_"]:
    """Slots from the oldest frame to the newest, those without one behind."""
    empty = jnp.arange(cache.slots) >= cache.filled
    return jnp.argsort(jnp.where(empty, jnp.iinfo(jnp.int32).max, cache.frames))


def take_slots(cache: KVCache, slots: Int[Array | np.ndarray, "_"]) -> KVCache:
    """The frames of these slots, in this order."""
    return map_slots(lambda axis, x: jnp.take(x, slots, axis, mode="clip"), cache)


def grow(cache: KVCache, empty: KVCache) -> KVCache:
    """`empty`, a cache with more slots, with those of `cache`, all of them filled, in front."""

    def put(axis, old, buffer):
        return jax.lax.dynamic_update_slice_in_dim(buffer, old.astype(buffer.dtype), 0, axis)

    return map_slots(put, cache, empty)


def trim(cache: KVCache, policy: CachePolicy) -> KVCache:
    """A cache whose slots are all filled, cut down to what a video of any length needs: the sink
    and the end.
    """
    slots = policy.capacity(cache.slots)
    if slots >= cache.slots:
        return cache
    kept = np.r_[: policy.sink, cache.slots - slots + policy.sink : cache.slots]

    def cut(axis, x):
        return x[(slice(None),) * axis + (kept,)]

    return replace(map_slots(cut, cache), filled=jnp.full((), slots, jnp.int32))


def flush(cache: KVCache, policy: CachePolicy, keep: int) -> KVCache:
    """The sink and the last `keep` frames; the rest is dropped (Infinity-RoPE's flush keeps 2).
    Reads nothing again.

    A cache that holds no more than these stays as it is.
    """
    slots = jnp.arange(cache.slots)
    source = jnp.where(
        slots < policy.sink, slots, slots + jnp.maximum(cache.filled - keep - policy.sink, 0)
    )
    moved = take_slots(cache, jnp.take(by_age(cache), source, mode="clip"))
    return replace(moved, filled=jnp.minimum(cache.filled, policy.sink + keep))


def plan_next_chunk(
    cache: KVCache, policy: CachePolicy, size: int, jump: int | Int[Array, ""] = 0
) -> AttentionPlan:
    """What the next chunk, of `size` frames, sees of a cache that may still be filling.

    `jump` moves the chunk's own positions ahead in time without moving what it sees
    (Infinity-RoPE's cut).
    """
    k, v, numbers, filled = cache.k, cache.v, cache.frames, cache.filled
    reach = policy.window - size if policy.window else cache.slots
    order = by_age(cache)
    if reach < cache.slots:  # the cache holds more than is seen: take the sink and the end
        ranks = jnp.arange(reach, dtype=jnp.int32)
        seen = jnp.where(ranks < policy.sink, ranks, ranks + jnp.maximum(filled - reach, 0))
        seen = order[seen]
        k, v, numbers = jnp.take(k, seen, 2), jnp.take(v, seen, 2), numbers[seen]
        filled = jnp.minimum(filled, reach)
    else:
        ranks = jnp.argsort(order).astype(jnp.int32)
    frames = cache.end + jnp.arange(size, dtype=jnp.int32)
    here = in_time(policy, frames, filled + jnp.arange(size, dtype=jnp.int32)) + jump
    there = in_time(policy, numbers, ranks)
    everything = slice(0, len(numbers))
    # The chunk itself stands first, so that what counts is in front and empty slots are behind.
    group = QueryGroup(
        slice(0, size),
        (slice(0, size),),
        (everything,),
        here,
        jnp.concatenate([here, there]),
        size + filled,
    )
    return AttentionPlan((group,), KeysValues(k, v), frames)
