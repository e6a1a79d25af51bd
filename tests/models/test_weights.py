"""A tree comes back as it was written, or is refused with the file and the first difference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from salt_jax.errors import UserError
from salt_jax.models.weights import load_weights, save_weights


def tree():
    numbers = jnp.array([[1.5, -0.0, 3e-5], [65504.0, 1 / 3, 7.0]], jnp.float32)
    return {
        "wan": {"blocks": {"ffn_in": {"kernel": numbers, "bias": numbers[0]}}},
        "head": {"bias": numbers[1]},
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, tree(), "float32", {"made_by": "a test"})
    return path


def refused(path, like, told):
    with pytest.raises(UserError, match=told) as error:
        load_weights(path, like)
    assert str(path) in str(error.value) and "config.weights" in str(error.value)
    assert "\n" not in str(error.value)


def test_float32_comes_back_bit_for_bit_from_shapes_alone(file):
    found = load_weights(file, jax.eval_shape(tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree()), strict=True):
        assert a.dtype == jnp.float32 and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with safe_open(file, "numpy") as stored:
        assert stored.metadata() == {"made_by": "a test"} and "wan/blocks/ffn_in/kernel" in stored.keys()
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written is left


def test_float16_halves_the_file_and_rounds(tmp_path):
    big = {"kernel": jnp.linspace(-2, 2, 10_000)}
    for dtype in ("float32", "float16"):
        save_weights(tmp_path / f"{dtype}.safetensors", big, dtype, {})
    sizes = [(tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in ("float32", "float16")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    found = load_weights(tmp_path / "float16.safetensors", big)["kernel"]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(big["kernel"], np.float16).astype(np.float32))


def test_bfloat16_files_of_others_are_read(tmp_path):
    save_file({"kernel": np.array([1.0, -2.5], ml_dtypes.bfloat16)}, tmp_path / "w.safetensors")
    found = load_weights(tmp_path / "w.safetensors", {"kernel": jnp.zeros(2)})
    np.testing.assert_array_equal(found["kernel"], np.float32([1.0, -2.5]))


def test_another_model_is_refused_at_the_first_difference(file):
    other = tree()
    other["head"]["bias"] = jnp.zeros(5)
    refused(file, other, r"head/bias is \(3,\), expected \(5,\).*config\.model\.preset")
    refused(file, tree() | {"zoom": jnp.zeros(2)}, r"zoom is absent, expected \(2,\)")
    refused(file, {"wan": tree()["wan"]}, r"head/bias is \(3,\), expected absent")


@pytest.mark.parametrize("size", [0, 5, 200, -4])
def test_a_cut_off_file_is_refused(file, size):
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    refused(file, tree(), "cannot read weights")


def test_what_is_no_weights_file_is_refused(tmp_path):
    refused(tmp_path / "nowhere.safetensors", tree(), "cannot read weights")
    refused(tmp_path, tree(), "cannot read weights")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>" * 10)
    refused(tmp_path / "page.safetensors", tree(), "cannot read weights")
