"""Preparing the first frame against torch, transformers and diffusers, and against the
definitions.
"""

import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.image_condition import (
    CLIP_MEAN,
    CLIP_STD,
    condition_latents,
    crop_for_clip,
    image_clip,
    known_mask,
    resize_bicubic,
    squash_for_clip,
)
from salt_jax.models.latent_size import fit_size


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b) for a, b in ((9, 31), (17, -12), (40, 25))]
    return np.round(127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)


def torch_bicubic(torch, image, height, width):
    """In float64: in float32 torch's own rounding of the sample positions is up to 1e-3 on large
    pictures.
    """
    x = torch.from_numpy(image.astype(np.float64)).movedim(-1, -3)
    x = x[None] if x.ndim == 3 else x
    y = torch.nn.functional.interpolate(
        x, size=(height, width), mode="bicubic", align_corners=False
    )
    return y.movedim(-3, -1).reshape(*image.shape[:-3], height, width, image.shape[-1]).numpy()


@pytest.mark.parity
@pytest.mark.parametrize(
    "old, new",
    [((37, 53), (28, 28)), ((20, 31), (48, 80)), ((300, 17), (33, 40)), ((9, 9), (9, 9))],
)
def test_bicubic_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).uniform(-1, 1, (*old, 3)).astype(np.float32)
    got = resize_bicubic(image, *new)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, torch_bicubic(torch, image, *new), atol=2e-6)
    batch = np.stack([image, -image])
    np.testing.assert_allclose(
        resize_bicubic(batch, *new), torch_bicubic(torch, batch, *new), atol=2e-6
    )


def test_bicubic_by_hand():
    """Halving a row reads in the middle of two samples: 0.59375 of the near ones, -0.09375 of the
    far ones.
    """
    row = np.array([1, 10, 100, 1000], np.float32).reshape(1, 4, 1)
    near, far = 0.59375, -0.09375
    want = [far + near + 10 * near + 100 * far, 10 * far + 100 * near + 1000 * near + 1000 * far]
    np.testing.assert_allclose(resize_bicubic(row, 1, 2)[0, :, 0], want, rtol=1e-6)
    np.testing.assert_allclose(resize_bicubic(row.reshape(4, 1, 1), 2, 1)[:, 0, 0], want, rtol=1e-6)
    np.testing.assert_array_equal(resize_bicubic(row, 1, 4), row)
    np.testing.assert_allclose(
        resize_bicubic(np.full((5, 7, 2), 0.3, np.float32), 16, 3), 0.3, rtol=1e-6
    )


@pytest.mark.parity
@pytest.mark.parametrize("image", [noise(60, 41, 3), smooth(50, 90)])
def test_squashing_equals_wan(image):
    """Wan's steps in its order: to [-1, 1], bicubic, to [0, 1], CLIP's mean and std."""
    torch = pytest.importorskip("torch")
    squashed = torch_bicubic(torch, image / 127.5 - 1, 28, 28)
    want = (squashed * 0.5 + 0.5 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(squash_for_clip(image, 28), want, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    "image", [noise(301, 450, 3), smooth(500, 333), noise(60, 41, 3), smooth(224, 301)]
)
def test_cropping_equals_transformers(image):
    pytest.importorskip("transformers")
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    want = clip.CLIPImageProcessorPil()(
        images=image, return_tensors="np", input_data_format="channels_last"
    )
    got = crop_for_clip(image, 224)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want["pixel_values"][0].transpose(1, 2, 0), atol=2e-6)


def test_clip_pixels_are_normalised_and_the_two_ways_differ_where_they_should():
    grey = np.full((40, 60, 3), 51, np.uint8)
    want = np.broadcast_to((0.2 - np.array(CLIP_MEAN)) / np.array(CLIP_STD), (28, 28, 3))
    for prepare in (squash_for_clip, crop_for_clip):
        np.testing.assert_allclose(prepare(grey, 28), want, atol=1e-5)
    sides = smooth(40, 60)
    sides[:, :10] = sides[:, -10:] = 255  # a crop cuts these off, a squash keeps them
    plain = smooth(40, 60)
    np.testing.assert_allclose(
        crop_for_clip(sides, 28)[:, 2:-2], crop_for_clip(plain, 28)[:, 2:-2], atol=1e-5
    )
    assert np.abs(squash_for_clip(sides, 28)[:, :4] - squash_for_clip(plain, 28)[:, :4]).max() > 1


def test_size_follows_the_picture_within_the_area():
    assert fit_size(480, 832, 480 * 832) == (480, 832)
    assert fit_size(832, 480, 480 * 832) == (832, 480)
    assert fit_size(1080, 1920, 720 * 1280) == (720, 1280)
    assert fit_size(1080, 1920, 480 * 832) == (464, 832)
    assert fit_size(1000, 1000, 480 * 832) == (624, 624)
    with pytest.raises(ValueError, match=r"10000 x 1 pixels does not fit into 399360 pixels"):
        fit_size(1, 10_000, 480 * 832)


def test_size_is_wan_s_but_for_what_its_floating_point_loses():
    rng = np.random.default_rng(0)
    same = 0
    for height, width in rng.integers(64, 4000, (500, 2)).tolist():
        for area in (480 * 832, 720 * 1280):
            ratio = height / width
            official = [round(math.sqrt(a) // 8 // 2 * 2) * 8 for a in (area * ratio, area / ratio)]
            got = fit_size(height, width, area)
            exact = [got[0] ** 2 * width == area * height, got[1] ** 2 * height == area * width]
            assert all(
                g == o or (e and g == o + 16) for g, o, e in zip(got, official, exact, strict=True)
            )
            same += list(got) == official
    assert same > 950


def test_mask_is_the_repeat_view_transpose_of_the_indicator():
    known = np.random.default_rng(0).random(13) < 0.5
    repeated = np.concatenate([np.repeat(known[:1], 4), known[1:]])  # T + 3 = 4 F entries
    np.testing.assert_array_equal(known_mask(known), repeated.reshape(4, 4))
    np.testing.assert_array_equal(known_mask(np.array([True])), np.ones((1, 4)))
    with pytest.raises(ValueError, match="13 frames"):
        known_mask(np.ones(12, bool))


def test_condition_is_the_mask_then_the_latents():
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 6, 16)), jnp.float32)
    got = np.asarray(condition_latents(latents))
    assert got.shape == (2, 3, 4, 6, 20)
    assert (got[:, 0, ..., :4] == 1).all() and (got[:, 1:, ..., :4] == 0).all()
    np.testing.assert_array_equal(got[..., 4:], latents)


def test_clip_is_the_resized_picture_then_grey():
    image = noise(20, 30, 3)
    clip = image_clip(image, 5, 16, 32)
    assert clip.shape == (5, 16, 32, 3) and clip.dtype == np.float32
    np.testing.assert_allclose(
        clip[0], resize_bicubic((image / 127.5 - 1).astype(np.float32), 16, 32), atol=1e-5
    )
    assert (clip[1:] == 0).all()


@pytest.mark.slow
@pytest.mark.parity
def test_condition_equals_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16).eval()
    pipeline = types.SimpleNamespace(
        vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8,
        config=types.SimpleNamespace(expand_timesteps=False),
    )  # fmt: skip
    clip = image_clip(noise(20, 30, 3), 9, 16, 24)
    prepare = diffusers.WanImageToVideoPipeline.prepare_latents
    first = torch.from_numpy(clip[0]).permute(2, 0, 1)[None]
    with torch.no_grad():
        _, want = prepare(
            pipeline, first, 1, 16, 16, 24, 9, torch.float32, generator=torch.Generator()
        )
        moments = vae.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None]).latent_dist.mode()
    latents = (
        moments.permute(0, 2, 3, 4, 1).numpy() - vae.config.latents_mean
    ) / vae.config.latents_std
    got = condition_latents(jnp.asarray(latents, jnp.float32))
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 4, 1).numpy(), atol=1e-5)
