"""Cache alignment, Salt Eq. 11-12: a video made on a poor cache should relate its parts as one made
on a good cache.

Features z of a frozen network are compared by the cosines between all pairs of places of a frame,
not place by place:

    z^ = z / |z|          R[i, j] = <z^_i, z^_j>          one matrix for each frame      (11)
    loss = mean max(0, |R_low - R_reference| - margin)    over pairs and frames          (12)

Differences inside the margin are free. Frames are compared one after the other: at 480p a matrix
has 1560^2 entries, and those of all frames of a batch would not fit beside the networks.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from salt_jax.types import PerExample


def relations(features: Float[Array, "b s d"]) -> Float[Array, "b s s"]:
    """Cosines between all places of one frame, Eq. 11."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    unit = features * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
    return jnp.einsum("bid,bjd->bij", unit, unit)


def cache_alignment_loss(
    features: Float[Array, "b f s d"], reference: Float[Array, "b f s d"], margin: float
) -> tuple[PerExample, PerExample]:
    """Eq. 12, and the share of pairs outside the margin: the only ones that have a gradient.

    Args:
      features: of the video made with few steps, [B, F, S, D] for S places of F frames.
      reference: of the one made with twice as many from the same noise; gets no gradient.
      margin: delta, in cosines.

    Returns:
      ([B], [B]) float32.

    Raises:
      AssertionError: the two are not of one shape, which would broadcast.

    Two places at right angles, which the reference has parallel: 2 of 4 pairs are off by 1.

    >>> z = jnp.eye(2)[None, None]
    >>> [round(float(x[0]), 3) for x in cache_alignment_loss(z, jnp.ones_like(z), 0.1)]
    [0.45, 0.5]
    """
    chex.assert_rank(features, 4)
    chex.assert_equal_shape([features, reference])
    reference = jax.lax.stop_gradient(reference)

    @jax.checkpoint
    def frame(_, pair):
        low, high = (relations(z.astype(jnp.float32)) for z in pair)
        off = jnp.abs(low - high) - margin
        return None, (jnp.maximum(off, 0.0).mean((1, 2)), (off > 0).mean((1, 2), dtype=jnp.float32))

    by_frame = jnp.moveaxis(features, 1, 0), jnp.moveaxis(reference, 1, 0)
    _, (loss, active) = jax.lax.scan(frame, None, by_frame)
    return loss.mean(0), active.mean(0)
