"""A student that was trained at listed levels is measured at these."""

import jax.numpy as jnp
import numpy as np

from salt_jax.evaluate import shapes_suite
from salt_jax.flow.prediction import from_velocity
from salt_jax.models.denoiser import Network
from salt_jax.moving_shapes.shapes import World


def test_listed_levels_are_those_that_the_network_sees():
    """A network whose clean estimate is its level: by Euler the clip is a sum that the levels
    determine.
    """
    x0_is_sigma = lambda params, x, sigma, text: from_velocity(
        x,
        (x - sigma[:, None, None, None, None] * jnp.ones_like(x))
        / sigma[:, None, None, None, None],
        sigma,
    )
    network = Network(x0_is_sigma, *[None] * 4)
    task = shapes_suite.Task(
        World(), np.zeros(2, int), np.zeros((2, 1, 1), np.float32), (1, 2, 2, 3), 5.0, 0, 2, None, 0
    )
    made = {
        levels: shapes_suite.clips(network, {}, task._replace(levels=levels), 3, "euler")
        for levels in ((), (1000.0, 757.0, 522.0))
    }
    # Euler ends where the last estimate says: x0 at the last level.
    np.testing.assert_allclose(made[1000.0, 757.0, 522.0], 0.522, rtol=1e-5)
    np.testing.assert_allclose(made[()], 5 / 3 / (1 + 4 / 3), rtol=1e-5)
