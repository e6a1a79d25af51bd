"""The loss of shortcut models (Frans et al. 2024, arXiv:2410.12557): a large update should do what
two smaller ones do, the smallest what the teacher says. Salt, Fig. 2, sets it beside SC-DMD.

Theirs tells the network the size of its update. Ours has no such input: the level says which update
it is, because each level of the training grid has one end, the next level of inference below it.
"""

import chex
import jax
import jax.numpy as jnp

from salt_jax.flow.prediction import expand
from salt_jax.types import Latent, PerExample, Sigma


def shortcut_loss(
    v_s: Latent,
    v_m: Latent,
    v_teacher: Latent,
    sigma_s: Sigma,
    sigma_m: Sigma,
    sigma_e: Sigma,
) -> PerExample:
    """Mean (v_s - stop(target))^2 over F H W C. The target is the velocity of two updates in one,

        ((sigma_s - sigma_m) v_s + (sigma_m - sigma_e) v_m) / (sigma_s - sigma_e),

    and where no level lies between the two, the teacher's.

    Args:
      v_s: velocity at (x_s, sigma_s); the only argument that gets a gradient.
      v_m: velocity at (x_m, sigma_m), x_m = euler(x_s, v_s, sigma_s, sigma_m).
      v_teacher: the teacher's at (x_s, sigma_s).
      sigma_s, sigma_m, sigma_e: the triple of Salt Eq. 9, [B] or [B, F], which broadcasts. Where no
        level lies between, sigma_m is sigma_s.

    Returns:
      [B] float32.

    Raises:
      AssertionError: the velocities or the levels are not of one shape, or not of the same clips.

    >>> v = jnp.zeros((1, 1, 1, 1, 1))
    >>> s, m, e = (jnp.array([level]) for level in (1.0, 0.75, 0.25))
    >>> shortcut_loss(v, v + 3.0, v + 1.0, s, m, e)  # (2 / 3 of 3)^2
    Array([4.], dtype=float32)
    >>> shortcut_loss(v, v + 3.0, v + 1.0, s, s, e)
    Array([1.], dtype=float32)
    """
    chex.assert_rank(v_s, 5)
    chex.assert_equal_shape([v_s, v_m, v_teacher])
    chex.assert_equal_shape([sigma_s, sigma_m, sigma_e])
    v_s, v_m, v_teacher = (v.astype(jnp.float32) for v in (v_s, v_m, v_teacher))
    s, m, e = (expand(sigma, v_s) for sigma in (sigma_s, sigma_m, sigma_e))
    second = (m - e) / (s - e)  # its share of the whole update
    target = jnp.where(s > m, v_s + second * (v_m - v_s), v_teacher)
    return ((v_s - jax.lax.stop_gradient(target)) ** 2).mean((1, 2, 3, 4))
