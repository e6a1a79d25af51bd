"""What is measured of a small student of Wan with random weights, and what it must come to."""

import jax
import numpy as np
import pytest

from salt_jax.evaluate.change import drift, motion
from salt_jax.evaluate.cross_step import cross_step_distance
from salt_jax.evaluate.suite import clips
from salt_jax.evaluate.wan_suite import WanTask, measure
from salt_jax.io.video import looks
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.rollout.settings import Sampler
from tests.helpers import randomised, shapes_of

CONFIG = PRESETS["wan2.1-t2v-tiny"]
PARAMS = randomised(shapes_of(CONFIG), 1, 0.1)
TEXT = np.random.default_rng(0).normal(size=(2, CONFIG.text_length, CONFIG.text_dim))


def task_of(memory):
    sampler = Sampler(4, 5.0, memory=memory)
    return WanTask(TEXT.astype(np.float32), (4, 4, 4, CONFIG.out_channels), sampler, 0)


def decode(chunks):
    """Pixels that show the latent."""
    for chunk in chunks:
        yield np.uint8(np.clip(chunk[0, ..., :3] * 20 + 128, 0, 255))


@pytest.mark.parametrize(
    "memory", [CachePolicy(2, 2, 4, 1), pytest.param(None, marks=pytest.mark.slow)]
)
def test_the_numbers_of_a_student_are_means_over_its_clips(memory):
    task = task_of(memory)
    network = wan_denoiser(CONFIG, Compute(), 4, 2)
    numbers, shown = measure(network, PARAMS, task, (2, 4), "cm", decode, shown=1)
    made = {k: clips(network, PARAMS, task, k, "cm") for k in (2, 4)}
    pixels = {k: np.concatenate([next(decode([x]))[None] for x in made[k][:, None]]) for k in made}
    sizes = (2, 2) if memory else (4,)
    assert task.sizes == sizes and len(shown) == 1
    np.testing.assert_array_equal(shown[0][4], pixels[4][0])
    assert len(numbers["defect"]["per_interval"]) == 4 and numbers["defect"]["mean"] > 0
    scaled = {k: x / np.float32(255) for k, x in pixels.items()}
    for kind, x in (("latents", made), ("pixels", scaled)):
        assert numbers["cross_step"][kind] == pytest.approx(cross_step_distance(x), rel=1e-5)
        for k in (2, 4):
            assert numbers["videos"][k]["motion"][kind] == pytest.approx(motion(x[k]), rel=1e-5)
    for k in (2, 4):
        assert numbers["videos"][k]["drift"] == pytest.approx(drift(made[k], sizes), rel=1e-5)
        parts = np.split(pixels[k], np.cumsum(sizes)[:-1], axis=1)
        for found, part in zip(numbers["videos"][k]["looks"], parts, strict=True):
            assert found == pytest.approx(looks(part), rel=1e-5)
    assert all(map(np.isfinite, jax.tree.leaves(numbers)))


def test_without_a_decoder_or_a_second_number_of_steps_less_is_said():
    network = wan_denoiser(CONFIG, Compute(), 4, 2)
    numbers, shown = measure(network, PARAMS, task_of(CachePolicy(2, 2, 4, 1)), (2,), "cm", None, 1)
    assert not shown and numbers["cross_step"] == {} and numbers["videos"][2]["looks"] == []
    assert numbers["videos"][2]["motion"].keys() == {"latents"}
