"""The optimal denoiser against Bayes' rule in a slow float64 loop, and against its own claim:
nothing is better.
"""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.prediction import add_noise, from_x0
from salt_jax.losses.flow_matching import flow_matching_loss
from salt_jax.moving_shapes.exact import (
    ClosedForm,
    closed_form_params,
    expected_error,
    log_posterior,
)
from salt_jax.types import Conditioning, Prediction

SHAPE = (2, 3, 3, 2)
RNG = np.random.default_rng(0)
CLIPS = RNG.uniform(-1, 1, (3, 4, *SHAPE)).astype(np.float32)  # three captions, four clips each
CAPTIONS = RNG.normal(size=(3, 2, 5)).astype(np.float32)
NULL = np.zeros((2, 5), np.float32)
PARAMS = closed_form_params({"clips": CLIPS}, CAPTIONS)
CHOICES = [0, 2, None, 1]  # captions of a batch; None is the null text
TEXT = jnp.asarray(np.stack([NULL if c is None else CAPTIONS[c] for c in CHOICES]))
COND = Conditioning(TEXT)
BEST = ClosedForm()


def noised(sigma, seed=1):
    """Clip 0 of each caption, at one noise level; the null text gets one of the last caption."""
    rng = np.random.default_rng(seed)
    x0 = jnp.asarray(np.stack([CLIPS[2 if c is None else c, 0] for c in CHOICES]))
    level = jnp.full(len(CHOICES), sigma, jnp.float32)
    return x0, add_noise(x0, jnp.asarray(rng.normal(size=x0.shape), jnp.float32), level), level


def slow_posterior(x, sigma, choice):
    """p(clip | x, caption) over all 12 clips by Bayes' rule: Gaussian likelihood times prior,
    normalised.
    """
    x, scores = np.asarray(x, float), np.full(12, -np.inf)
    for i, clip in enumerate(CLIPS.reshape(12, *SHAPE).astype(float)):
        if choice is None or i // 4 == choice:
            scores[i] = -((x - (1 - sigma) * clip) ** 2).sum() / (2 * sigma**2)
    likelihood = np.exp(scores - scores.max())
    return likelihood / likelihood.sum()


@pytest.mark.parametrize("sigma", [1.0, 0.98, 0.9, 0.7, 0.5, 0.2, 0.02])
def test_posterior_and_mean_are_bayes(sigma):
    _, x, level = noised(sigma)
    got = np.exp(log_posterior(PARAMS, x, level, TEXT))
    sigma = float(level[0])
    expected = np.stack([slow_posterior(x[b], sigma, choice) for b, choice in enumerate(CHOICES)])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    mean = np.tensordot(expected, CLIPS.reshape(12, *SHAPE), 1)
    prediction = BEST.denoise(PARAMS, x, level, COND)
    np.testing.assert_allclose(prediction.x0, mean, atol=2e-4)
    np.testing.assert_allclose(prediction.velocity, (x - mean) / sigma, atol=3e-4 / sigma)


def test_the_posterior_is_tested_where_it_is_not_trivial():
    """Between sure and ignorant: the noise levels above contain a real mixture."""
    _, x, level = noised(0.7)
    largest = np.exp(log_posterior(PARAMS, x, level, TEXT)).max(1)
    assert np.any((largest > 0.3) & (largest < 0.97))


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.3])
def test_clips_of_other_captions_are_impossible_and_the_null_text_allows_all(sigma):
    _, x, level = noised(sigma)
    possible = np.isfinite(log_posterior(PARAMS, x, level, TEXT)).reshape(4, 3, 4)
    for row, choice in zip(possible, CHOICES, strict=True):
        assert row.all(1).tolist() == [choice is None or caption == choice for caption in range(3)]
        assert row.any(1).tolist() == row.all(1).tolist()


def test_each_example_has_its_own_level():
    _, low, sigma_low = noised(0.3)
    _, high, sigma_high = noised(0.9)
    mixed = BEST.denoise(
        PARAMS,
        jnp.concatenate([low[:1], high[1:]]),
        jnp.concatenate([sigma_low[:1], sigma_high[1:]]),
        COND,
    )
    alone = [BEST.denoise(PARAMS, *z, COND).x0 for z in ((low, sigma_low), (high, sigma_high))]
    np.testing.assert_allclose(mixed.x0[:1], alone[0][:1], atol=1e-6)
    np.testing.assert_allclose(mixed.x0[1:], alone[1][1:], atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 0.8, 0.4, 0.001])
def test_the_estimate_is_a_weighted_average_of_clips(sigma):
    _, x, level = noised(sigma)
    weights = np.exp(log_posterior(PARAMS, x, level, TEXT))
    np.testing.assert_allclose(weights.sum(1), np.ones(4), rtol=1e-5)
    x0 = np.asarray(BEST.denoise(PARAMS, x, level, COND).x0)
    for b, choice in enumerate(CHOICES):
        clips = CLIPS.reshape(12, *SHAPE) if choice is None else CLIPS[choice]
        assert np.all(x0[b] <= clips.max(0) + 1e-5) and np.all(x0[b] >= clips.min(0) - 1e-5)


def test_pure_noise_says_nothing():
    """At sigma = 1 the estimate is the mean of the caption's clips, whatever x."""
    _, x, level = noised(1.0)
    prediction = BEST.denoise(PARAMS, 10 * x, level, COND)
    expected = [CLIPS.mean((0, 1)) if c is None else CLIPS[c].mean(0) for c in CHOICES]
    np.testing.assert_allclose(prediction.x0, np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.001])
def test_hardly_any_noise_gives_the_nearest_clip(sigma):
    x0, x, level = noised(sigma)
    prediction = BEST.denoise(PARAMS, x, level, COND)
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-5)
    chex.assert_tree_all_finite(prediction)


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.001])
def test_finite_far_from_all_clips(sigma):
    """Where a student may well bring it: no clip is near, and the likelihoods underflow."""
    x = jnp.full((4, *SHAPE), 50.0)
    prediction = BEST.denoise(PARAMS, x, jnp.full(4, sigma), COND)
    chex.assert_tree_all_finite(prediction)


def test_expected_error_is_the_distance_to_the_optimum():
    _, x, sigma = noised(0.6)
    best = BEST.denoise(PARAMS, x, sigma, COND)
    assert not np.any(expected_error(PARAMS, best, x, sigma, COND))
    off = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1, 1)
    worse = Prediction(best.velocity + off, best.x0)
    np.testing.assert_allclose(
        expected_error(PARAMS, worse, x, sigma, COND), [1, 4, 9, 16], rtol=1e-4
    )


WORSE = {
    "too bold": lambda best, x, s, cond: best.velocity * 1.2,
    "shifted": lambda best, x, s, cond: best.velocity + 0.2,
    "wrong level": lambda best, x, s, cond: (
        from_x0(x, BEST.denoise(PARAMS, x, 0.7 * s, cond).x0, s).velocity
    ),
    "deaf": lambda best, x, s, cond: (
        BEST.denoise(PARAMS, x, s, Conditioning(jnp.zeros_like(cond.text))).velocity
    ),
}


@pytest.mark.parametrize("worse", WORSE.values(), ids=WORSE)
def test_nothing_has_a_lower_flow_matching_loss(worse):
    """And the excess of the worse is its expected error: the cross term has mean zero over the
    data.
    """
    count, rng = 6000, np.random.default_rng(4)
    caption, mode = rng.integers(3, size=count), rng.integers(4, size=count)
    x0 = jnp.asarray(CLIPS[caption, mode])
    noise = jnp.asarray(rng.normal(size=x0.shape), jnp.float32)
    sigma = jnp.asarray(rng.uniform(0.4, 1, count), jnp.float32)
    x, cond = add_noise(x0, noise, sigma), Conditioning(jnp.asarray(CAPTIONS[caption]))
    best = BEST.denoise(PARAMS, x, sigma, cond)
    velocity = worse(best, x, sigma, cond)
    excess = np.asarray(
        flow_matching_loss(velocity, x0, noise) - flow_matching_loss(best.velocity, x0, noise)
    )
    error = expected_error(PARAMS, Prediction(velocity, best.x0), x, sigma, cond)
    uncertainty = excess.std() / np.sqrt(count)
    assert excess.mean() > 4 * uncertainty
    assert abs(excess.mean() - error.mean()) < 4 * uncertainty
