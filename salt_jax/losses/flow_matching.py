"""Flow matching: what a denoiser is trained with, be it the teacher on data or the critic on the
student's videos.
"""

import chex
import jax.numpy as jnp
import numpy as np

from salt_jax.flow.prediction import expand
from salt_jax.flow.schedule import shift
from salt_jax.types import Latent, PerExample, Sigma


def flow_matching_loss(
    velocity: Latent, x0: Latent, noise: Latent, weight: Sigma | None = None
) -> PerExample:
    """Mean squared error of a predicted velocity, mean w (v - (noise - x0))^2 over F H W C.

    Its minimiser is E[noise - x0 | x], the velocity of Salt Eq. 1. Unweighted (w = 1), as the
    critic's loss in DMD, unless a `weight` for each clip or frame is given, the one thing that
    broadcasts.

    Raises:
      AssertionError: the latents are not of one shape, or the weight is not [B] or [B, F] of it.

    >>> ones = jnp.ones((2, 1, 1, 1, 1))
    >>> flow_matching_loss(0 * ones, ones, ones)
    Array([0., 0.], dtype=float32)
    """
    chex.assert_rank(velocity, 5)
    chex.assert_equal_shape([velocity, x0, noise])
    velocity, x0, noise = (a.astype(jnp.float32) for a in (velocity, x0, noise))
    squared = (velocity - (noise - x0)) ** 2
    return (squared if weight is None else expand(weight, squared) * squared).mean((1, 2, 3, 4))


def midlevel_weight(sigma: Sigma, shift_amount: float) -> Sigma:
    """The weight of levels in teacher-forced diffusion, as Self-Forcing and Causal Forcing have it.

        w = (y - min y) / c,    y = exp(-2 (sigma - 1/2)^2),
        c: mean 1 over u = 1, 0.999 .. 0.001 under the shift

    It is 0 at sigma = 1: pure noise then has no weight in training.
    """
    levels = shift(1 - np.arange(1000) / 1000, shift_amount)
    table = np.exp(-2 * (levels - 0.5) ** 2)
    return (jnp.exp(-2 * (sigma - 0.5) ** 2) - table.min()) / (table - table.min()).mean()
