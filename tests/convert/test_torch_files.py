"""Files of torch.save are read as data: tensors come out right, and nothing that a file says is
ever run.
"""

import argparse
import collections
import datetime
import io
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from salt_jax.convert import torch_pickle
from salt_jax.convert.torch_files import read_torch
from salt_jax.errors import UserError
from salt_jax.io.tensor_files import TensorRef, view
from tests.convert.pickles import (
    REBUILD,
    Shell,
    archive,
    call,
    fp8,
    group,
    name,
    number,
    ordered,
    storage,
    table,
    tensor,
    text,
    whole,
)

OF_TYPE = name("torch._tensor", "_rebuild_from_type_v2")


NUMBERS = np.arange(12, dtype=np.float32)


def one(path, offset=0, shape=(3, 4), strides=(4, 1), key="0", count=12, data=None, **more):
    data = NUMBERS.tobytes() if data is None else data
    body = table({"w": tensor(storage("Float", key, count), offset, shape, strides)})
    return archive(path, body, {"0": data}, **more)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pt"


def refused(path, told):
    with pytest.raises(UserError, match=told) as error:
        read_torch(path)
    assert (
        str(path) in str(error.value)
        and len(str(error.value)) < 600
        and "\n" not in str(error.value)
    )


def test_tensors_of_every_kind_come_out(file):
    half = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    body = table(
        {
            "generator": ordered(
                {"a.weight": tensor(storage("Float", "0", 12), 2, (2, 3), (3, 1))}
            ),
            "t": tensor(storage("Float", "0", 12), 0, (4, 3), (1, 4)),
            "bf16": call(
                name("torch._utils", "_rebuild_parameter"),
                tensor(storage("BFloat16", "1", 3), 0, (3,), (1,)), b"\x88", b"N",
            ),
            "scalar": tensor(storage("Long", "2", 1), 0, (), ()),
            "empty": tensor(storage("Float", "3", 0), 0, (0, 5), (5, 1)),
            "step": number(7),
            "size": call(name("torch", "Size"), group(number(3))),
        }
    )  # fmt: skip
    data = {"0": NUMBERS.tobytes(), "1": half.tobytes(), "2": np.int64([-5]).tobytes(), "3": b""}
    found = read_torch(archive(file, body, data, byteorder="little"))
    np.testing.assert_array_equal(view(found["generator"]["a.weight"]), NUMBERS[2:8].reshape(2, 3))
    np.testing.assert_array_equal(view(found["t"]), NUMBERS.reshape(3, 4).T)
    assert found["bf16"].dtype == ml_dtypes.bfloat16 and (view(found["bf16"]) == half).all()
    assert view(found["scalar"]).shape == () and view(found["scalar"]) == -5
    assert view(found["empty"]).shape == (0, 5)
    assert found["step"] == 7 and found["size"] == (3,)


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_what_torch_writes(file, protocol):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    odd = torch.ones(3)
    odd.note = "a tensor with an attribute is rebuilt by its type"
    tensors = {
        "f32": base, "f16": base.half(), "bf16": base.bfloat16(), "i64": torch.arange(5),
        "u8": torch.arange(5).byte(), "bool": base > 0, "transposed": base.T,
        "view": base[2:, 1:7:2], "again": base, "scalar": torch.tensor(2.5), "odd": odd,
        "parameter": torch.nn.Parameter(base[1]), "buffer": torch.empty(0, 4),
        "e4m3": base.to(torch.float8_e4m3fn), "e5m2": base.to(torch.float8_e5m2),
        "u16": torch.arange(5).to(torch.uint16),
    }  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    saved = {
        "generator": module.state_dict(),
        "all": tensors,
        "step": 3,
        "lr": [0.1, None, True],
        "of": torch.float32,
    }
    torch.save(saved, file, pickle_protocol=protocol)
    found = read_torch(file)
    assert found["step"] == 3 and found["lr"] == [0.1, None, True]
    assert found["all"]["again"].offset == found["all"]["f32"].offset
    for part in ("generator", "all"):
        assert found[part].keys() == saved[part].keys()
        for key, want in saved[part].items():
            got = view(found[part][key])
            assert got.shape == tuple(want.shape) and str(want.dtype) == f"torch.{got.dtype}", key
            np.testing.assert_array_equal(
                got.astype(np.float64), want.detach().double().numpy(), err_msg=key
            )


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_numbers_of_8_bits_come_out(file, dtype):
    numbers = np.array([0.5, -448, 2**-9], np.float32).astype(dtype)
    body = table({"w": fp8(name("torch", numbers.dtype.name))})
    found = view(read_torch(archive(file, body, {"0": numbers.tobytes()}))["w"])
    assert found.dtype == dtype and found.tobytes() == numbers.tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_stands_beside_tensors_is_passed_over(file, protocol):
    """Numbers of numpy, argparse's Namespace, bytes, sets and dates: as Python and numpy write
    them.
    """
    beside = {
        "step": np.int64(7), "loss": np.float64(0.5), "half": np.float16(2),
        "dtype": np.dtype("<f4"),
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), names=["a"], seed=np.int32(3)),
        "bytes": b"\xff\0", "names": {"a", "b"}, "frozen": frozenset([1]), "kind": dict,
        "none": None, "yes": True, "x": [1.5, (), {}],
        "states": collections.defaultdict(dict, {0: 1}), "day": datetime.datetime(2026, 1, 1),
        "where": Path("/x"), "counts": collections.Counter("ab"), "last": collections.deque([1]),
    }  # fmt: skip
    pickled = pickle.dumps(beside, protocol)[2:-1]
    if pickled[:1] == b"\x95":
        pickled = pickled[9:]  # the frame of protocol 4
    body = (
        b"}"
        + text("beside")
        + pickled
        + b"s"
        + text("w")
        + tensor(storage("Float", "0", 12), 0, (12,), (1,))
        + b"s"
    )
    found = read_torch(archive(file, body, {"0": NUMBERS.tobytes()}))
    np.testing.assert_array_equal(view(found["w"]), NUMBERS)
    assert found["beside"]["yes"] is True and found["beside"]["x"] == [1.5, (), {}]


def exploits(command):
    """Pickles that run a command when Python's unpickler reads them."""
    import os

    expression = f"__import__('os').system({command!r})"
    got = call(
        name("builtins", "getattr"),
        call(name("builtins", "__import__"), text("os")),
        text("system"),
    )
    stacked = text("os") + b"q\x010h\x01" + text("system") + b"\x93"
    yield "reduce", pickle.dumps({"w": Shell(os.system, command)}, 2)[2:-1]
    yield "protocol 4", pickle.dumps({"w": Shell(os.system, command)}, 4)[2:-1]
    yield "eval", table({"w": call(name("builtins", "eval"), text(expression))})
    yield "getattr", table({"w": call(got, text(command))})
    yield "stack", table({"w": call(stacked, text(command))})
    yield "nested", ordered({"a": ordered({"w": call(name("os", "system"), text(command))})})
    yield "inst", table({"w": b"(" + text(command) + b"ios\nsystem\n"})
    yield "obj", table({"w": b"(" + name("os", "system") + text(command) + b"o"})
    dotted = text("os") + text("path.os.system") + b"\x93"
    yield "dotted", b"\x80\x04" + table({"w": call(dotted, text(command))})
    yield (
        "hidden in a state",
        call(name("collections", "OrderedDict"))
        + call(name("builtins", "exec"), text(expression))
        + b"b",
    )
    run = call(name("os", "system"), text(command))
    yield "in bytes", table({"w": call(name("_codecs", "encode"), run, text("latin1"))})
    yield "in a Namespace", name("argparse", "Namespace") + b")\x81" + table({"w": run}) + b"b"
    yield "in a set", b"\x8f(" + run + b"\x90"
    yield (
        "thrown away",
        call(name("os", "system"), text(command)) + b"0" + table({"step": number(1)}),
    )


KINDS = [kind for kind, _ in exploits("")]


@pytest.mark.parametrize("kind", KINDS)
def test_exploits_run_in_pickle_and_not_here(file, kind):
    marker = file.parent / "was_here"
    body = dict(exploits(f"touch {marker}"))[kind]
    try:
        pickle.loads(whole(body))
    except (AttributeError, TypeError, pickle.UnpicklingError):
        pass  # some break after they have run
    assert marker.exists(), "the exploit does not work, so this test would prove nothing"
    marker.unlink()
    refused(archive(file, body, {}), "is refused: it(s pickle uses| asks for)")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (REBUILD + table({"__code__": number(1)}) + b"b", "it changes .* which is no dict"),
        (name("collections", "OrderedDict") + group(b"N", table({"update": REBUILD})) + b"b",
         "it changes"),
        (tensor(storage("Float", "0", 12), 0, (1,), (1,)) + table({"shape": number(1)}) + b"b",
         "it changes"),
        (name("collections", "OrderedDict") + b")\x81", "uses NEWOBJ"),
        (b"\x82\x01", "uses EXT1"),
        (text("storage") + b"Q", "refers to 'storage' outside"),
        (group(text("module"), name("torch", "Tensor"), text("x"), text("y")) + b"Q", "outside"),
        (group(text("storage"), name("torch", "Tensor"), text("0"), text("cpu"), number(1)) + b"Q",
         "outside"),
        (b"Pos.system\n", "uses PERSID"),
        (name("torch._utils", "_rebuild_tensor_v2.__globals__"), "asks for"),
        (name("torch._utils", "_rebuild_sparse_tensor"),
         "asks for 'torch._utils _rebuild_sparse_tensor'"),
        (name("numpy.core.multiarray", "fromstring"),
         "asks for 'numpy.core.multiarray fromstring'"),
        (name("torch", "load"), "asks for 'torch load'"),
        (call(name("torch", "Tensor"), number(3)), "it calls torch Tensor"),
        (call(name("torch", "FloatStorage"), number(3)), "it calls"),
        (call(text("eval"), text("1")), "it calls 'eval'"),
        (call(REBUILD, text("x"), number(0), group(), group(), b"\x89", b"N"), "a tensor of 'x'"),
        (call(name("torch._utils", "_rebuild_parameter"), text("x"), b"\x89", b"N"),
         "a parameter of 'x'"),
        (call(OF_TYPE, OF_TYPE, OF_TYPE, group(), b"N"), "rebuilds a tensor by"),
        (call(OF_TYPE, text("eval"), text("x"), group(), b"N"), "it calls 'eval'"),
        (b"}" + group(number(1)) + number(2) + b"s", "keys are neither"),
        (call(name("builtins", "str"), text("x")), "it calls builtins str"),
        (call(call(name("_codecs", "encode"), text("x")), text("y")), "it calls a Opaque"),
        (call(REBUILD, call(name("numpy", "dtype")), number(0), group(), group(), b"\x89", b"N"),
         "tensor of a Opaque"),
        (name("argparse", "Namespace.__init__"), "asks for 'argparse Namespace.__init__'"),
        (name("builtins", "getattr"), "asks for 'builtins getattr'"),
        (name("os", "system") + b")\x81", "asks for 'os system'"),
        (name("torch._utils", "_rebuild_tensor_v2") + b")\x81", "uses NEWOBJ of torch._utils"),
        (fp8(text("eval")), "numbers 'eval'"),
        (fp8(name("torch", "float16"), "Float"), "has a storage of float32"),
        (fp8(name("torch", "float64"), count=12), "larger than its storage of 1"),
    ],
)  # fmt: skip
def test_only_tensors_may_be_rebuilt(file, body, told):
    refused(archive(file, body, {"0": NUMBERS.tobytes()}), told)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"t",
        b"0",
        b"R",
        b"((t",
        b"h\x05",
        b"}" + b"(" + text("a") + b"u",
        b"X\xff\xff\xff\xffab",
        b"\xff",
    ],
)
def test_broken_pickles_are_errors_not_crashes(file, body):
    refused(archive(file, body, {}), "cannot read|is refused|not a dict")


def test_deep_and_wide_pickles_need_neither_stack_nor_memory(file):
    deep = b")" + b"\x85" * 10_000
    assert read_torch(archive(file, table({"x": deep, "step": number(1)}), {}))["step"] == 1
    refused(archive(file, b"}" + deep + number(1) + b"s", {}), "keys are neither")
    refused(archive(file, text("a") + deep + b"\x93", {}), "cannot read")
    far = number(1) + b"r\xff\xff\xff\x7f"  # memo 2**31 - 1: Python's unpickler would reserve 32 GB
    assert read_torch(archive(file, table({"step": far}), {})) == {"step": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(key="../../model/data/0"), "names a storage"),
        (dict(key="/etc/passwd"), "names a storage"),
        (dict(key="0\0"), "names a storage"),
        (dict(key="\u0660"), "names a storage"),
        (dict(key="-0"), "names a storage"),
        (dict(key="1"), "storage 1 is absent"),
        (dict(count=13), "48 bytes, too few for 13"),
        (dict(count=-1), "too few"),
        (dict(count=2**62), "too few"),
        (dict(data=NUMBERS.tobytes()[:-1]), "47 bytes, too few"),
        (dict(offset=1), "larger than its storage"),
        (dict(offset=-1), "a tensor has offset"),
        (dict(shape=(4, 4)), "larger than its storage"),
        (dict(shape=(-3, -4)), "a tensor has offset"),
        (dict(strides=(4, 2)), "larger than its storage"),
        (dict(strides=(-4, 1)), "a tensor has offset"),
        (dict(strides=(4,)), "a tensor has offset"),
        (dict(shape=(2**39, 2**39), strides=(0, 0)), "larger than its storage"),
        (dict(shape=(0, 2**60)), "a tensor has offset"),
        (dict(shape=(1,) * 17, strides=(1,) * 17), "a tensor has offset"),
        (dict(byteorder="big"), "byte order b'big'"),
        (dict(kind=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
        (dict(root="a/b"), None),
    ],
)
def test_sizes_and_places_are_checked_before_anything_is_read(file, change, told):
    one(file, **change)
    if told is None:
        np.testing.assert_array_equal(view(read_torch(file)["w"]), NUMBERS.reshape(3, 4))
    else:
        refused(file, told)


def test_a_zip_that_says_a_name_twice_or_has_two_pickles_is_refused(file):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(one(file), "a") as more:
        more.writestr("model/data/0", b"\0" * 48)
    refused(file, "two entries")
    with zipfile.ZipFile(one(file), "a") as more:
        more.writestr("other/data.pkl", whole(b"}"))
    refused(file, "2 files data.pkl")
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("readme", "no weights")
    refused(file, "0 files data.pkl")


def test_a_file_cut_off_anywhere_is_an_error(file):
    good = one(file).read_bytes()
    for size in [0, 1, 3, 4, 100, *range(150, len(good), 37), len(good) - 1]:
        file.write_bytes(good[:size])
        refused(file, "cannot read|is refused")


def test_a_directory_that_points_out_of_the_file_is_an_error(file):
    """The zip's own directory may lie: an entry behind the end, or where no entry is."""
    good = one(file).read_bytes()
    entry = good.rindex(b"PK\1\2")
    for lie in (len(good) - 5, 5, 2**31):
        file.write_bytes(good[: entry + 42] + struct.pack("<I", lie) + good[entry + 46 :])
        refused(file, "cannot read")
    sizes = struct.pack("<II", 10**6, 10**6)
    file.write_bytes(good[: entry + 20] + sizes + good[entry + 28 :])
    refused(file, "cannot read")


def test_other_files_are_told_apart(file, tmp_path):
    buffer = io.BytesIO()
    pickle.dump({"a": 1}, buffer, 2)
    for data, told in [
        (buffer.getvalue(), "format of torch before 1.6.*torch.save"),
        (b"<html>not found</html>", "name another file"),
        (b"", "name another file"),
        (one(tmp_path / "x").read_bytes()[:200], "cut off or damaged"),
    ]:
        file.write_bytes(data)
        refused(file, told)
    refused(tmp_path / "nowhere.pt", "No such file.*check the name")
    refused(tmp_path, "check the name")
    refused(archive(file, group(number(1)), {}), "holds a tuple")


def test_nothing_but_what_is_looked_at_is_read(file):
    """A tensor is a place in the file: opening a file costs its description, not its numbers."""
    assert isinstance(read_torch(one(file))["w"], TensorRef)
    start = read_torch(file)["w"].offset
    data = bytearray(file.read_bytes())
    data[start : start + 4] = np.float32(99).tobytes()
    opened = view(read_torch(file)["w"])
    file.write_bytes(data)
    assert opened[0, 0] == 99


def test_damaged_bytes_give_one_line_or_tensors_inside_the_file(file):
    rng = np.random.default_rng(0)
    good = np.frombuffer(one(file).read_bytes(), np.uint8)
    for _ in range(300):
        bad = good.copy()
        bad[rng.integers(len(bad), size=rng.integers(1, 6))] = rng.integers(256)
        file.write_bytes(bad.tobytes())
        try:
            tensors = [t for t in read_torch(file).values() if isinstance(t, TensorRef)]
        except UserError:
            continue
        assert all(np.asarray(view(tensor)).nbytes <= len(good) for tensor in tensors)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_states_of_generators_beside_tensors_are_passed_over(tmp_path, protocol):
    """As trainers keep them: numpy's state has an array. Neither it nor a scalar is made."""
    state = {
        "step": np.int64(7),
        "loss": np.float32(0.5),
        "rng": np.random.RandomState(0).get_state(),
        "name": "ema",
    }
    found = torch_pickle.follow(pickle.dumps(state, protocol), lambda told: None)
    assert found["name"] == "ema" and isinstance(found["step"], torch_pickle.Opaque)
    assert [type(part) for part in found["rng"]] == [str, torch_pickle.Opaque, int, int, float]
