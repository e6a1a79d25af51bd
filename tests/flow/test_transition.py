"""Updates against Eq. 5-7 written out, and the identity that the self-consistency loss rests on."""

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.prediction import add_noise, from_velocity
from salt_jax.flow.transition import composed_endpoint, direct_endpoint, euler, renoise

SHAPE = (3, 2, 4, 2, 3)
LEVELS = {
    "per clip": (
        jnp.array([1.0, 0.9375, 0.625]),
        jnp.array([0.9722, 0.75, 0.4167]),
        jnp.array([0.0, 0.625, 0.0]),
    ),
    "per frame": tuple(jnp.array([[a, b]] * 3) for a, b in ((1.0, 0.9), (0.8, 0.5), (0.3, 0.0))),
}
each_level = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def wide(*levels):
    """Float64 levels that multiply clips."""
    return [np.asarray(level, float).reshape(3, -1, 1, 1, 1) for level in levels]


@each_level
def test_euler_is_equation_5(levels):
    s, m, _ = wide(*levels)
    got = euler(normal(0), normal(1), levels[0], levels[1])
    np.testing.assert_allclose(got, np.asarray(normal(0), float) - (s - m) * normal(1), atol=1e-6)


@each_level
def test_euler_to_zero_is_the_clean_estimate(levels):
    x, velocity, sigma = normal(0), normal(1), levels[0]
    np.testing.assert_array_equal(
        euler(x, velocity, sigma, jnp.zeros_like(sigma)), from_velocity(x, velocity, sigma).x0
    )


def test_euler_nowhere_changes_nothing():
    sigma = LEVELS["per clip"][0]
    np.testing.assert_array_equal(euler(normal(0), normal(1), sigma, sigma), normal(0))


@each_level
def test_euler_with_the_true_velocity_follows_the_line(levels):
    x0, noise, (s, m, _) = normal(0), normal(1), levels
    np.testing.assert_allclose(
        euler(add_noise(x0, noise, s), noise - x0, s, m), add_noise(x0, noise, m), atol=1e-6
    )


@each_level
def test_renoise_is_a_fresh_draw_around_the_clean_estimate(levels):
    x0, noise, (_, m, _) = normal(0), normal(1), levels
    (level,) = wide(m)
    np.testing.assert_allclose(
        renoise(x0, noise, m), (1 - level) * x0 + level * np.asarray(noise), atol=1e-6
    )
    np.testing.assert_array_equal(renoise(x0, noise, jnp.zeros_like(m)), x0)


@each_level
def test_endpoints_are_equations_6_and_7(levels):
    x_s, v_s, v_m = (np.asarray(normal(seed), float) for seed in range(3))
    s, m, e = wide(*levels)
    x_m = x_s - (s - m) * v_s
    np.testing.assert_allclose(
        direct_endpoint(normal(0), normal(1), levels[0], levels[2]), x_s - (s - e) * v_s, atol=1e-6
    )
    np.testing.assert_allclose(
        composed_endpoint(normal(0), normal(1), normal(2), *levels), x_m - (m - e) * v_m, atol=1e-6
    )


@each_level
def test_endpoints_differ_by_the_change_of_velocity(levels):
    """x^(1) - x^(2) = (sigma_m - sigma_e) (v_m - v_s): the end is only a weight."""
    x_s, v_s, v_m = (normal(seed) for seed in range(3))
    _, m, e = wide(*levels)
    difference = direct_endpoint(x_s, v_s, levels[0], levels[2]) - composed_endpoint(
        x_s, v_s, v_m, *levels
    )
    np.testing.assert_allclose(difference, (m - e) * (np.asarray(v_m, float) - v_s), atol=2e-6)


@each_level
def test_two_updates_compose_on_a_straight_path(levels):
    x_s, v = normal(0), normal(1)
    direct = direct_endpoint(x_s, v, levels[0], levels[2])
    np.testing.assert_allclose(direct, composed_endpoint(x_s, v, v, *levels), atol=1e-6)
