"""Velocity, x0 and score say the same thing; guidance has one convention."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.prediction import add_noise, expand, from_velocity, from_x0, guide, score
from salt_jax.types import Prediction
from tests.helpers import without_type_checks

SHAPE = (3, 2, 4, 2, 3)
PER_CLIP = jnp.array([1.0, 0.6, 0.02])
PER_FRAME = jnp.array([[1.0, 0.9], [0.6, 0.3], [0.05, 0.02]])


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


@pytest.mark.parametrize("sigma", [PER_CLIP, PER_FRAME], ids=["per clip", "per frame"])
def test_expand_aligns_levels_with_clips_and_frames(sigma):
    wide = np.broadcast_to(expand(sigma, normal(0)), SHAPE)
    for b in range(3):
        for f in range(2):
            assert np.all(wide[b, f] == (sigma[b] if sigma.ndim == 1 else sigma[b, f]))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 2), (3, 1), (3, 2, 4)], ids=str)
def test_levels_of_other_clips_or_frames_are_refused(shape):
    with without_type_checks(), pytest.raises(AssertionError):
        expand(jnp.ones(shape), normal(0))


@pytest.mark.parametrize("sigma", [PER_CLIP, PER_FRAME], ids=["per clip", "per frame"])
def test_noise_is_added_on_the_straight_line(sigma):
    x0, noise = normal(0), normal(1)
    s = np.asarray(sigma, float).reshape(3, -1, 1, 1, 1)
    np.testing.assert_allclose(
        add_noise(x0, noise, sigma), (1 - s) * x0 + s * np.asarray(noise), atol=1e-6
    )


def test_the_ends_of_the_line():
    x0, noise = normal(0), normal(1)
    np.testing.assert_array_equal(add_noise(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(add_noise(x0, noise, jnp.ones(3)), noise)


@pytest.mark.parametrize("sigma", [PER_CLIP, PER_FRAME], ids=["per clip", "per frame"])
def test_the_truth_in_any_form_is_the_same_prediction(sigma):
    """velocity = noise - x0, the slope of the line, whichever of the two one starts from."""
    x0, noise = normal(0), normal(1)
    x = add_noise(x0, noise, sigma)
    for prediction in (from_velocity(x, noise - x0, sigma), from_x0(x, x0, sigma)):
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-6)
        # float32 over sigma = 0.02
        np.testing.assert_allclose(prediction.velocity, noise - x0, atol=3e-5)


def test_conversions_are_inverses():
    x, velocity = normal(2), normal(3)
    there = from_velocity(x, velocity, PER_CLIP)
    np.testing.assert_array_equal(there.velocity, velocity)
    back = from_x0(x, there.x0, PER_CLIP)
    np.testing.assert_array_equal(back.x0, there.x0)
    np.testing.assert_allclose(back.velocity, velocity, atol=3e-5)


def test_score_is_the_slope_of_the_log_density():
    """For one clip the noisy density is N((1 - sigma) x0, sigma^2): differentiate its logarithm."""
    x, x0 = normal(4), normal(5)
    s = PER_FRAME.reshape(3, 2, 1, 1, 1)
    log_density = lambda x: jax.scipy.stats.norm.logpdf(x, (1 - s) * x0, s).sum()
    np.testing.assert_allclose(score(x, x0, PER_FRAME), jax.grad(log_density)(x), rtol=1e-4)


def test_score_is_minus_the_noise_over_sigma():
    x0, noise = normal(0), normal(1)
    got = score(add_noise(x0, noise, PER_CLIP), x0, PER_CLIP)
    np.testing.assert_allclose(got, -noise / PER_CLIP.reshape(-1, 1, 1, 1, 1), rtol=1e-4, atol=2e-3)


def test_differences_of_scores_are_differences_of_x0():
    """Why the DMD loss needs no score: the factor is (1 - sigma) / sigma^2."""
    x, a, b = normal(1), normal(2), normal(3)
    sigma = jnp.array([0.98, 0.5, 0.1])
    s = np.asarray(sigma, float).reshape(3, 1, 1, 1, 1)
    expected = (1 - s) / s**2 * (np.asarray(a, float) - np.asarray(b, float))
    np.testing.assert_allclose(
        score(x, a, sigma) - score(x, b, sigma), expected, rtol=1e-4, atol=1e-4
    )


def predictions():
    return Prediction(normal(1), normal(2)), Prediction(normal(3), normal(4))


def test_guidance_1_is_none_and_0_forgets_the_text():
    conditional, unconditional = predictions()
    for w, expected in ((1.0, conditional), (0.0, unconditional)):
        chex.assert_trees_all_close(guide(conditional, unconditional, w), expected, atol=1e-6)


def test_the_peers_guidance_scale_3_is_4_here():
    conditional, unconditional = predictions()
    expected = jax.tree.map(lambda c, u: c + 3.0 * (c - u), conditional, unconditional)
    chex.assert_trees_all_close(guide(conditional, unconditional, 4.0), expected, atol=1e-5)


def test_a_guided_prediction_still_agrees_with_itself():
    x = normal(0)
    guided = guide(
        from_velocity(x, normal(1), PER_CLIP), from_velocity(x, normal(2), PER_CLIP), 4.0
    )
    np.testing.assert_allclose(guided.x0, from_velocity(x, guided.velocity, PER_CLIP).x0, atol=1e-5)
