"""Shortcut self-consistency, Salt Eq. 8: one step from sigma_s to sigma_e should land where two
steps through sigma_m land.

With x_m = x_s - (s - m) v_s the two endpoints of Eq. 6-7 differ by

    x^(1) - x^(2) = (m - e) (v_m - v_s)                                                (1)

so the loss is a penalty on the bend of the student's path, and sigma_e is only a weight. We compute
(1) and not the endpoints: in half precision their difference would be lost.
"""

import chex
import jax
import jax.numpy as jnp

from salt_jax.choices import LevelWeight, StopGradient
from salt_jax.flow.prediction import expand
from salt_jax.types import Latent, PerExample, Sigma


def self_consistency_loss(
    v_s: Latent,
    v_m: Latent,
    sigma_s: Sigma,
    sigma_m: Sigma,
    sigma_e: Sigma,
    stop_gradient: StopGradient,
    level_weight: LevelWeight,
) -> PerExample:
    """|x^(1) - x^(2)|^2 of Salt Eq. 8, as a mean over F H W C instead of a sum.

    Args:
      v_s: velocity at (x_s, sigma_s).
      v_m: velocity at (x_m, sigma_m), x_m = euler(x_s, v_s, sigma_s, sigma_m).
      sigma_s, sigma_m, sigma_e: the triple of Eq. 9, [B] or [B, F], which broadcasts. Where no
        triple exists pass three equal levels: the loss is 0.
      stop_gradient: changes the gradient, never the value.
      level_weight: "one_minus_sigma" multiplies by 1 - sigma_s, as the authors' code does.

    Returns:
      [B] float32.

    Raises:
      AssertionError: the velocities or the levels are not of one shape, or not of the same clips.

    >>> v = jnp.zeros((1, 1, 1, 1, 1))
    >>> level = lambda s: jnp.array([s])
    >>> s, m, e = level(1.0), level(0.75), level(0.25)
    >>> self_consistency_loss(v, v + 2.0, s, m, e, "none", "one")  # (0.5 * 2)^2
    Array([1.], dtype=float32)
    """
    chex.assert_rank(v_s, 5)
    chex.assert_equal_shape([v_s, v_m])
    chex.assert_equal_shape([sigma_s, sigma_m, sigma_e])
    v_s, v_m = v_s.astype(jnp.float32), v_m.astype(jnp.float32)
    s, m, e = (expand(sigma, v_s) for sigma in (sigma_s, sigma_m, sigma_e))
    difference = (m - e) * (v_m - v_s)
    # d x^(1) = -(s - e) dv_s and d x^(2) = -(s - m) dv_s - (m - e) dv_m. The correction below is
    # zero in value.
    live = v_s - jax.lax.stop_gradient(v_s)
    if stop_gradient == "composed":
        difference = jax.lax.stop_gradient(difference) - (s - e) * live
    elif stop_gradient == "direct":
        difference = (m - e) * (v_m - jax.lax.stop_gradient(v_s)) + (s - m) * live
    weight = 1.0 - s if level_weight == "one_minus_sigma" else 1.0
    return (weight * difference**2).mean((1, 2, 3, 4))
