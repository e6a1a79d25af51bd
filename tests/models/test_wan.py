"""The Wan port: parity with diffusers, parameter counts of the real sizes, and the traps of the
architecture.
"""

import functools
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.blocks import cos_sin
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.models.position_channels import POSITION_CHANNELS, position_channels
from salt_jax.models.presets import PRESETS, Compute, Remat, WanConfig
from salt_jax.models.wan import Inputs, apply_wan
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.sharding import make_mesh
from salt_jax.types import Conditioning
from tests.helpers import close, randomised, shapes_of, to_diffusers, wan_inputs, wan_of_diffusers

SMALL = WanConfig(48, 2, 2, 96, 16, 16, (1, 2, 2), 32, 12, 64, 0, 1e-6)
I2V = PRESETS["wan2.1-i2v-tiny"]


def image_text(seed, config, shape, rows):
    """What an image-to-video network is told, random, with 3 image rows."""
    rng, (batch, frames, height, width) = np.random.default_rng(seed), shape
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    channels = draw(batch, frames, height, width, config.condition_channels)
    return Conditioning(
        draw(batch, rows, config.text_dim), draw(batch, 3, config.image_dim), channels
    )


def seen(x, timestep, text):
    """What a network without pictures sees of a whole clip."""
    return Inputs(*map(jnp.asarray, (x, timestep)), Conditioning(jnp.asarray(text)))


@pytest.mark.parity
@pytest.mark.parametrize(
    "config", [I2V, WanConfig(96, 4, 3, 80, 12, 4, (1, 2, 2), 24, 512, 32, 24, 1e-6)]
)
def test_image_to_video_equals_diffusers(config):
    """diffusers takes text to have 512 rows and the image to be what is before them."""
    torch = pytest.importorskip("torch")
    theirs = wan_of_diffusers(config)
    params = randomised(shapes_of(config), 1)
    assert not theirs.load_state_dict(to_diffusers(params, config), strict=True).missing_keys
    told = image_text(3, config, (2, 3, 4, 6), 512)
    x = (
        np.random.default_rng(2)
        .standard_normal((2, 3, 4, 6, config.out_channels))
        .astype(np.float32)
    )
    sigma = np.array([0.9375, 0.02], np.float32)
    denoise = wan_denoiser(config, Compute(), 3, 3).denoise
    ours = denoise(params, jnp.asarray(x), jnp.asarray(sigma), told).velocity
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(np.concatenate([x, told.channels], -1).transpose(0, 4, 1, 2, 3)),
            torch.tensor(1000 * sigma),
            torch.tensor(np.array(told.text)),
            torch.tensor(np.array(told.image)),
        ).sample
    np.testing.assert_allclose(ours, wanted.numpy().transpose(0, 2, 3, 4, 1), atol=2e-5, rtol=1e-5)
    assert np.std(ours) > 0.05


def test_image_to_video_is_told_a_picture():
    """Each part of what it is told matters; guidance nulls the text alone; its parts of a prompt
    can be read once.
    """
    params = randomised(shapes_of(I2V), 1)
    network = wan_denoiser(I2V, Compute(), 3, 3)
    told, sigma = image_text(3, I2V, (1, 3, 4, 4), 5), jnp.array([0.9])
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 4, 4, 16)), jnp.float32)
    denoise = jax.jit(network.denoise)
    out = denoise(params, x, sigma, told).velocity
    for name in told._fields:
        other = told._replace(**{name: getattr(told, name)[..., ::-1]})
        assert np.abs(denoise(params, x, sigma, other).velocity - out).max() > 1e-3, name
    null = jnp.zeros((1, 2, 32))
    unconditional = denoise(params, x, sigma, told._replace(text=null)).velocity
    denoiser, weights = guided(network, params, null, 3.0)
    got = jax.jit(denoiser.denoise)(weights, x, sigma, told).velocity
    np.testing.assert_allclose(got, unconditional + 3 * (out - unconditional), atol=1e-4)
    with pytest.raises(ValueError, match="image_dim=40 got no picture"):
        network.denoise(params, x, sigma, Conditioning(told.text))
    read = network.read(params, told)
    given = Inputs(jnp.concatenate([x, told.channels], -1), 1000 * sigma, read)
    again = apply_wan(params, given, I2V, Compute())
    np.testing.assert_allclose(again, out, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (SMALL, (3, 8, 6)),
        (WanConfig(64, 4, 3, 80, 4, 4, (1, 2, 2), 24, 7, 32, 0, 1e-6), (2, 4, 10)),
        (WanConfig(96, 2, 1, 64, 3, 3, (1, 6, 6), 16, 5, 64, 0, 1e-6), (4, 12, 12)),
    ],
)
def test_equals_diffusers(config, shape):
    torch = pytest.importorskip("torch")
    network = wan_of_diffusers(config)
    params = randomised(shapes_of(config), 1)
    missing = network.load_state_dict(to_diffusers(params, config), strict=True)
    assert not missing.missing_keys
    x, timestep, text = wan_inputs(2, config, 2, *shape, rows=config.text_length)
    ours = apply_wan(params, seen(x, timestep, text), config, Compute())
    with torch.no_grad():
        theirs = network(
            torch.tensor(x.transpose(0, 4, 1, 2, 3)), torch.tensor(timestep), torch.tensor(text)
        ).sample
    np.testing.assert_allclose(
        np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 4, 1), atol=2e-5, rtol=1e-5
    )
    assert np.std(ours) > 0.05


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("wan2.1-t2v-1.3b", 1_418_996_800),
        ("wan2.1-t2v-14b", 14_288_491_584),
        ("wan2.1-i2v-14b", 16_394_878_784),
    ],
)
def test_real_sizes_trace(preset, count):
    config = PRESETS[preset]
    params = shapes_of(config)
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    text = spec(1, 512, 4096)
    picture = (spec(1, 257, 1280), spec(1, 21, 60, 104, 20)) if config.image_dim else ()
    given = Inputs(spec(1, 21, 60, 104, config.in_channels), spec(1), Conditioning(text, *picture))
    compute = Compute(jnp.bfloat16, remat="all")
    out = jax.eval_shape(lambda p, given: apply_wan(p, given, config, compute), params, given)
    assert out.shape == (1, 21, 60, 104, 16) and out.dtype == jnp.float32


@partial(jax.jit, static_argnames=("dtype", "remat", "residual", "kernel"))
def run(params, x, timestep, text, **how):
    return apply_wan(params, seen(x, timestep, text), SMALL, Compute(**how))


def test_one_sigma_per_frame_equals_one_per_clip():
    params, (x, t, text) = randomised(shapes_of(SMALL), 3), wan_inputs(4, SMALL)
    per_clip, per_frame = run(params, x, t, text), run(params, x, np.repeat(t[:, None], 3, 1), text)
    np.testing.assert_allclose(per_clip, per_frame, atol=1e-5)
    other = np.repeat(t[:, None], 3, 1) * np.array([[1.0, 1.0, 0.5]], np.float32)
    assert np.abs(run(params, x, other, text) - per_clip)[:, 2].max() > 1e-3


def test_padding_rows_of_text_are_seen():
    """Zero rows become a constant row after the MLP and take part in the softmax: dropping them
    changes the output.
    """
    params, (x, t, text) = (randomised(shapes_of(SMALL), 5), wan_inputs(6, SMALL, rows=5))
    padded = np.pad(text, ((0, 0), (0, 7), (0, 0)))
    np.testing.assert_array_equal(run(params, x, t, text), run(params, x, t, padded))
    short = WanConfig(**{**SMALL.__dict__, "text_length": 5})
    unpadded = apply_wan(params, seen(x, t, text), short, Compute())
    assert np.abs(unpadded - run(params, x, t, text)).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["blocks", "plain"])
@pytest.mark.parametrize("remat", get_args(Remat))
def test_remat_changes_nothing(remat, kernel):
    close(gradient(remat=remat, kernel=kernel), gradient(kernel=kernel), atol=1e-5)


@functools.cache
def gradient(**how):
    params, (x, t, text) = randomised(shapes_of(SMALL), 7), wan_inputs(8, SMALL)
    loss = lambda p: (run(p, x, t, text, **how) ** 2).mean()
    return jax.jit(jax.grad(loss))(params)


def test_tokens_rounded_between_blocks_change_a_gradient_less_than_products_in_bfloat16_do():
    def off(**how):
        far = lambda a, b: (np.linalg.norm(a - b), np.linalg.norm(b))
        pairs = jax.tree.map(far, gradient(**how), gradient())
        lengths = np.array(jax.tree.leaves(pairs)).reshape(-1, 2)
        return np.linalg.norm(lengths[:, 0]) / np.linalg.norm(lengths[:, 1])

    rounded, products = off(remat="all", residual=jnp.bfloat16), off(dtype=jnp.bfloat16)
    print(f"residual {rounded:.2%}, products {products:.2%}")
    assert 1e-5 < rounded < products


@pytest.mark.slow
def test_bfloat16_changes_little():
    params, (x, t, text) = randomised(shapes_of(SMALL), 7), wan_inputs(8, SMALL)
    full, half = run(params, x, t, text), run(params, x, t, text, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - full).mean() / np.abs(full).mean() < 0.03


def test_guidance_has_one_convention():
    """w = 1 is the conditional network; the peers' g = 3, c + g (c - u), is w = 4."""
    params, (x, _, text) = randomised(shapes_of(SMALL), 9), wan_inputs(10, SMALL)
    network, null = wan_denoiser(SMALL, Compute(), 3, 3), jnp.zeros((1, 12, 32))
    x, sigma, cond = jnp.asarray(x), jnp.array([0.9, 0.3]), Conditioning(jnp.asarray(text))

    def at(guidance):
        denoiser, weights = guided(network, params, null, guidance)
        return denoiser.denoise(weights, x, sigma, cond).x0

    c = network.denoise(params, x, sigma, cond).x0
    u = network.denoise(params, x, sigma, Conditioning(null.repeat(2, 0))).x0
    np.testing.assert_array_equal(at(1.0), c)
    np.testing.assert_allclose(at(4.0), c + 3.0 * (c - u), atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "height", "message"), [(3, 7, "does not split"), (3, 8, "at most text_length")]
)
def test_wrong_shapes_are_named(frames, height, message):
    params = shapes_of(SMALL)
    rows = 12 if message.startswith("does") else 13
    x, t, text = wan_inputs(0, SMALL, frames=frames, height=height, rows=rows)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: run(p, x, t, text), params)


def test_position_channels_tell_every_place_apart():
    """A network that reads more than it writes sees where it is; all places of a clip differ."""
    places = position_channels(9, 12, 12)
    assert (
        places.shape == (9, 12, 12, POSITION_CHANNELS)
        and len(np.unique(places.reshape(-1, POSITION_CHANNELS).round(4), axis=0)) == 9 * 12 * 12
    )
    config = WanConfig(**{**SMALL.__dict__, "in_channels": 16 + POSITION_CHANNELS})
    params, (x, _, text) = (randomised(shapes_of(config), 11), wan_inputs(12, SMALL))
    sigma = jnp.array([0.9, 0.3])
    network, cond = wan_denoiser(config, Compute(), 3, 3), Conditioning(jnp.asarray(text))
    got = network.denoise(params, jnp.asarray(x), sigma, cond)
    behind = np.concatenate(
        [x, np.broadcast_to(position_channels(3, 8, 6), (2, 3, 8, 6, POSITION_CHANNELS))], -1
    )
    direct = apply_wan(params, seen(behind, 1000 * sigma, text), config, Compute())
    np.testing.assert_allclose(got.velocity, direct, atol=1e-6)
    with pytest.raises(ValueError, match="3 additional input channels"):
        wan_denoiser(WanConfig(**{**SMALL.__dict__, "in_channels": 19}), Compute(), 3, 3)


@pytest.mark.parametrize(
    "axes", [{"data": 2, "context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
def test_tokens_cut_along_context_change_nothing(axes):
    """Loss and gradient of chunks that see a cache, and the keys and values that are kept, as on
    one device.
    """
    config = WanConfig(**{**SMALL.__dict__, "dim": 48, "num_heads": 4, "patch_size": (1, 2, 2)})
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | axes, jax.devices())
    params = randomised(shapes_of(config), 1)
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (4, 4, 4, 8, config.in_channels))
    clean = jax.random.normal(keys[1], x.shape)
    cond = Conditioning(jax.random.normal(keys[2], (4, 3, config.text_dim)))
    sigma = jnp.linspace(0.2, 0.9, 16).reshape(4, 4)
    policy = CachePolicy(chunk=2, first=2, window=0, sink=0, positions="absolute")

    def run(mesh):
        network = wan_denoiser(config, Compute(remat="all", mesh=mesh), 4, 2)

        def loss(params):
            plan = plan_teacher_forcing(network, params, clean, cond, policy)
            return (network.denoise(params, x, sigma, cond, plan).velocity ** 2).mean(), plan.memory

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    close(run(mesh), run(None), rtol=2e-4, atol=2e-5)


def test_time_is_embedded_to_the_last_bits_of_float32():
    """Angles of up to 1000: in float32 alone their cosines are off by 4e-5."""
    drawn = np.random.default_rng(0).uniform(0, 1000, 4000)
    timestep = np.concatenate([drawn, [0, 0.02, 416.67, 999.9, 1000]]).astype(np.float32)
    for count in (16, 32, 128):
        angles = timestep[:, None].astype(np.float64) * 10_000.0 ** (-np.arange(count) / count)
        found = jax.jit(cos_sin, static_argnums=1)(timestep, count)
        for ours, wanted in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=2e-7)
