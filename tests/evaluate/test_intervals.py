"""Intervals against what is known of them."""

import numpy as np

from salt_jax.evaluate.intervals import Interval, bootstrap, verdict


def test_with_many_runs_and_clips_it_is_the_normal_one():
    """Of independent values with standard deviation 1 and as many runs as make theirs small."""
    values = np.random.default_rng(0).normal(0.3, 1.0, (40, 100))
    found = bootstrap(values)
    assert found.mean == values.mean()
    # Drawn again are runs, clips, and which values meet: each counts the variance once.
    half = 1.96 * np.sqrt(3 / values.size)
    np.testing.assert_allclose([found.low, found.high], found.mean + half * np.r_[-1, 1], atol=0.01)


def test_it_covers_the_truth_about_as_often_as_it_says():
    """Runs and clips have effects of their own; 12 of each, so the truth is met a little less
    often than in 95 of 100.
    """
    rng, met = np.random.default_rng(1), 0
    for i in range(200):
        runs, clips = rng.normal(0, 0.5, (12, 1)), rng.normal(0, 0.5, (1, 12))
        found = bootstrap(runs + clips + rng.normal(0, 0.5, (12, 12)), seed=i, draws=400)
        met += found.low <= 0 <= found.high
    assert 170 <= met <= 198


def test_a_verdict_is_that_of_the_interval():
    assert verdict(Interval(0.1, 0.02, 0.2)) == "holds"
    assert verdict(Interval(-0.1, -0.2, -0.02)) == "does not hold"
    assert verdict(Interval(0.1, -0.02, 0.2)) == "undecided"
