"""Rotary positions over frames, rows and columns, as Wan 2.1 uses them.

A head of d features has c = d / 2 complex pairs, shared between the axes as c - 2 (c // 3) for frames and
c // 3 each for rows and columns. Pairs are interleaved: features (2j, 2j + 1) turn by position * theta^(-2j / d_axis).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from salt_jax.models.memory import MAX_FRAMES

THETA = 10_000.0


def rope_angles(
    frames: Int[np.ndarray | Array, "f"], height: int, width: int, head_dim: int
) -> Float[np.ndarray | Array, "f s p"]:
    """Angles of all tokens of some frames, float32 [F, height * width, head_dim / 2], computed in float64.

    `frames` are the positions in time. Given as a traced array they are looked up in a table; those at or past
    `MAX_FRAMES` would then read its last row, so callers that count that far refuse first.
    """
    pairs = head_dim // 2
    side = pairs // 3
    axis = lambda places, n: np.outer(places, THETA ** (-np.arange(n) / n)).astype(np.float32)
    grid = (len(frames), height, width)
    if isinstance(frames, jax.Array):
        time, xp = jnp.asarray(axis(np.arange(MAX_FRAMES), pairs - 2 * side))[frames], jnp
    else:
        time, xp = axis(frames, pairs - 2 * side), np
    parts = (
        xp.broadcast_to(time[:, None, None], (*grid, pairs - 2 * side)),
        np.broadcast_to(axis(np.arange(height), side)[None, :, None], (*grid, side)),
        np.broadcast_to(axis(np.arange(width), side)[None, None, :], (*grid, side)),
    )
    return xp.concatenate(parts, -1).reshape(len(frames), height * width, pairs)


def rotate(
    x: Float[Array, "b f s a d"], angles: Float[np.ndarray | Array, "f s p"]
) -> Float[Array, "b f s a d"]:
    """Turns the pairs of queries or keys by their angles, in float32; returns the dtype of `x`."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    angles = jnp.asarray(angles)[None, :, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
