"""Losses on clean estimates, for the stages that make a student causal before it is distilled."""

import chex
import jax
import jax.numpy as jnp

from salt_jax.types import Latent, PerExample


def endpoint_loss(x0: Latent, target: Latent) -> PerExample:
    """Mean squared error of a clean estimate, mean (x0 - stop(target))^2 over F H W C.

    The target is the end of the teacher's trajectory through the student's input (causal ODE
    regression: CausVid, arXiv:2412.07772, 3.3; Causal Forcing), or what the averaged student says
    one teacher step further along it (consistency distillation, Song et al. 2023,
    arXiv:2303.01469, Eq. 7 with the squared distance).

    Raises:
      AssertionError: the two are not of one shape, which would broadcast.

    >>> endpoint_loss(jnp.zeros((1, 1, 1, 1, 2)), jnp.array([1.0, 3.0]).reshape(1, 1, 1, 1, 2))
    Array([5.], dtype=float32)
    """
    chex.assert_rank(x0, 5)
    chex.assert_equal_shape([x0, target])
    x0, target = x0.astype(jnp.float32), jax.lax.stop_gradient(target.astype(jnp.float32))
    return ((x0 - target) ** 2).mean((1, 2, 3, 4))
