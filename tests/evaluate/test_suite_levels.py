"""A student that was trained at listed levels is measured at these."""

import jax.numpy as jnp
import numpy as np

from salt_jax.evaluate import shapes_suite
from salt_jax.flow.prediction import from_velocity
from salt_jax.moving_shapes.shapes import World
from salt_jax.rollout.sampler import Sampler
from tests.helpers import Formula


def test_listed_levels_are_those_that_the_network_sees():
    """A network whose clean estimate is its level: by Euler the clip is a sum that the levels
    determine.
    """

    @Formula
    def x0_is_sigma(params, x, sigma, cond):
        level = sigma[:, None, None, None, None]
        return from_velocity(x, (x - level * jnp.ones_like(x)) / level, sigma)

    text = np.zeros((2, 1, 1), np.float32)
    at = lambda levels: shapes_suite.Task(
        World(), np.zeros(2, int), text, (1, 2, 2, 3), Sampler(3, 5.0, levels=levels), 0, 2
    )
    made = {
        levels: shapes_suite.clips(x0_is_sigma, {}, at(levels), 3, "euler")
        for levels in ((), (1000.0, 757.0, 522.0))
    }
    # Euler ends where the last estimate says: x0 at the last level.
    np.testing.assert_allclose(made[1000.0, 757.0, 522.0], 0.522, rtol=1e-5)
    np.testing.assert_allclose(made[()], 5 / 3 / (1 + 4 / 3), rtol=1e-5)
