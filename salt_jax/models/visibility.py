"""Which frames attend to which, and their positions in time: attention without a mask.

New frames are cut into groups; each attends densely to a run of new frames and of the memory's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from salt_jax.models.cache_policy import CachePolicy

Positions = Int[Array | np.ndarray, "_"]


class QueryGroup(NamedTuple):
    """A run of new frames that see the same frames."""

    queries: slice  # of the new frames
    own: tuple[slice, ...]  # new frames that are seen
    past: tuple[slice, ...]  # frames of the memory that are seen
    query_positions: Positions  # [queries]
    key_positions: Positions  # [own + past]
    # only so many of the seen frames, from the first, are attended to, [] or [queries]; None: all
    length: Int[Array, "..."] | None = None


class KeysValues(NamedTuple):
    """Of frames, in every layer or, inside of one, in that: raw, keys not yet turned by rotary
    positions.
    """

    k: Float[Array, "*layers b f s a d"]
    v: Float[Array, "*layers b f s a d"]


class AttentionPlan(NamedTuple):
    """What the new frames of one evaluation see: groups that cover them in order, and memory."""

    groups: tuple[QueryGroup, ...]
    memory: KeysValues | None
    frames: Positions  # [F], the new frames' numbers in the video
    # Slot of the memory from which on it holds the new frames, clean; these slots then pass
    # gradient to the new frames' own, noisy, keys and values, straight through. None: no gradient.
    live_from: int | None = None


def in_time(policy: CachePolicy, numbers: Positions, ranks: Positions) -> Positions:
    """Where frames that are seen together stand, by their numbers in the video and their ranks
    among each other.
    """
    if policy.positions == "relative":
        return ranks
    return numbers % policy.period if policy.period else numbers


def plan_whole_clip(frames: int) -> AttentionPlan:
    """Every frame sees every frame: a bidirectional network."""
    all_of_it, positions = slice(0, frames), np.arange(frames)
    group = QueryGroup(all_of_it, (all_of_it,), (), positions, positions)
    return AttentionPlan((group,), None, positions)


def chunk_groups(
    policy: CachePolicy,
    sizes: Sequence[int],
    frames: Positions,
    before: int,
    clean: Literal["memory", "new"],
) -> tuple[QueryGroup, ...]:
    """All chunks of a clip at once: one group for each chunk.

    Args:
      policy: decides which earlier frames a chunk sees.
      sizes: frames of each new chunk.
      frames: int [before + new], the frames' numbers in the video, by slot.
      before: slots that were filled before the first new chunk; they are in the memory.
      clean: where chunks find the earlier ones: in the "memory", which holds the clean frames of
        all slots, each chunk seeing itself as it is (replay, teacher forcing); or among the "new"
        frames (the commit of many chunks).
    """
    groups, start = [], before
    for size in sizes:
        stop = start + size
        earlier = policy.visible(start, stop)
        queries = slice(start - before, stop - before)
        if clean == "memory":
            own, past = (queries,), earlier
        else:
            own = (*(slice(s.start - before, s.stop - before) for s in earlier), queries)
            past = ()
        slots = np.array([i for s in earlier for i in range(s.start, s.stop)], int)
        there = in_time(policy, frames[slots], np.arange(len(slots)))
        here = in_time(policy, frames[start:stop], len(slots) + np.arange(size))
        both = (here, there) if clean == "memory" else (there, here)
        xp = np if all(isinstance(p, np.ndarray) for p in both) else jnp
        groups.append(QueryGroup(queries, own, past, here, xp.concatenate(both)))
        start = stop
    return tuple(groups)


def chunk_pairs(policy: CachePolicy, frames: int, before: int = 0) -> list[tuple[int, int]]:
    """(new frames, seen frames) of each chunk of the next `frames` of a video with `before`."""
    sizes = policy.sizes(frames, before)
    stops = (before + np.cumsum(sizes)).tolist()
    pairs = []
    for new, stop in zip(sizes, stops, strict=True):
        earlier = policy.visible(stop - new, stop)
        pairs.append((new, new + sum(s.stop - s.start for s in earlier)))
    return pairs
