"""Flow matching: what a denoiser is trained with, be it the teacher on data or the critic on the student's videos."""

import jax.numpy as jnp

from salt_jax.types import Latent, PerExample


def flow_matching_loss(velocity: Latent, x0: Latent, noise: Latent) -> PerExample:
    """Mean squared error of a predicted velocity, mean (v - (noise - x0))^2 over F H W C.

    Its minimiser is E[noise - x0 | x], the velocity of Salt Eq. 1. Unweighted, as the critic's loss in DMD.

    >>> flow_matching_loss(jnp.zeros((2, 1, 1, 1, 1)), jnp.ones((2, 1, 1, 1, 1)), jnp.ones((2, 1, 1, 1, 1)))
    Array([0., 0.], dtype=float32)
    """
    velocity, x0, noise = (a.astype(jnp.float32) for a in (velocity, x0, noise))
    return ((velocity - (noise - x0)) ** 2).mean((1, 2, 3, 4))
