"""Motion and drift of clips whose change is known."""

import numpy as np
import pytest

from salt_jax.evaluate.change import drift, motion


def test_motion_is_what_neighbouring_frames_differ_by():
    still = np.full((2, 5, 4, 4, 3), 7, np.uint8)
    assert motion(still) == 0
    flicker = still.copy()
    flicker[:, 1::2] = 250  # uint8 would wrap around
    assert motion(flicker) == 243
    ramp = np.arange(6, dtype=np.float32)[None, :, None, None, None] * np.ones((1, 6, 2, 2, 4))
    np.testing.assert_allclose(motion(np.float32(-0.5 * ramp)), 0.5)
    with pytest.raises(ValueError, match="two frames"):
        motion(still[:, :1])


def test_drift_is_a_distance_to_the_first_chunk_in_its_own_spread():
    """One channel of two moves by half of its deviation, then spreads twice as wide."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 1, 8, 8, 2))
    scaled = np.stack([noise, noise, noise])  # equal chunks
    scaled[1, ..., 0] += 0.5 * noise[..., 0].std((1, 2, 3), keepdims=True)
    middle = noise[..., 0].mean((1, 2, 3), keepdims=True)
    scaled[2, ..., 0] = middle + 2 * (noise[..., 0] - middle)
    clips = np.concatenate(list(scaled), axis=1)
    np.testing.assert_allclose(drift(clips, (1, 1, 1)), [0, 0.25 / 2, 1 / 2], atol=1e-6)
    assert drift(clips.astype(np.float32) * 1000, (1, 1, 1)) == pytest.approx([0, 0.125, 0.5])


def test_the_first_frame_of_a_latent_is_of_another_kind():
    """It stands for one frame of the video, the others for four: it does not count where there are
    others.
    """
    clips = np.random.default_rng(1).normal(size=(2, 6, 4, 4, 3))
    other = clips.copy()
    other[:, 0] += 100
    assert drift(other, (3, 3)) == drift(clips, (3, 3))
    assert drift(other, (1, 5)) != drift(clips, (1, 5))


def test_chunks_make_up_the_clip():
    with pytest.raises(ValueError, match=r"chunks of \(3, 3\) frames are not the 5"):
        drift(np.zeros((1, 5, 2, 2, 3)), (3, 3))
