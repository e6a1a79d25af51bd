"""Rotary positions over frames, rows and columns, as Wan 2.1 uses them.

A head of d features has c = d / 2 complex pairs, shared between the axes as c - 2 (c // 3) for frames and
c // 3 each for rows and columns. Pairs are interleaved: features (2j, 2j + 1) turn by position * theta^(-2j / d_axis).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10_000.0


def rope_angles(frames: int, height: int, width: int, head_dim: int) -> np.ndarray:
    """Angles of every token, float32 [frames, height * width, head_dim / 2], computed in float64."""
    pairs = head_dim // 2
    side = pairs // 3

    def axis(length, n):
        return np.outer(np.arange(length), THETA ** (-np.arange(n) / n))  # [length, n]

    grid = (frames, height, width)
    parts = (
        np.broadcast_to(axis(frames, pairs - 2 * side)[:, None, None], (*grid, pairs - 2 * side)),
        np.broadcast_to(axis(height, side)[None, :, None], (*grid, side)),
        np.broadcast_to(axis(width, side)[None, None, :], (*grid, side)),
    )
    return np.concatenate(parts, -1).reshape(frames, height * width, pairs).astype(np.float32)


def rotate(x: Float[Array, "b l a d"], angles: Float[Array, "l p"]) -> Float[Array, "b l a d"]:
    """Turns the pairs of queries or keys by their angles, in float32; returns the dtype of `x`."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
