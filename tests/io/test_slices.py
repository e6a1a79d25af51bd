"""Slices of arrays in files: what numpy gives, and no more bytes than have to be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from salt_jax.errors import UserError
from salt_jax.io import slices as module
from salt_jax.io.files import as_path
from salt_jax.io.header import read_metadata
from salt_jax.io.slices import bounds, slices
from salt_jax.io.tensor_files import layer, list_tensors, load_weights, save_weights, view
from tests.buckets import bytes_read

ARRAY = np.arange(4 * 6 * 10, dtype=np.float32).reshape(4, 6, 10)
ROW, LAYER = 10 * 4, 6 * 10 * 4  # bytes


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(b"before!!" + ARRAY.tobytes() + b"after")
    return tmp_path / "file"


@pytest.fixture
def runs(monkeypatch):
    """The runs that are read."""
    seen, read = [], module.read_ranges
    monkeypatch.setattr(module, "read_ranges", lambda p, r: seen.extend(r) or read(p, r))
    return seen


@pytest.mark.parametrize(
    ("cuts", "shortest", "lengths"),
    [
        ([np.s_[:, :, :]], 1, [4 * LAYER]),
        ([np.s_[1:3, :, :]], 1, [2 * LAYER]),
        ([np.s_[0:2, :, :], np.s_[2:4, :, :]], 1, [2 * LAYER] * 2),
        ([np.s_[1:3, 2:5, :]], 1, [3 * ROW] * 2),
        ([np.s_[:, 3:6, :]], 1, [3 * ROW] * 4),
        ([np.s_[:, 3:6, :]], 4 * ROW, [4 * LAYER]),  # runs of three rows would be too short
        ([np.s_[1:3, 3:6, :]], 4 * ROW, [2 * LAYER]),
        ([np.s_[1:2, 2:4, 5:7]], 2 * ROW, [2 * ROW]),  # the cut through the rows is made in memory
        ([np.s_[1:2, 2:4, 0:5], np.s_[1:2, 2:4, 5:10]], ROW, [2 * ROW]),  # and they are read once
        ([np.s_[1:2, 2:4, 5:7]], 2 * ROW + 1, [LAYER]),
        ([np.s_[0:1, :, :], np.s_[0:1, :, :]], 10**6, [4 * LAYER]),  # small arrays at once
        ([np.s_[:, :, 5:10]], 1, [5 * 4] * 24),
    ],
)
def test_a_slice_is_read_in_as_few_runs_as_there_can_be(
    file, runs, monkeypatch, cuts, shortest, lengths
):
    monkeypatch.setattr(module, "SHORTEST", shortest)
    wanted = [bounds(cut, ARRAY.shape) for cut in cuts]
    take = slices(file, 8, ARRAY.dtype, ARRAY.shape, wanted)
    for cut, part in zip(cuts, wanted, strict=True):
        np.testing.assert_array_equal(take(part), ARRAY[cut])
    assert [length for _, length in runs] == lengths


def test_a_number_is_an_array_too(file):
    take = slices(file, 8 + 4, ARRAY.dtype, (), [()])
    assert take(()) == 1 and take(()).shape == ()


TREE = {
    "stacked": np.arange(8 * 16 * 4, dtype=np.float32).reshape(8, 16, 4),
    "bias": np.arange(16, dtype=np.float32),
    "count": np.float32(3),
    "empty": np.zeros((0, 4), np.float32),
}


def saved(folder):
    save_weights(f"{folder}/w.safetensors", TREE, "float32", {"says": "this"})
    return as_path(f"{folder}/w.safetensors")


def test_of_a_file_in_a_bucket_the_header_is_read_and_what_devices_hold(bucket, monkeypatch):
    """All that is read of a layer of one array is this layer; of a tree every byte once."""
    file, total = saved(bucket), sum(np.asarray(a).nbytes for a in TREE.values())
    with bytes_read() as seen:
        assert read_metadata(file) == {"says": "this"}
        found, _ = list_tensors(file)
    assert len(seen) == 4  # two for each header
    monkeypatch.setattr(module, "SHORTEST", 1)
    with bytes_read() as seen:
        np.testing.assert_array_equal(layer(found["stacked"], 5), TREE["stacked"][5])
    assert seen == [16 * 4 * 4]
    np.testing.assert_array_equal(view(found["stacked"]), TREE["stacked"])
    assert view(found["empty"]).shape == (0, 4) and view(found["count"]) == 3
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {"stacked": P(None, "x"), "bias": P("y"), "count": P(), "empty": P()}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with bytes_read() as seen:
        tree = load_weights(file, TREE, shardings=places)
    assert sum(seen[2:]) == total
    for name, value in TREE.items():
        np.testing.assert_array_equal(np.asarray(tree[name]), value)
        assert tree[name].sharding == places[name]
    alone = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), P())
    half = load_weights(file, TREE, jnp.bfloat16, dict.fromkeys(TREE, alone))
    np.testing.assert_array_equal(np.asarray(half["bias"], np.float32), TREE["bias"])
    np.testing.assert_array_equal(load_weights(file, TREE)["stacked"], TREE["stacked"])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:-1], "cut off or damaged"),
        (lambda data: data + b"more", "cut off or damaged"),
        (lambda data: data[:40], "ends before byte"),
        (lambda data: b"\xff" * 8 + data[8:], "its header would have"),
        (lambda data: data[:8] + b"x" + data[9:], "is no description of arrays"),
        (lambda data: data.replace(b"[16]", b"[17]"), "bias has 64 bytes"),
        (lambda data: data.replace(b'"F32"', b'"F33"'), "is F33, which cannot be read here"),
    ],
)
def test_a_damaged_file_in_a_bucket_is_refused(bucket, damage, told):
    file = saved(bucket)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=told):
        load_weights(file, TREE)
