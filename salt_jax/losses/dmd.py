"""Distribution matching distillation, Salt Eq. 4.

The gradient of KL(student || teacher) with respect to the student's video x0 is the difference of
the two scores at a noised copy of it. Scores differ by
(1 - sigma) / sigma^2 (x0_critic - x0_teacher), and DMD replaces that factor by a normaliser per
example (Yin et al. 2024, Eq. 8 there):

    direction = (x0_critic - x0_teacher) / mean |x0 - x0_teacher|                      (1)
    loss      = 1/2 mean (x0 - stop(x0 - direction))^2,   d loss / d x0 = direction / size   (2)
"""

import chex
import jax
import jax.numpy as jnp

from salt_jax.types import Latent, PerExample


def dmd_loss(x0: Latent, x0_critic: Latent, x0_teacher: Latent) -> PerExample:
    """Moves the student's video from where the critic believes it to where the teacher believes it,
    Salt Eq. 4.

    Args:
      x0: the student's video; the only argument that gets a gradient.
      x0_critic, x0_teacher: clean estimates from one noised copy of it. The teacher's is guided.

    Returns:
      [B] float32. The value, half the mean squared direction, does not measure quality; only the
      gradient counts. Not finite where the teacher returns exactly x0: the step is then skipped and
      counted, never patched.

    Raises:
      AssertionError: the three are not of one shape, which would broadcast.

    >>> x0 = jnp.zeros((1, 1, 1, 1, 2))
    >>> loss = lambda x: dmd_loss(x, x0 + 3.0, x0 + 2.0).sum()
    >>> jax.grad(loss)(x0).ravel()  # (3 - 2) / |0 - 2| / 2
    Array([0.25, 0.25], dtype=float32)
    """
    chex.assert_rank(x0, 5)
    chex.assert_equal_shape([x0, x0_critic, x0_teacher])
    x0, x0_critic, x0_teacher = (a.astype(jnp.float32) for a in (x0, x0_critic, x0_teacher))
    axes = (1, 2, 3, 4)
    direction = (x0_critic - x0_teacher) / jnp.abs(x0 - x0_teacher).mean(axes, keepdims=True)
    target = jax.lax.stop_gradient(x0 - direction)
    return 0.5 * ((x0 - target) ** 2).mean(axes)
