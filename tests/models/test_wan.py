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

from salt_jax.models.denoiser import POSITION_CHANNELS, guided, position_channels, wan_network
from salt_jax.models.memory import CachePolicy
from salt_jax.models.presets import PRESETS, Compute, Remat, WanConfig
from salt_jax.models.wan import apply_wan, init_wan
from salt_jax.rollout.causal import teacher_forcing
from salt_jax.sharding import make_mesh
from salt_jax.types import ImageText

SMALL = WanConfig(48, 2, 2, 96, 16, 16, (1, 2, 2), 32, 12, 64, 0, 1e-6)


def randomised(params, seed):
    """Every leaf random, gains around one: default zeros and ones would hide a wrong mapping."""
    rng = np.random.default_rng(seed)
    noise = lambda path, p: (
        0.08 * rng.standard_normal(p.shape) + (path[-1].key == "scale")
    ).astype(np.float32)
    return jax.tree_util.tree_map_with_path(noise, params)


def inputs(seed, config=SMALL, batch=2, frames=3, height=8, width=6, rows=12):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, frames, height, width, config.in_channels)).astype(np.float32)
    text = rng.standard_normal((batch, rows, config.text_dim)).astype(np.float32)
    return x, np.array([937.5, 20.25], np.float32)[:batch], text


def to_diffusers(params, config):
    """Our tree under diffusers' names, torch tensors: written from the name table, not from our
    loader.
    """
    torch = pytest.importorskip("torch")
    out = {}

    def linear(name, p):
        out[f"{name}.weight"], out[f"{name}.bias"] = p["kernel"].T, p["bias"]

    pt, ph, pw = config.patch_size
    patch = params["patch_embedding"]
    out["patch_embedding.weight"] = patch["kernel"].T.reshape(
        config.dim, config.in_channels, pt, ph, pw
    )
    out["patch_embedding.bias"] = patch["bias"]
    for ours, theirs in (("time", "time_embedder"), ("text", "text_embedder")):
        linear(f"condition_embedder.{theirs}.linear_1", params[f"{ours}_embedding"]["in"])
        linear(f"condition_embedder.{theirs}.linear_2", params[f"{ours}_embedding"]["out"])
    linear("condition_embedder.time_proj", params["time_embedding"]["projection"])
    linear("proj_out", params["head"]["linear"])
    out["scale_shift_table"] = params["head"]["modulation"][None]
    if config.image_dim:
        image, theirs = params["image_embedding"], "condition_embedder.image_embedder"
        for a, b in (("norm_in", "norm1"), ("norm_out", "norm2")):
            out[f"{theirs}.{b}.weight"], out[f"{theirs}.{b}.bias"] = (
                image[a]["scale"],
                image[a]["bias"],
            )
        linear(f"{theirs}.ff.net.0.proj", image["in"])
        linear(f"{theirs}.ff.net.2", image["out"])
    for i in range(config.num_layers):
        block, name = jax.tree.map(lambda p, i=i: p[i], params["blocks"]), f"blocks.{i}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                linear(f"{name}.{theirs}.{b}", block[ours][a])
            for norm in ("norm_q", "norm_k"):
                out[f"{name}.{theirs}.{norm}.weight"] = block[ours][norm]["scale"]
        if config.image_dim:
            linear(f"{name}.attn2.add_k_proj", block["cross_attn"]["k_img"])
            linear(f"{name}.attn2.add_v_proj", block["cross_attn"]["v_img"])
            out[f"{name}.attn2.norm_added_k.weight"] = block["cross_attn"]["norm_k_img"]["scale"]
        out[f"{name}.norm2.weight"], out[f"{name}.norm2.bias"] = (
            block["norm_cross"]["scale"],
            block["norm_cross"]["bias"],
        )
        linear(f"{name}.ffn.net.0.proj", block["ffn_in"])
        linear(f"{name}.ffn.net.2", block["ffn_out"])
        out[f"{name}.scale_shift_table"] = block["modulation"][None]
    return {k: torch.tensor(np.array(v)) for k, v in out.items()}


def oracle(config):
    """diffusers' network of the same sizes."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    ).eval()


I2V = PRESETS["wan2.1-i2v-tiny"]


def image_text(seed, config, shape, rows):
    """What an image-to-video network is told, random, with 3 image rows."""
    rng, (batch, frames, height, width) = np.random.default_rng(seed), shape
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    condition = draw(batch, frames, height, width, config.condition_channels)
    return ImageText(
        draw(batch, rows, config.text_dim), draw(batch, 3, config.image_dim), condition
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    "config",
    [I2V, WanConfig(96, 4, 3, 80, 12, 4, (1, 2, 2), 24, 512, 32, 24, 1e-6)],
)
def test_image_to_video_equals_diffusers(config):
    """diffusers takes text to have 512 rows and the image to be what is before them."""
    torch = pytest.importorskip("torch")
    theirs, params = oracle(config), randomised(init_wan(jax.random.key(0), config), 1)
    assert not theirs.load_state_dict(to_diffusers(params, config), strict=True).missing_keys
    told = image_text(3, config, (2, 3, 4, 6), 512)
    x = (
        np.random.default_rng(2)
        .standard_normal((2, 3, 4, 6, config.out_channels))
        .astype(np.float32)
    )
    sigma = np.array([0.9375, 0.02], np.float32)
    denoise = wan_network(config, Compute(), 3, 3).denoise
    ours = denoise(params, jnp.asarray(x), jnp.asarray(sigma), told).velocity
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(np.concatenate([x, told.condition], -1).transpose(0, 4, 1, 2, 3)),
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
    params, network = (
        randomised(init_wan(jax.random.key(0), I2V), 1),
        wan_network(I2V, Compute(), 3, 3),
    )
    told, sigma = image_text(3, I2V, (1, 3, 4, 4), 5), jnp.array([0.9])
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 4, 4, 16)), jnp.float32)
    denoise = jax.jit(network.denoise)
    out = denoise(params, x, sigma, told).velocity
    for name in told._fields:
        other = told._replace(**{name: getattr(told, name)[..., ::-1]})
        assert np.abs(denoise(params, x, sigma, other).velocity - out).max() > 1e-3, name
    null = jnp.zeros((1, 2, 32))
    unconditional = denoise(params, x, sigma, told._replace(text=null)).velocity
    got = guided(denoise, null, 3.0)(params, x, sigma, told).velocity
    np.testing.assert_allclose(got, unconditional + 3 * (out - unconditional), atol=1e-4)
    with pytest.raises(ValueError, match="image_dim=40 was told"):
        network.denoise(params, x, sigma, told.text)
    read = network.read_text(params, told)
    again = apply_wan(
        params, jnp.concatenate([x, told.condition], -1), 1000 * sigma, read, I2V, Compute()
    )
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
    network, params = oracle(config), randomised(init_wan(jax.random.key(0), config), 1)
    missing = network.load_state_dict(to_diffusers(params, config), strict=True)
    assert not missing.missing_keys
    x, timestep, text = inputs(2, config, 2, *shape, rows=config.text_length)
    ours = apply_wan(
        params, jnp.asarray(x), jnp.asarray(timestep), jnp.asarray(text), config, Compute()
    )
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
    params = jax.eval_shape(lambda key: init_wan(key, config), jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(params)) == count
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    text = spec(1, 512, 4096)
    told = (
        ImageText(text, spec(1, 257, 1280), spec(1, 21, 60, 104, 20)) if config.image_dim else text
    )
    out = jax.eval_shape(
        lambda p, x, t, c: apply_wan(p, x, t, c, config, Compute(jnp.bfloat16, remat="all")),
        params, spec(1, 21, 60, 104, config.in_channels), spec(1), told,
    )  # fmt: skip
    assert out.shape == (1, 21, 60, 104, 16) and out.dtype == jnp.float32


@partial(jax.jit, static_argnames=("dtype", "remat", "residual", "kernel"))
def run(params, x, timestep, text, **how):
    return apply_wan(params, *map(jnp.asarray, (x, timestep, text)), SMALL, Compute(**how))


def test_one_sigma_per_frame_equals_one_per_clip():
    params, (x, t, text) = randomised(init_wan(jax.random.key(0), SMALL), 3), inputs(4)
    per_clip, per_frame = run(params, x, t, text), run(params, x, np.repeat(t[:, None], 3, 1), text)
    np.testing.assert_allclose(per_clip, per_frame, atol=1e-5)
    other = np.repeat(t[:, None], 3, 1) * np.array([[1.0, 1.0, 0.5]], np.float32)
    assert np.abs(run(params, x, other, text) - per_clip)[:, 2].max() > 1e-3


def test_padding_rows_of_text_are_seen():
    """Zero rows become a constant row after the MLP and take part in the softmax: dropping them
    changes the output.
    """
    params, (x, t, text) = randomised(init_wan(jax.random.key(0), SMALL), 5), inputs(6, rows=5)
    padded = np.pad(text, ((0, 0), (0, 7), (0, 0)))
    np.testing.assert_array_equal(run(params, x, t, text), run(params, x, t, padded))
    short = WanConfig(**{**SMALL.__dict__, "text_length": 5})
    unpadded = apply_wan(params, *map(jnp.asarray, (x, t, text)), short, Compute())
    assert np.abs(unpadded - run(params, x, t, text)).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["blocks", "plain"])
@pytest.mark.parametrize("remat", get_args(Remat))
def test_remat_changes_nothing(remat, kernel):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        gradient(kernel=kernel),
        gradient(remat=remat, kernel=kernel),
    )


@functools.cache
def gradient(**how):
    params, (x, t, text) = randomised(init_wan(jax.random.key(0), SMALL), 7), inputs(8)
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
    params, (x, t, text) = randomised(init_wan(jax.random.key(0), SMALL), 7), inputs(8)
    full, half = run(params, x, t, text), run(params, x, t, text, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - full).mean() / np.abs(full).mean() < 0.03


def test_guidance_has_one_convention():
    """w = 1 is the conditional network; the peers' g = 3, c + g (c - u), is w = 4."""
    params, (x, _, text) = randomised(init_wan(jax.random.key(0), SMALL), 9), inputs(10)
    denoise, null = wan_network(SMALL, Compute(), 3, 3).denoise, jnp.zeros((1, 12, 32))
    x, sigma, text = jnp.asarray(x), jnp.array([0.9, 0.3]), jnp.asarray(text)
    c, u = denoise(params, x, sigma, text), denoise(params, x, sigma, null.repeat(2, 0))
    np.testing.assert_array_equal(guided(denoise, null, 1.0)(params, x, sigma, text).x0, c.x0)
    peers = c.x0 + 3.0 * (c.x0 - u.x0)
    np.testing.assert_allclose(
        guided(denoise, null, 4.0)(params, x, sigma, text).x0, peers, atol=1e-5
    )


@pytest.mark.parametrize(
    ("frames", "height", "message"), [(3, 7, "does not split"), (3, 8, "at most text_length")]
)
def test_wrong_shapes_are_named(frames, height, message):
    params = jax.eval_shape(lambda key: init_wan(key, SMALL), jax.random.key(0))
    rows = 12 if message.startswith("does") else 13
    x, t, text = inputs(0, frames=frames, height=height, rows=rows)
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
    params, (x, _, text) = randomised(init_wan(jax.random.key(0), config), 11), inputs(12)
    sigma = jnp.array([0.9, 0.3])
    got = wan_network(config, Compute(), 3, 3).denoise(
        params, jnp.asarray(x), sigma, jnp.asarray(text)
    )
    behind = np.concatenate(
        [x, np.broadcast_to(position_channels(3, 8, 6), (2, 3, 8, 6, POSITION_CHANNELS))], -1
    )
    direct = apply_wan(
        params, jnp.asarray(behind), 1000 * sigma, jnp.asarray(text), config, Compute()
    )
    np.testing.assert_allclose(got.velocity, direct, atol=1e-6)
    with pytest.raises(ValueError, match="3 additional input channels"):
        wan_network(WanConfig(**{**SMALL.__dict__, "in_channels": 19}), Compute(), 3, 3)


@pytest.mark.parametrize(
    "axes", [{"data": 2, "context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
)
def test_tokens_cut_along_context_change_nothing(axes):
    """Loss and gradient of chunks that see a cache, and the keys and values that are kept, as on
    one device.
    """
    config = WanConfig(**{**SMALL.__dict__, "dim": 48, "num_heads": 4, "patch_size": (1, 2, 2)})
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | axes, jax.devices())
    params = randomised(init_wan(jax.random.key(0), config), 1)
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (4, 4, 4, 8, config.in_channels))
    clean = jax.random.normal(keys[1], x.shape)
    text = jax.random.normal(keys[2], (4, 3, config.text_dim))
    sigma = jnp.linspace(0.2, 0.9, 16).reshape(4, 4)
    policy = CachePolicy(chunk=2, first=2, window=0, sink=0, positions="absolute")

    def run(mesh):
        network = wan_network(config, Compute(remat="all", mesh=mesh), 4, 2)

        def loss(params):
            sight = teacher_forcing(network, params, clean, text, policy)
            return (
                network.denoise(params, x, sigma, text, sight).velocity ** 2
            ).mean(), sight.memory

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    for ours, alone in zip(jax.tree.leaves(run(mesh)), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=2e-4, atol=2e-5)
