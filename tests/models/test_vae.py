"""The VAE against diffusers, its causality, streams against whole videos, and tiles."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models import vae, vae_blocks
from salt_jax.models.vae import PRESETS, VAEConfig, init_vae
from tests.helpers import shapes_of
from tests.models.oracles import from_diffusers, make_oracle

TINY = PRESETS["tiny"]
# config, dtype, tile, overlap
jitted = lambda run, n=2: jax.jit(run, static_argnums=tuple(range(2, 2 + n)))
_encode, _decode = jitted(vae.encode_video), jitted(vae.decode_video)
encode = lambda params, video, config=TINY, dtype=jnp.float32: _encode(params, video, config, dtype)
decode = lambda params, z, config=TINY, dtype=jnp.float32: _decode(params, z, config, dtype)


def random_params(config=TINY, seed=0):
    """Every leaf random: kernels of variance 1 / fan-in, gains around 1, biases 0.1; few pixels
    reach the clamp.
    """
    rng = np.random.default_rng(seed)

    def draw(path, w):
        std = np.prod(w.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
        std *= 0.5 if path[0].key == "decoder" and path[1].key == "conv_out" else 1
        return jnp.asarray((path[-1].key == "scale") + std * rng.normal(size=w.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config, init_vae))


def random_video(frames, height=16, width=24, batch=2, seed=0):
    video = np.random.default_rng(seed).uniform(-1, 1, (batch, frames, height, width, 3))
    return jnp.asarray(video, jnp.float32)


def random_latents(frames, height=2, width=3, batch=2, seed=0):
    return jnp.asarray(
        np.random.default_rng(seed).normal(size=(batch, frames, height, width, 16)), jnp.float32
    )


@pytest.fixture(scope="module")
def oracle():
    return make_oracle(TINY, base_dim=8, z_dim=16)


def to_torch(x):
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 4, 1, 2, 3)


def oracle_encode(module, video):
    latents = module.encode(to_torch(video)).latent_dist.mode().permute(0, 2, 3, 4, 1).numpy()
    return (latents - np.array(module.config.latents_mean)) / np.array(module.config.latents_std)


def oracle_decode(module, z):
    z = np.asarray(z) * np.array(module.config.latents_std, np.float32) + np.float32(
        module.config.latents_mean
    )
    return module.decode(to_torch(z)).sample.permute(0, 2, 3, 4, 1).numpy()


def check_encode(oracle, video, config=TINY):
    module, params = oracle
    want = oracle_encode(module, video)
    np.testing.assert_allclose(encode(params, video, config), want, atol=1e-5, rtol=0)
    assert want.std() > 0.1  # the tolerance is judged against outputs of order one


def check_decode(oracle, z, config=TINY):
    module, params = oracle
    want = oracle_decode(module, z)
    np.testing.assert_allclose(decode(params, z, config), want, atol=2e-5, rtol=0)
    assert want.std() > 0.1 and (np.abs(want) == 1).mean() < 0.2


@pytest.mark.parity
@pytest.mark.parametrize(
    "frames", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 9, 13))]
)
def test_encode_equals_diffusers(oracle, frames):
    check_encode(oracle, random_video(frames))


@pytest.mark.parity
@pytest.mark.parametrize(
    "frames", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3)), 4]
)
def test_decode_equals_diffusers(oracle, frames):
    check_decode(oracle, random_latents(frames))


@pytest.mark.slow
@pytest.mark.parity
def test_full_size_equals_diffusers():
    config = PRESETS["wan2.1"]
    oracle = make_oracle(config)
    check_encode(oracle, random_video(5, 64, 64, batch=1), config)
    check_decode(oracle, random_latents(2, 8, 8, batch=1), config)


def test_full_size_has_the_published_parameter_count():
    params = shapes_of(PRESETS["wan2.1"], init_vae)
    count = lambda tree: sum(w.size for w in jax.tree.leaves(tree))
    assert (count(params["encoder"]), count(params["decoder"])) == (53_595_872, 73_295_331)
    assert (count(params), len(jax.tree.leaves(params))) == (126_892_531, 194)


@pytest.mark.slow
def test_fresh_kernels_keep_the_scale_of_what_they_read():
    params = jax.jit(lambda k: init_vae(k, TINY))(jax.random.key(0))
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            assert 0.8 < float(w.std()) * np.prod(w.shape[:-1]) ** 0.5 < 1.2, jax.tree_util.keystr(
                path
            )
        else:
            assert (w == (path[-1].key == "scale")).all()
    first, second = (params["encoder"]["down"][i]["conv1"]["kernel"] for i in "01")
    # no two kernels share a draw
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


@pytest.mark.slow
def test_later_frames_change_no_earlier_latent():
    params, video = random_params(), random_video(13)
    changed = jnp.concatenate([video[:, :5], -video[:, 5:]], axis=1)
    before, after = encode(params, video), encode(params, changed)
    assert (before[:, :2] == after[:, :2]).all()
    assert (jnp.abs(before - after).max((0, 2, 3, 4))[2:] > 1e-3).all()


def test_later_latents_change_no_earlier_frame():
    params, z = random_params(), random_latents(4)
    changed = jnp.concatenate([z[:, :2], -z[:, 2:]], axis=1)
    before, after = decode(params, z), decode(params, changed)
    assert (before[:, :5] == after[:, :5]).all()
    assert (jnp.abs(before - after).max((0, 2, 3, 4))[5:] > 1e-3).all()
    assert before.shape == (2, 13, 16, 24, 3)


@pytest.mark.slow
@pytest.mark.optimized
def test_a_stream_is_the_whole_video_bit_for_bit():
    params, z = random_params(), random_latents(5)
    frames, memory = jax.jit(lambda p, z: vae.decode_first(p, z, TINY, jnp.float32))(
        params, z[:, :1]
    )
    go_on = jax.jit(lambda p, memory, z: vae.decode_next(p, memory, z, TINY, jnp.float32))
    stream = [frames]
    for a, b in pairwise([1, 2, 3, 5]):
        frames, memory = go_on(params, memory, z[:, a:b])
        stream.append(frames)
    np.testing.assert_array_equal(jnp.concatenate(stream, axis=1), decode(params, z))


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    params, video = random_params(), random_video(5)
    exact, rough = encode(params, video), encode(params, video, TINY, jnp.bfloat16)
    assert rough.dtype == jnp.float32 and 0 < jnp.abs(rough - exact).mean() < 0.03 * exact.std()
    exact, rough = decode(params, exact), decode(params, exact, TINY, jnp.bfloat16)
    assert rough.dtype == jnp.float32 and 0 < jnp.abs(rough - exact).mean() < 0.03 * exact.std()


@pytest.mark.parametrize(
    ("taps", "stride", "padding"),
    [(3, (1, 1, 1), None), (3, (2, 1, 1), (0, 0)), (1, (1, 2, 2), (0, 1))],
)
def test_convolution_frame_by_frame_is_the_one_in_3d(taps, stride, padding):  # fmt: skip
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel, bias, x = draw(taps, 3, 3, 4, 5), draw(5), draw(2, 7, 6, 8, 4)
    how = dict(stride=stride, pad=[padding or (1, 1)] * 2)
    at_once = vae_blocks.conv_at_once(x, kernel, **how)
    np.testing.assert_allclose(
        vae_blocks.conv_by_frame(x, kernel, **how), at_once, atol=2e-5, rtol=0
    )
    here = vae_blocks.conv({"kernel": kernel, "bias": bias}, x, stride, padding)
    np.testing.assert_allclose(here, at_once + bias[None, None, None, None], atol=2e-5, rtol=0)


def test_the_devices_that_a_program_is_for_decide_how_it_convolves():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x = {"kernel": draw(3, 3, 3, 4, 5), "bias": draw(5)}, draw(2, 7, 6, 8, 4)
    traced = jax.jit(vae_blocks.conv).trace(params, x)
    count = lambda platform: (
        traced.lower(lowering_platforms=(platform,)).as_text().count("convolution")
    )
    assert (count("cpu"), count("tpu")) == (3, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 16, 16, 3), "4 frames"),
        ((1, 5, 16, 20, 3), "16 x 20"),
        ((1, 5, 12, 16, 3), "12 x 16"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(shape, message):
    for run in (
        partial(vae.encode_video, config=TINY, dtype=jnp.float32),
        partial(vae.encode_tiled, config=TINY, dtype=jnp.float32, tile=4, overlap=1),
    ):
        with pytest.raises(ValueError, match=message):
            run({}, jnp.zeros(shape))


def test_other_misfits_are_refused():
    with pytest.raises(ValueError, match="z_dim=8"):
        VAEConfig(8, 8)
    with pytest.raises(ValueError, match="one latent frame, not 2"):
        vae.decode_first({}, random_latents(2), TINY, jnp.float32)
    with pytest.raises(ValueError, match="overlap=4"):
        vae.decode_tiled({}, random_latents(1), TINY, jnp.float32, tile=4, overlap=4)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(60, 32, 8), (104, 32, 8), (33, 32, 8), (20, 8, 6), (7, 9, 2)]
)
@pytest.mark.parametrize("unit", [1, 8])
def test_tiles_cover_an_axis_and_their_weights_sum_to_one(size, tile, overlap, unit):
    starts, weights = vae._axis_tiles(size, tile, overlap, unit)
    tile = min(tile, size)
    assert (
        starts[0] == 0 and starts[-1] + tile == size and weights.shape == (len(starts), tile * unit)
    )
    assert all(overlap <= before + tile - start < tile for before, start in pairwise(starts))
    total = np.zeros(size * unit)
    for start, weight in zip(starts, weights, strict=True):
        total[start * unit :][: tile * unit] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parity
def test_tiles_equal_those_of_diffusers():
    """Where both have the same tiles: two by two of 8 x 8, of which diffusers cuts off 2 for a
    third. It blends corners, where four tiles meet, one axis after the other, so that their weights
    do not sum like ours.
    """
    module, _ = make_oracle(TINY, base_dim=8, z_dim=16)
    module.decoder.conv_out.weight.mul_(
        0.2
    )  # no pixel may reach the clamp: we clamp before blending, it after
    params = jax.tree.map(jnp.asarray, from_diffusers(module.state_dict()))
    module.enable_tiling(64, 64, 48, 48)
    for run, unit, want, x in (
        (vae.encode_tiled, 1, oracle_encode, random_video(1, 112, 112, batch=1)),
        (vae.decode_tiled, 8, oracle_decode, random_latents(1, 14, 14, batch=1)),
    ):
        got, want = jitted(run, 4)(params, x, TINY, jnp.float32, 8, 2), want(module, x)
        assert unit == 1 or np.abs(want).max() < 1
        same = np.ones((12 * unit, 12 * unit), bool)
        same[6 * unit : 8 * unit, 6 * unit : 8 * unit] = False
        got, want = (np.asarray(y)[:, :, : 12 * unit, : 12 * unit][:, :, same] for y in (got, want))
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_one_tile_is_the_untiled_result_and_several_are_near():
    params, z = random_params(), random_latents(2, 6, 12, batch=1)
    whole = decode(params, z)
    tiled = lambda *size: jitted(vae.decode_tiled, 4)(params, z, TINY, jnp.float32, *size)
    np.testing.assert_allclose(tiled(12, 0), whole, atol=1e-6)
    error = lambda got: float(jnp.abs(got - whole).mean())
    assert 0 < error(tiled(8, 6)) < error(tiled(8, 0)) < 0.5 * float(whole.std())


@pytest.mark.slow
@pytest.mark.optimized
def test_tiles_need_less_memory():
    params, z = random_params(), random_latents(2, 32, 32, batch=1)
    memory = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    whole = memory(_decode.lower(params, z, TINY, jnp.float32).compile())
    tiles = memory(jitted(vae.decode_tiled, 4).lower(params, z, TINY, jnp.float32, 12, 4).compile())
    assert tiles < whole / 3
