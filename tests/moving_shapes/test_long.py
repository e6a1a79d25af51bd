"""The long world: every window of an endless video is a clip, latents decode to what they were made
of, and the closed form over its frames is the one over its clips.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import teacher
from salt_jax.config.reading import read_recipe
from salt_jax.evaluate.shapes_suite import Task, drift
from salt_jax.flow.prediction import add_noise
from salt_jax.moving_shapes import dataset, latents, shapes
from salt_jax.moving_shapes.every_clip import every_clip, sizes
from salt_jax.moving_shapes.exact import ClosedForm, closed_form_params, log_posterior
from salt_jax.moving_shapes.score import score
from salt_jax.moving_shapes.shapes import World
from salt_jax.rollout.settings import Sampler
from salt_jax.types import Conditioning

RECIPE = read_recipe(teacher.get_config("long"))
LONG = RECIPE.world
SMALL = World(8, 4, 2.0, 1.0, (0.0, 2.0, 4.0, 6.0), (2.0, 4.0), patch=4)


def clips(count, frames=LONG.frames, seed=0):
    """True clips of a number of frames, uint8 [N, F, H, W, 3], and their scenes."""
    rng, world = np.random.default_rng(seed), replace(LONG, frames=frames)
    scene = rng.integers(len(shapes.scenes(world)), size=count)
    mode = rng.integers(len(shapes.modes(world)), size=count)
    pairs = [
        (shapes.scenes(world)[s], shapes.modes(world)[m]) for s, m in zip(scene, mode, strict=True)
    ]
    return np.stack([shapes.render(*pair, world) for pair in pairs]), scene


def test_it_is_as_large_as_it_says():
    frames, rows, columns, channels = RECIPE.clip_shape
    sides = rows // RECIPE.wan.patch_size[1], columns // RECIPE.wan.patch_size[2]
    assert frames == 21 and RECIPE.memory.sizes(frames) == (3,) * 7
    assert np.prod(sides) == 16 and LONG.size >= 48 and channels == 18


@pytest.mark.parametrize("world", [LONG, SMALL], ids=["long", "small"])
def test_every_window_of_an_endless_video_is_a_clip_and_all_are_equally_likely(world):
    """Where the modes of a direction are after any number of frames, they are once each again."""
    assert shapes.is_endless(world)
    start = [(m.x, m.y, m.speed) for m in shapes.modes(world)]
    for (dx, dy), time in itertools.product(shapes.DIRECTIONS.values(), (1, 20, 63)):
        later = [
            ((x + dx * v * time) % world.size, (y + dy * v * time) % world.size, v)
            for x, y, v in start
        ]
        assert sorted(later) == sorted(start)


@pytest.mark.parametrize(
    "changed",
    [{"speeds": (1.0,)}, {"starts": (0.0, 2.0, 4.0)}, {"starts": (1.0, 3.0, 5.0, 7.0)}],
    ids=str,
)
def test_other_worlds_are_not_endless(changed):
    assert not shapes.is_endless(replace(SMALL, **changed)) and not shapes.is_endless(World())


def test_latents_decode_to_what_they_were_made_of():
    """But for less than a tenth of an object; what is left out stays left out."""
    videos, _ = clips(24)
    latent = latents.to_latent(videos, LONG)
    decoded = latents.to_pixels(latent, LONG)
    assert latent.shape[1:] == latents.clip_shape(LONG) and latent.dtype == np.float32
    off, there = (decoded / 255 - videos / 255) ** 2, (videos / 255) ** 2
    assert np.sqrt(off.sum((2, 3, 4)) / there.sum((2, 3, 4))).max() < 0.1
    again = latents.to_latent(decoded, LONG)
    assert np.sqrt(np.mean((again - latent) ** 2)) < 0.03


def test_the_autoencoder_is_orthogonal_and_begins_with_the_mean_colour():
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    latent = latents.to_latent(videos, SMALL)
    squares = videos.reshape(2, 3, 2, 4, 2, 4, 3)
    np.testing.assert_allclose(latent[..., :3], 6 * squares.mean((3, 5)) / 255, atol=1e-5)
    # smooth pictures lose nothing: a plane, scaled to stay within the range
    y, x, _ = np.indices((8, 8, 3)) % 4
    plane = np.round(100 + 20 * np.cos(np.pi * (x + 0.5) / 4) + 30 * np.cos(np.pi * (y + 0.5) / 4))
    plane = plane.astype(np.uint8)
    back = latents.to_pixels(latents.to_latent(plane, SMALL), SMALL)
    assert np.abs(back.astype(int) - plane).max() <= 1


def test_a_patch_of_one_pixel_is_its_own_latent():
    videos = np.arange(192, dtype=np.uint8).reshape(1, 1, 8, 8, 3)
    world = replace(SMALL, patch=1)
    np.testing.assert_array_equal(
        latents.to_latent(videos, world), videos.astype(np.float32) / 127.5 - 1
    )
    np.testing.assert_array_equal(
        latents.to_pixels(latents.to_latent(videos, world), world), videos
    )


@pytest.mark.parametrize("world", [LONG, SMALL, replace(SMALL, starts=(1.0, 2.0))], ids=str)
def test_every_clip_has_the_sizes_it_tells(world):
    found = {name: part.shape for name, part in every_clip(world).items()}
    assert found == sizes(world)


def listed():
    """The clips of the small world, one by one."""
    drawn = [
        [shapes.render(scene, mode, SMALL) for mode in shapes.modes(SMALL)]
        for scene in shapes.scenes(SMALL)
    ]
    return {"clips": latents.to_latent(np.array(drawn), SMALL)}


@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.6, 0.2])
def test_the_closed_form_over_frames_is_that_over_clips(sigma):
    captions = np.arange(1, 49, dtype=np.float32).reshape(48, 1, 1)
    by_clip, by_frame = (
        closed_form_params(clips, captions) for clips in (listed(), every_clip(SMALL))
    )
    rng = np.random.default_rng(3)
    chosen = np.array([5, 17, 42, 30])
    x0 = by_clip["clips"][chosen, [0, 7, 11, 20]]
    text = jnp.asarray(captions[chosen]).at[3].set(0)  # the last sees the null text
    level = jnp.full(4, sigma)
    x = add_noise(x0, jnp.asarray(rng.normal(size=x0.shape), jnp.float32), level)
    one, other = (jax.jit(log_posterior)(p, x, level, text) for p in (by_clip, by_frame))
    np.testing.assert_allclose(np.exp(one), np.exp(other), atol=2e-4)
    one, other = (
        jax.jit(ClosedForm().denoise)(p, x, level, Conditioning(text)) for p in (by_clip, by_frame)
    )
    np.testing.assert_allclose(one.x0, other.x0, atol=2e-4)


def test_its_data_set_is_packed_and_survives_the_disk(tmp_path):
    train, _ = dataset.build(tmp_path, LONG, 40, 1, 7)
    for i in (0, 17, 39):
        example = dataset.example(LONG, 7, i)
        np.testing.assert_array_equal(train[i]["video"], example["video"])
        assert train[i]["caption"] == example["caption"]
    size = sum(file.stat().st_size for file in tmp_path.rglob("*array_record*"))
    assert size < 41 * example["video"].size / 8


@pytest.mark.parametrize("frames", [21, 84])
def test_decoded_clips_of_any_length_are_read_without_fault(frames):
    videos, scene = clips(12, frames)
    decoded = latents.to_pixels(latents.to_latent(videos, LONG), LONG)
    card = score(decoded, scene, LONG)
    assert card["all"] == card["identity"] == 1 and card["off_grid"] == 0
    assert card["residual"] < 0.1 and card["sharpness"] > 0.85 and card["wobble"] < 0.02


def task(frames, scene):
    sampler = Sampler(4, 5.0, memory=RECIPE.memory)
    return Task(LONG, scene, np.zeros((len(scene), 1, 1)), (frames, 12, 12, 18), sampler, 0, 8)


def test_a_long_video_without_fault_is_right_as_a_whole_and_in_every_chunk():
    videos, scene = clips(8, 84)
    card = drift(latents.to_latent(videos, LONG), task(84, scene))
    assert len(card["segments"]) == 4 and len(card["chunks"]) == 28
    for part in (card["whole"], *card["segments"], *card["chunks"]):
        assert part["all"] == part["identity"] == 1 and part["wobble"] < 0.02


def jumps(videos):
    """The second half begins elsewhere."""
    return np.concatenate([videos[:, :42], np.roll(videos[:, 42:], 12, axis=(2, 3))], axis=1)


def stands(videos):
    return np.concatenate([videos[:, :42], videos[:, 41:42].repeat(42, axis=1)], axis=1)


def fades(videos):
    return (videos * np.linspace(1, 0.5, 84)[:, None, None, None]).astype(np.uint8)


def changes_colour(videos):
    return np.concatenate([videos[:, :42], np.roll(videos[:, 42:], 1, axis=-1)], axis=1)


@pytest.mark.parametrize("fault", [jumps, stands, fades, changes_colour])
def test_a_long_video_with_a_fault_is_wrong_as_a_whole(fault):
    videos, scene = clips(8, 84)
    card = drift(latents.to_latent(fault(videos), LONG), task(84, scene))
    assert card["whole"]["all"] == 0 and card["chunks"][0]["all"] == 1
    alone = [part["all"] for part in card["chunks"]]
    assert (min(alone) == 1) == (fault is jumps)  # of which a chunk alone shows nothing
