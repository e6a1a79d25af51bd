"""Flow matching against numpy, and its minimiser against a distribution small enough to
enumerate.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from salt_jax.losses.flow_matching import flow_matching_loss, midlevel_weight

SHAPE = (3, 2, 4, 2, 3)


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slow_loss(velocity, x0, noise):
    velocity, x0, noise = (np.asarray(a, float) for a in (velocity, x0, noise))
    return [np.mean((v - (n - x)) ** 2) for v, x, n in zip(velocity, x0, noise, strict=True)]


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value_is_one_number_per_example(self):
        arrays = normal(0), normal(1), normal(2)
        loss = self.variant(flow_matching_loss)(*arrays)
        assert loss.shape == (3,) and loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, slow_loss(*arrays), rtol=1e-5)


def test_examples_of_the_docstring_and_of_the_sign():
    one = jnp.ones((2, 1, 1, 1, 1))
    assert flow_matching_loss(0 * one, one, one).tolist() == [0, 0]
    assert flow_matching_loss(one, 0 * one, one).tolist() == [0, 0]  # from data to noise
    assert flow_matching_loss(one, one, 0 * one).tolist() == [4, 4]


def test_minimiser_is_the_conditional_mean():
    """One noisy x, four clips it may come from: each has its own noise, and a probability by
    Bayes.
    """
    sigma, clips = 0.6, np.asarray(normal(3, (4, 1, 2, 2, 1)), float)
    x = 0.4 * clips[1] + sigma * np.asarray(normal(4, (1, 2, 2, 1)), float)
    noises = (x - (1 - sigma) * clips) / sigma
    weight = np.exp(-0.5 * (noises**2).sum((1, 2, 3, 4)))
    weight /= weight.sum()
    assert weight.max() < 0.9  # else there is no mean to speak of

    def expected_loss(velocity):
        everywhere = jnp.broadcast_to(velocity, clips.shape)
        losses = flow_matching_loss(
            everywhere, jnp.asarray(clips, jnp.float32), jnp.asarray(noises, jnp.float32)
        )
        return jnp.dot(jnp.asarray(weight, jnp.float32), losses)

    best = jnp.asarray(np.tensordot(weight, noises - clips, 1)[None], jnp.float32)
    np.testing.assert_allclose(jax.grad(expected_loss)(best), np.zeros(best.shape), atol=1e-6)
    for seed in range(5, 8):  # a parabola with its lowest point there
        away = normal(seed, best.shape)
        assert float(expected_loss(best + away) - expected_loss(best)) > 0.9 * np.mean(
            np.square(away)
        )


def test_half_precision_is_computed_in_float32():
    arrays = [normal(seed).astype(jnp.bfloat16) for seed in range(3)]
    loss = flow_matching_loss(*arrays)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, slow_loss(*arrays), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_a_weight_multiplies_the_squares_of_its_clip_or_frame(shape):
    arrays, weight = (
        (normal(0), normal(1), normal(2)),
        jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape),
    )
    velocity, x0, noise = (np.asarray(a, float) for a in arrays)
    by_frame = ((velocity - (noise - x0)) ** 2).mean((2, 3, 4))
    wanted = (by_frame * np.asarray(weight).reshape(3, -1)).mean(1)
    np.testing.assert_allclose(flow_matching_loss(*arrays, weight), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        flow_matching_loss(*arrays, jnp.ones(shape)), flow_matching_loss(*arrays), rtol=1e-6
    )


def slow_weights(shift):
    """Self-Forcing's table: 1000 levels that fall from 1, a bell around the middle of their
    timesteps, mean 1.
    """
    levels = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / 1000 for i in range(1000))]
    bell = [np.exp(-2 * ((1000 * sigma - 500) / 1000) ** 2) for sigma in levels]
    raised = [y - min(bell) for y in bell]
    return np.array(levels), np.array(raised) * 1000 / sum(raised)


class Weight(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1.0, 5.0, 12.0)
    def test_the_weight_of_levels_is_that_of_the_table(self, shift):
        levels, wanted = slow_weights(shift)
        weigh = self.variant(midlevel_weight, static_argnums=1)
        weight = weigh(jnp.asarray(levels, jnp.float32), shift)
        np.testing.assert_allclose(weight, wanted, atol=2e-5)
        assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5) and weight[0] == pytest.approx(
            0.0, abs=1e-6
        )
        assert weight.min() >= -1e-6


def test_the_weight_at_shift_five_is_largest_in_the_middle_and_nothing_at_pure_noise():
    sigma = jnp.array([[0.5, 0.25, 0.75], [0.9375, 1.0, 0.0]])
    wanted = [[2.08, 1.46, 1.46], [0.40, 0.0, 0.0]]
    np.testing.assert_allclose(midlevel_weight(sigma, 5.0), wanted, atol=0.01)
