"""What a chunk sees of the video before it: the memory mechanism, and the cache that it reads, as
plain values.

A video is made chunk by chunk. The clean keys and values of finished chunks are kept; a chunk under
way reads them (`look_back`), and only when it is finished its own are added (`append`). Nothing
else changes a cache.

Keys are kept raw and turned to their rotary positions when they are read. So one cache serves
absolute positions (a frame keeps its number for ever) and relative ones (a frame's position is its
rank among the frames that are seen). Turning them again at every read is a few elementwise passes
beside two matrix products of the same keys.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.models.memory import CachePolicy


class View(NamedTuple):
    """How one run of new frames looks around: which frames it sees, and where in time everything
    stands.
    """

    queries: slice  # of the new frames: the ones that look
    own: tuple[slice, ...]  # new frames that are seen
    past: tuple[slice, ...]  # frames of the memory that are seen
    query_positions: Any  # int [queries]
    key_positions: Any  # int [own + past]
    # of the seen frames only the first so many count, int [] or [queries]; None: all
    length: Any = None


class Sight(NamedTuple):
    """What a network needs to know to see only a part: views that cover the new frames in order,
    and the memory.
    """

    views: tuple[View, ...]
    memory: Any  # (keys, values) [layers, B, M, S, A, d], or None
    frames: Any  # int [F], the new frames' numbers in the video


@flax.struct.dataclass
class KVCache:
    """Finished frames, oldest first. Slots that hold none yet are behind them."""

    k: Any  # [layers, B, slots, S, A, d], raw: not yet turned by rotary positions
    v: Any  # the same
    # float32 [B, slots, H, W, C], the frames themselves, to read them again under another text
    x0: Any
    frames: Any  # int32 [slots], the frames' numbers in the video
    filled: Any  # int32 [], how many slots hold a frame
    end: Any  # int32 [], frames of the video finished so far

    @property
    def slots(self) -> int:
        return self.frames.shape[0]


def append(cache: KVCache, keys_values: tuple[Any, Any], x0: Any, policy: CachePolicy) -> KVCache:
    """The cache with finished frames added. A full rolling cache forgets the oldest frames after
    the sink.

    A cache of a policy that forgets nothing must have room: callers know how many frames they ask
    for, see `refuse_overflow`.
    """
    c, total = x0.shape[1], cache.filled + x0.shape[1]
    slots = jnp.arange(cache.slots)
    kept = jnp.where(slots < policy.sink, slots, slots + jnp.maximum(total - cache.slots, 0))
    source = jnp.where(kept < cache.filled, kept, cache.slots + kept - cache.filled)

    def put(buffer, new, axis):
        new = new.astype(buffer.dtype)
        if not policy.window:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, cache.filled, axis)
        return jnp.take(jnp.concatenate([buffer, new], axis), source, axis, mode="clip")

    k, v = keys_values
    numbers = cache.end + jnp.arange(c, dtype=jnp.int32)
    return KVCache(
        k=put(cache.k, k, 2),
        v=put(cache.v, v, 2),
        x0=put(cache.x0, x0, 1),
        frames=put(cache.frames, numbers, 0),
        filled=jnp.minimum(total, cache.slots),
        end=cache.end + c,
    )


def more_room(cache: KVCache, empty: KVCache) -> KVCache:
    """`empty`, a cache with more slots, with those of `cache` in front.

    All slots of `cache` must be filled.
    """
    put = lambda buffer, old, axis: jax.lax.dynamic_update_slice_in_dim(
        buffer, old.astype(buffer.dtype), 0, axis
    )
    return replace(
        cache,
        k=put(empty.k, cache.k, 2),
        v=put(empty.v, cache.v, 2),
        x0=put(empty.x0, cache.x0, 1),
        frames=put(empty.frames, cache.frames, 0),
    )


def forget(cache: KVCache, policy: CachePolicy) -> KVCache:
    """A cache whose slots are all filled, cut down to what a video of any length needs: the sink
    and the end.
    """
    slots = policy.capacity(cache.slots)
    if slots >= cache.slots:
        return cache
    kept = np.r_[: policy.sink, cache.slots - slots + policy.sink : cache.slots]
    k, v = cache.k[:, :, kept], cache.v[:, :, kept]
    return KVCache(
        k, v, cache.x0[:, kept], cache.frames[kept], jnp.full((), slots, jnp.int32), cache.end
    )


def flush(cache: KVCache, policy: CachePolicy, keep: int) -> KVCache:
    """The sink and the last `keep` frames; the rest is forgotten (Infinity-RoPE's flush keeps 2).
    Reads nothing again.

    A cache that holds no more than these stays as it is.
    """
    slots = jnp.arange(cache.slots)
    source = jnp.where(
        slots < policy.sink, slots, slots + jnp.maximum(cache.filled - keep - policy.sink, 0)
    )
    put = lambda buffer, axis: jnp.take(buffer, source, axis, mode="clip")
    return replace(
        cache,
        k=put(cache.k, 2),
        v=put(cache.v, 2),
        x0=put(cache.x0, 1),
        frames=put(cache.frames, 0),
        filled=jnp.minimum(cache.filled, policy.sink + keep),
    )


def look_back(cache: KVCache, policy: CachePolicy, size: int, jump: Any = 0) -> Sight:
    """What the next chunk, of `size` frames, sees of a cache that may still be filling.

    `jump` moves the chunk's own positions ahead in time without moving what it sees
    (Infinity-RoPE's cut).
    """
    k, v, numbers, filled = cache.k, cache.v, cache.frames, cache.filled
    reach = policy.window - size if policy.window else cache.slots
    if reach < cache.slots:  # the cache keeps more than is seen: take the sink and the end
        slots = jnp.arange(reach)
        slots = jnp.where(slots < policy.sink, slots, slots + jnp.maximum(filled - reach, 0))
        k, v, numbers = jnp.take(k, slots, 2), jnp.take(v, slots, 2), numbers[slots]
        filled = jnp.minimum(filled, reach)
    frames = cache.end + jnp.arange(size, dtype=jnp.int32)
    relative = policy.positions == "relative"
    here = (filled + jnp.arange(size, dtype=jnp.int32) if relative else frames) + jump
    there = jnp.arange(len(numbers), dtype=jnp.int32) if relative else numbers
    everything = slice(0, len(numbers))
    # The chunk itself stands first, so that what counts is in front and empty slots are behind.
    view = View(
        slice(0, size),
        (slice(0, size),),
        (everything,),
        here,
        jnp.concatenate([here, there]),
        filled + size,
    )
    return Sight((view,), (k, v), frames)


def chunk_views(
    policy: CachePolicy,
    sizes: Sequence[int],
    frames: Any,
    before: int,
    clean: Literal["memory", "new"],
) -> tuple[View, ...]:
    """How all chunks of a clip look around at once, without a mask: one dense piece for each chunk.

    Args:
      policy: decides which earlier frames a chunk sees.
      sizes: frames of each new chunk.
      frames: int [before + new], the frames' numbers in the video, by slot.
      before: slots that were filled before the first new chunk; they are in the memory.
      clean: where chunks find the earlier ones: in the "memory", which holds the clean frames of
        all slots, each chunk seeing itself as it is (replay, teacher forcing); or among the "new"
        frames (the commit of many chunks).
    """
    views, start = [], before
    for size in sizes:
        stop = start + size
        earlier = policy.visible(start, stop)
        queries = slice(start - before, stop - before)
        if clean == "memory":
            own, past = (queries,), earlier
        else:
            own, past = (*(slice(s.start - before, s.stop - before) for s in earlier), queries), ()
        earlier_slots = np.concatenate(
            [np.arange(s.start, s.stop) for s in earlier] or [np.arange(0)]
        ).astype(int)
        if policy.positions == "relative":
            there, here = np.arange(len(earlier_slots)), len(earlier_slots) + np.arange(size)
        else:
            there, here = frames[earlier_slots], frames[start:stop]
        both = (here, there) if clean == "memory" else (there, here)
        xp = np if all(isinstance(p, np.ndarray) for p in both) else jnp
        views.append(View(queries, own, past, here, xp.concatenate(both)))
        start = stop
    return tuple(views)


def whole_clip(frames: int) -> Sight:
    """Everybody sees everybody: a bidirectional network."""
    all_of_it, positions = slice(0, frames), np.arange(frames)
    return Sight((View(all_of_it, (all_of_it,), (), positions, positions),), None, positions)
