"""The tiny decoder against torch, streams against whole videos, and the files it is read from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from salt_jax.convert.tiny_decoder import read_tiny_decoder
from salt_jax.errors import UserError
from salt_jax.models.tiny_decoder import WIDTHS, decode_tiny, decoder_shapes
from tests.convert.networks import save_torch
from tests.models.taehv import arrays_of, decode_with_torch

decode = jax.jit(decode_tiny, static_argnums=3)
NARROW = (8, 8, 4, 4)


@pytest.fixture(scope="module")
def arrays():
    return arrays_of(dtype=np.float16)


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    """As the author publishes it: with an encoder beside it, whose arrays nobody looks at."""
    encoder = {"encoder.0.weight": np.ones((64, 3, 3, 3), np.float16)}
    return save_torch(tmp_path_factory.mktemp("tiny") / "taew2_1.pth", encoder | arrays)


def random_params(seed=0):
    """A narrow network; kernels of variance 1 / fan-in."""
    rng = np.random.default_rng(seed)
    draw = lambda w: jnp.asarray(
        rng.normal(size=w.shape) * np.prod(w.shape[:-1]) ** -0.5, jnp.float32
    )
    return jax.tree.map(draw, decoder_shapes(NARROW, 16))


def random_latents(frames, batch=2, seed=0):
    draws = np.random.default_rng(seed).normal(size=(batch, frames, 2, 3, 16))
    return jnp.asarray(draws, jnp.float32)


@pytest.mark.parity
def test_it_equals_torch(arrays, file):
    pytest.importorskip("torch")
    z = random_latents(3)
    frames, _ = decode(read_tiny_decoder(file), None, z, jnp.float32)
    assert frames.shape == (2, 9, 16, 24, 3) and frames.dtype == jnp.float32
    for mine, latents in zip(frames, z, strict=True):
        want = decode_with_torch(arrays, latents.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(mine, 2 * want - 1, atol=2e-5, rtol=0)
        assert want.std() > 0.1 and np.isin(want, (0, 1)).mean() < 0.2


@pytest.mark.parametrize("splits", [[1, 2, 2], [3, 2], [1, 1, 1, 1, 1]])
def test_a_stream_is_the_whole_video(splits):
    params, z = random_params(), random_latents(5)
    whole, _ = decode(params, None, z, jnp.float32)
    assert whole.shape == (2, 17, 16, 24, 3) and whole.std() > 0.1
    memory, stream, shapes = None, [], set()
    for chunk in jnp.split(z, np.cumsum(splits)[:-1], axis=1):
        frames, memory = decode(params, memory, chunk, jnp.float32)
        stream.append(frames)
        shapes.add(str(jax.tree.map(jnp.shape, memory)))
    np.testing.assert_allclose(jnp.concatenate(stream, axis=1), whole, atol=1e-6, rtol=0)
    assert len(shapes) == 1


def test_each_latent_reaches_all_later_frames_and_no_earlier_one():
    params, z = random_params(), random_latents(4)
    changed = jnp.concatenate([z[:, :2], -z[:, 2:3], z[:, 3:]], axis=1)
    before, after = (decode(params, None, x, jnp.float32)[0] for x in (z, changed))
    assert (before[:, :5] == after[:, :5]).all()
    assert (jnp.abs(before - after).max((0, 2, 3, 4))[5:] > 1e-3).all()


def test_bfloat16_stays_near_float32():
    params, z = random_params(), random_latents(2)
    exact, _ = decode(params, None, z, jnp.float32)
    rough, memory = decode(params, None, z, jnp.bfloat16)
    assert rough.dtype == jnp.float32 and 0 < jnp.abs(rough - exact).mean() < 0.03 * exact.std()
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(memory))


def test_both_kinds_of_files_are_read(arrays, file, tmp_path):
    read = read_tiny_decoder(file)
    like = decoder_shapes(WIDTHS, 16)
    assert jax.tree.map(lambda w: (w.shape, w.dtype), read) == jax.tree.map(
        lambda w: (w.shape, w.dtype), like
    )
    second = read["up"]["1"]["blocks"]["2"]["conv3"]
    kernel = arrays["decoder.11.conv.4.weight"].astype(np.float32)
    np.testing.assert_array_equal(second["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(second["bias"], arrays["decoder.11.conv.4.bias"])
    save_file(arrays, tmp_path / "tiny.safetensors")
    again = read_tiny_decoder(tmp_path / "tiny.safetensors")
    assert all(map(np.array_equal, *map(jax.tree.leaves, (read, again))))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"decoder.13.conv.weight": None},
         r"decoder\.13\.conv\.weight is absent, expected \(256, 128, 1, 1\)"),
        ({"decoder.1.weight": (256, 48, 3, 3)},
         r"decoder\.1\.weight is \(256, 48, 3, 3\), expected \(256, 16, 3, 3\)"),
        ({"decoder.23.bias": (12,)}, r"decoder\.23\.bias is \(12,\), expected absent"),
        ({"decoder.22.bias": np.zeros(3, np.int64)},
         r"decoder\.22\.bias is int64, expected floating point"),
    ],
)  # fmt: skip
def test_another_file_is_told_in_one_sentence(arrays, tmp_path, change, told):
    tensors = arrays | {
        name: np.zeros(to, np.float16) if isinstance(to, tuple) else to
        for name, to in change.items()
    }
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors .*{told}; name taew2_1") as error:
        read_tiny_decoder(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*taew2_1\.pth"):
        read_tiny_decoder(tmp_path / "taew2_1.pth")
