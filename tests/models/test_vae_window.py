"""The first latent of a window in mid-video against diffusers' VAE, and against whole videos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.vae import PRESETS, decode_video, encode_video, init_vae
from salt_jax.models.vae_window import as_first, sizes_of
from tests.helpers import randomised, shapes_of
from tests.models.oracles import make_oracle

TINY = PRESETS["tiny"]
_as_first = jax.jit(as_first, static_argnums=2)


def latents(frames):
    draw = np.random.default_rng(frames).normal(size=(2, frames, 2, 3, 16))
    return jnp.asarray(draw, jnp.float32)


def test_sizes_are_read_off_the_arrays():
    for config in PRESETS.values():
        assert sizes_of(shapes_of(config, init_vae)) == config


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_it_is_the_last_frame_of_the_decoded_video_encoded_alone(frames):
    params, z = randomised(shapes_of(TINY, init_vae), 0, 0.1), latents(frames)
    decode, encode = (jax.jit(f, static_argnums=(2, 3)) for f in (decode_video, encode_video))
    pixels = decode(params, z, TINY, jnp.float32)
    assert pixels.shape[1] == 4 * frames - 3
    wanted = encode(params, pixels[:, -1:], TINY, jnp.float32)
    found = _as_first(params, z, jnp.float32)
    assert found.shape == (2, 1, 2, 3, 16) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - z[:, -1:]).max() > 0.1


def test_frames_before_the_last_latent_are_seen_and_half_precision_is_near():
    params, z = randomised(shapes_of(TINY, init_vae), 0, 0.1), latents(3)
    found = _as_first(params, z, jnp.float32)
    assert np.abs(found - _as_first(params, z[:, 1:], jnp.float32)).max() > 1e-4
    half = _as_first(params, z, jnp.bfloat16)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, found, atol=0.1)


@pytest.mark.parity
@pytest.mark.slow
def test_it_equals_diffusers():
    """Decoded and encoded there as the peers do: all frames up to the latent, then the last one."""
    import torch

    module, params = make_oracle(TINY, base_dim=8, z_dim=16)
    z = latents(4)
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1)
        for x in (module.config.latents_mean, module.config.latents_std)
    )
    with torch.no_grad():
        there = torch.from_numpy(np.array(z)).permute(0, 4, 1, 2, 3) * std + mean
        last = module.decode(there).sample[:, :, -1:]
        wanted = ((module.encode(last).latent_dist.mode() - mean) / std).permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(_as_first(params, z, jnp.float32), wanted.numpy(), atol=1e-4)
