"""Rotary positions over frames, rows and columns, as Wan 2.1 uses them.

A head of d features has c = d / 2 complex pairs, shared between the axes as c - 2 (c // 3) for
frames and c // 3 each for rows and columns. Pairs are interleaved: features (2j, 2j + 1) turn by
position * theta^(-2j / d_axis).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from salt_jax.models.cache_policy import MAX_FRAMES

THETA = 10_000.0


class Angles(NamedTuple):
    """Of the tokens of some frames, axis by axis, in float32.

    A program combines them when it turns something. A table of all tokens would be a constant in
    it, of megabytes.
    """

    frames: Float[Array | np.ndarray, "f c_f"]
    rows: Float[Array | np.ndarray, "h c"]
    columns: Float[Array | np.ndarray, "w c"]


def rope_angles(
    frames: Int[np.ndarray | Array, "f"], height: int, width: int, head_dim: int
) -> Angles:
    """Angles of all tokens of some frames, computed in float64.

    `frames` are the positions in time. Given as a traced array they are looked up in a table; those
    at or past `MAX_FRAMES` would then read its last row, so callers that count that far refuse
    first.
    """
    pairs = head_dim // 2
    side = pairs // 3
    if isinstance(frames, jax.Array):
        time = jnp.asarray(_turns(np.arange(MAX_FRAMES), pairs - 2 * side))[frames]
    else:
        time = _turns(frames, pairs - 2 * side)
    return Angles(time, _turns(np.arange(height), side), _turns(np.arange(width), side))


def _turns(places: Int[np.ndarray, "n"], pairs: int) -> Float[np.ndarray, "n pairs"]:
    """Angles along one axis."""
    return np.outer(places, THETA ** (-np.arange(pairs) / pairs)).astype(np.float32)


def by_token(angles: Angles) -> Float[Array, "f s p"]:
    """All pairs of all tokens, [F, H W, c]."""
    # Behind the barrier the compiler does not know the angles, so it cannot fold them into a table
    # again.
    time, rows, columns = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, angles))
    grid = (len(time), len(rows), len(columns))
    parts = (time[:, None, None], rows[None, :, None], columns[None, None])
    spread = [jnp.broadcast_to(x, (*grid, x.shape[-1])) for x in parts]
    return jnp.concatenate(spread, -1).reshape(grid[0], grid[1] * grid[2], -1)


def rotate(x: Float[Array, "b f s a d"], angles: Angles) -> Float[Array, "b f s a d"]:
    """Turns the pairs of queries or keys by their angles, in float32; returns the dtype of `x`."""
    twice = by_token(jax.tree.map(lambda a: jnp.repeat(a, 2, axis=-1), angles))[None, :, :, None, :]
    even = jnp.arange(x.shape[-1]) % 2 == 0
    wide = x.astype(jnp.float32)
    # Each one's partner. Taking every second element instead costs TPUs two buffers of odd width
    # (docs/scaling.md).
    other = jnp.where(even[None, None, None, None], -jnp.roll(wide, -1, -1), jnp.roll(wide, 1, -1))
    return (wide * jnp.cos(twice) + other * jnp.sin(twice)).astype(x.dtype)
