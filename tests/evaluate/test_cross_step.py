"""Cross-step distance of clips made by hand."""

import numpy as np
import pytest

from salt_jax.evaluate.cross_step import cross_step_distance


def test_mean_squared_distance_of_every_pair():
    base = np.zeros((2, 3, 4, 4, 3), np.float32)
    half = base.copy()
    half[0] = 2.0  # one clip of two is off by 2
    assert cross_step_distance({8: base + 1, 2: base, 4: half}) == {
        "2-4": 2.0,
        "2-8": 1.0,
        "4-8": 1.0,
    }


def test_pixels_do_not_wrap_around():
    black, white = np.zeros((1, 1, 2, 2, 3), np.uint8), np.full((1, 1, 2, 2, 3), 255, np.uint8)
    assert cross_step_distance({2: black, 4: white}) == {"2-4": 255.0**2}


def test_refuses_what_cannot_be_compared():
    clips = np.zeros((2, 3, 4, 4, 3), np.float32)
    with pytest.raises(ValueError, match=r"two numbers of steps, got \[4\]"):
        cross_step_distance({4: clips})
    with pytest.raises(ValueError, match="one shape"):
        cross_step_distance({4: clips, 8: clips[:1]})
