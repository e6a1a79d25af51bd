"""A tree comes back as it was written, or is refused with the file and the first difference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from salt_jax.errors import UserError
from salt_jax.io import tensor_files
from salt_jax.io.files import all_or_nothing
from salt_jax.io.tensor_files import (
    TensorWriter,
    list_tensors,
    load_weights,
    save_weights,
    view,
    write_tensors,
)
from salt_jax.sharding import make_mesh
from tests.helpers import same_bits


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
    same_bits(found, tree())
    with safe_open(file, "numpy") as stored:
        assert (
            stored.metadata() == {"made_by": "a test"}
            and "wan/blocks/ffn_in/kernel" in stored.keys()
        )
    # nothing half-written is left
    assert [path.name for path in file.parent.iterdir()] == [file.name]


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


def test_bfloat16_is_written_and_kept_as_stored(tmp_path):
    numbers = jnp.linspace(-2, 2, 1000)
    save_weights(
        tmp_path / "w.safetensors", {"a": {"kernel": numbers}, "b": numbers[:3]}, "bfloat16", {}
    )
    found = load_weights(
        tmp_path / "w.safetensors", {"a": {"kernel": numbers}, "b": numbers[:3]}, None
    )
    assert found["a"]["kernel"].dtype == jnp.bfloat16
    want = np.asarray(numbers).astype(ml_dtypes.bfloat16)
    assert np.asarray(found["a"]["kernel"]).tobytes() == want.tobytes()
    np.testing.assert_array_equal(load_file(tmp_path / "w.safetensors")["b"], want[:3])


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_every_device_gets_its_slice_straight_from_the_file(tmp_path, monkeypatch, dtype):
    """Nothing larger than a slice is read, except what every device has whole."""
    rng = np.random.default_rng(0)
    whole = {
        "kernel": rng.standard_normal((3, 16, 8)).astype(np.float32),
        "bias": np.float32([1, 2, 3]),
    }
    save_weights(tmp_path / "w.safetensors", whole, "bfloat16", {})
    mesh = make_mesh({"data": 1, "fsdp": 4, "context": 1, "tensor": 2})
    specs = {"kernel": P(None, "fsdp", "tensor"), "bias": P()}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            got = super().__getitem__(index)
            read.append((self.shape, got.shape))
            return got

    monkeypatch.setattr(
        tensor_files, "view", lambda stored, view=tensor_files.view: view(stored).view(Watched)
    )
    found = load_weights(tmp_path / "w.safetensors", whole, dtype, places)
    assert {size for shape, size in read if shape == (3, 16, 8)} == {(3, 4, 4)}
    for name, array in found.items():
        want = whole[name].astype(ml_dtypes.bfloat16)
        assert array.sharding == places[name] and array.dtype == (dtype or jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(array, np.float32), want.astype(np.float32))
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(array)[shard.index])


def test_written_arrays_of_many_kinds_are_read_by_the_library_of_the_format(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.safetensors"
    arrays = {
        "odd/bf16": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "f32": rng.standard_normal(7).astype("f4"),
        "scalar": np.float32(2.5), "empty": np.zeros((0, 4), "f4"),
        "f16": rng.standard_normal((2, 3)).astype("f2"),
    }  # fmt: skip
    pieces = lambda a: np.array_split(a, 2) if a.ndim else [np.asarray(a)]
    out = {
        name: TensorWriter(a.dtype, a.shape, lambda a=a: pieces(a)) for name, a in arrays.items()
    }
    told = []
    write_tensors(path, out, {"by": "a test", "umlaut": "ä"}, told.append)
    found = load_file(path)
    assert found.keys() == arrays.keys() and sum(told) == sum(a.nbytes for a in arrays.values())
    stored, metadata = list_tensors(path)
    assert metadata == {"by": "a test", "umlaut": "ä"}
    for name, array in arrays.items():
        for got in (found[name], view(stored[name])):
            assert (
                got.dtype == array.dtype
                and got.shape == array.shape
                and got.tobytes() == array.tobytes()
            )
        assert stored[name].offset % array.dtype.itemsize == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")

    def parts():
        yield np.zeros(2, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": TensorWriter(np.dtype("f4"), (4,), parts)}, {})
    with pytest.raises(ValueError, match="the parts of a and its shape differ by 8 bytes"):
        write_tensors(
            path, {"a": TensorWriter(np.dtype("f4"), (4,), lambda: [np.zeros(2, "f4")])}, {}
        )
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == "old"
    with pytest.raises(
        UserError, match=r"cannot write .*absent/x\.safetensors .*choose another place"
    ):
        write_tensors(tmp_path / "absent" / "x.safetensors", {}, {})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    dst = tmp_path / "a" / "b"
    with pytest.raises(KeyError), all_or_nothing(dst) as folder:
        (folder / "x").write_text("half")
        raise KeyError
    assert not dst.exists()
    dst.mkdir(parents=True)
    (dst / "kept").write_text("old")
    (dst / "x").write_text("old")
    (dst / ".partial").mkdir()  # of a run that was killed
    (dst / ".partial" / "junk").write_text("junk")
    with all_or_nothing(dst) as folder:
        (folder / "x").write_text("new")
        (folder / "deep").mkdir()
        (folder / "deep" / "y").write_text("new")
    found = {str(p.relative_to(dst)): p.read_text() for p in dst.rglob("*") if p.is_file()}
    assert found == {"kept": "old", "x": "new", "deep/y": "new"} and not (dst / ".partial").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), all_or_nothing(tmp_path / "file"):
        pass
