"""Tensors in files of torch.save, read without torch and without running anything that a file says.

Such a file is a zip with NAME/data.pkl, a pickle that describes dicts and tensors, and NAME/data/KEY, the numbers of
each storage. Handing the pickle to Python's unpickler would let it call what it names. Here it is read as data: the
opcodes below are followed one by one, a function or class stays a string, and the few that mean something are looked
up in the tables below. All else is refused, with its name. Nothing recurses, so depth cannot exhaust the stack.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from salt_jax.errors import UserError
from salt_jax.models.weights import Stored

STORAGES: dict[str, np.dtype] = {
    f"torch {name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16, "Double": np.float64, "Long": np.int64,
        "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    }.items()
}  # fmt: skip
# Names that may stand as a value and are never called.
INERT = {"torch Tensor", "torch.nn.parameter Parameter"} | {
    f"torch {name}"
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
}
CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE",
}  # fmt: skip
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_PICKLE = 2**26  # bytes; a network of 1300 tensors needs 2**18
MAX_AXES, MAX_LENGTH = 16, 2**40
DAMAGED = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError)  # what zipfile raises


class _Name(NamedTuple):
    """A function or class that the pickle names: "module name", nothing that could be called."""

    text: str


class _Storage(NamedTuple):
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    count: int  # numbers


class _Mark:
    """Where on the stack items begin."""


class _Refused(Exception):
    """What the pickle asks for."""


def read_torch(path: str | Path) -> dict[Any, Any]:
    """The dict that torch.save wrote: nested dicts with a `Stored` for each tensor; no tensor is read.

    Numbers, strings, lists and tuples stay as they are.

    Raises:
      UserError: the file is absent, damaged or of another kind, or asks for anything but tensors in dicts.
    """
    path = Path(path)
    try:
        root, entries = _zip_entries(path)
        found = _follow(_read_pickle(path, root, entries), _storages(root, entries), path)
    except _Refused as error:
        raise UserError(
            f"{path} is refused: {error}. Nothing of it was run. If you trust the file, load it with torch and save "
            "only the dict of its tensors"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); check the name") from error
    except (*DAMAGED, ValueError, TypeError, LookupError) as error:
        raise UserError(f"cannot read {path}: {_remedy(path)} ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a dict of tensors; name another file")
    return found


def _remedy(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PK\3\4":
        return "it is cut off or damaged, download it again"
    if start.startswith(b"\x80"):
        return (
            "it is in the format of torch before 1.6, a bare pickle; convert it once with torch: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    return "torch.save did not write it, name another file"


def _zip_entries(path: Path) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder all entries are in, and for each entry where its bytes begin and how many there are."""
    entries, total = {}, path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.filename in entries:
                raise _Refused(f"it has two entries named {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise _Refused(f"its {info.filename!r} is compressed or encrypted, torch.save does neither")
            file.seek(info.header_offset)
            signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
            start = info.header_offset + 30 + name + extra
            if signature != b"PK\3\4" or start + info.file_size > total:
                raise zipfile.BadZipFile(f"entry {info.filename!r} does not lie in the file")
            entries[info.filename] = (start, info.file_size)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused(f"it is a zip with {len(roots)} files data.pkl, torch.save writes one")
    return roots[0], entries


def _read_pickle(path: Path, root: str, entries: Mapping[str, tuple[int, int]]) -> bytes:
    with open(path, "rb") as file:

        def read(name):
            start, size = entries[name]
            if size > MAX_PICKLE:
                raise _Refused(f"its {name} has {size} bytes, more than any description of tensors needs")
            file.seek(start)
            return file.read(size)

        order = read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order != b"little":
            raise _Refused(
                f"its numbers are stored in the byte order {order[:9]!r}, only little-endian is read"
            )
        return read(f"{root}data.pkl")


def _storages(root: str, entries: Mapping[str, tuple[int, int]]) -> Callable[[Any], _Storage]:
    """From what the pickle says of a storage to its place in the file."""

    def storage(told):
        match told:
            case ("storage", _Name(kind), str(key), str(_), int(count)) if kind in STORAGES:
                dtype, name = STORAGES[kind], f"{root}data/{key}"
            case _:
                raise _Refused(
                    f"it refers to {_short(told)} outside of itself, which is no storage of numbers"
                )
        if not (key.isascii() and key.isdecimal()):
            raise _Refused(f"it names a storage {key!r}, torch.save numbers them")
        if name not in entries:
            raise ValueError(f"storage {key} is absent")
        start, size = entries[name]
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"storage {key} has {size} bytes, too few for {count} numbers of {dtype}")
        return _Storage(start, dtype, count)

    return storage


def _follow(pickle: bytes, storage: Callable[[Any], _Storage], path: Path) -> Any:
    """What the pickle describes. The opcodes are those that pickling dicts of tensors gives, in protocols 2 to 5."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    value: Any
    for opcode, value, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in CONSTANTS:
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name, value))
            case name if name in TUPLES:
                stack.append(tuple(_pop(stack, TUPLES[name])))
            case "EMPTY_DICT" | "EMPTY_LIST" | "MARK":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "MARK": _Mark}[opcode.name]())
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "APPEND" | "APPENDS":
                items = _pop(stack, 1) if opcode.name == "APPEND" else _pop_to_mark(stack)
                _top(stack, list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, 2) if opcode.name == "SETITEM" else _pop_to_mark(stack)
                _set_items(_top(stack, dict), items)
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = _top(stack, object)
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_name(value))
            case "STACK_GLOBAL":
                stack.append(_name(" ".join(_pop(stack, 2))))
            case "BINPERSID":
                stack.append(storage(*_pop(stack, 1)))
            case "REDUCE":
                stack.append(_rebuild(path, *_pop(stack, 2)))
            case "BUILD":  # attributes of an OrderedDict, such as a state_dict's: nobody reads them
                _pop(stack, 1)
                _top(stack, dict)
            case "STOP":
                return _pop(stack, 1)[0]
            case name:
                raise _Refused(f"its pickle uses {name}, which a dict of tensors does not need")
    raise ValueError("the pickle has no end")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("the pickle takes more than it has put down")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    if any(isinstance(item, _Mark) for item in items):
        raise ValueError("the pickle takes a mark for a value")
    return items


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    count = next((n for n, item in enumerate(reversed(stack)) if isinstance(item, _Mark)), None)
    if count is None:
        raise ValueError("the pickle closes what it has not opened")
    items = _pop(stack, count)
    stack.pop()
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if not stack or not isinstance(stack[-1], kind):
        raise _Refused(f"it changes {_short(stack[-1:])}, which is no {kind.__name__}")
    return stack[-1]


def _set_items(into: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
        raise _Refused("it has a dict whose keys are neither names nor numbers")
    into.update(zip(items[::2], items[1::2], strict=True))


def _name(text: str) -> _Name:
    if text not in INERT | STORAGES.keys() | REBUILD.keys():
        raise _Refused(f"it asks for {_short(text)}, which is no part of a tensor")
    return _Name(text)


def _rebuild(path: Path, called: Any, args: Any) -> Any:
    if not isinstance(called, _Name) or called.text not in REBUILD or not isinstance(args, tuple):
        raise _Refused(f"it calls {_short(called)} with {_short(args)}")
    return REBUILD[called.text](path, *args)


def _tensor(path, storage, offset, shape, strides, requires_grad, hooks, *_) -> Stored:
    if not isinstance(storage, _Storage):
        raise _Refused(f"it makes a tensor of {_short(storage)}")
    numbers = (offset, *shape, *strides)
    wrong = any(type(n) is not int or not 0 <= n < MAX_LENGTH for n in numbers)
    if wrong or len(shape) > MAX_AXES or len(shape) != len(strides):
        raise ValueError(f"a tensor has offset, shape and strides {_short(numbers)}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else -1
    if max(last + 1, count) > storage.count:
        raise ValueError(f"a tensor of shape {_short(shape)} is larger than its storage of {storage.count}")
    start = storage.offset + offset * storage.dtype.itemsize
    return Stored(path, start, storage.dtype, tuple(shape), tuple(strides))


def _parameter(path, tensor, *_) -> Stored:
    if not isinstance(tensor, Stored):
        raise _Refused(f"it makes a parameter of {_short(tensor)}")
    return tensor


def _of_type(path, function, kind, args, state) -> Any:
    if function == _Name("torch._tensor _rebuild_from_type_v2"):
        raise _Refused("it rebuilds a tensor by rebuilding a tensor")
    return _rebuild(path, function, args)


REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _of_type,
    "torch Size": lambda path, lengths: lengths,
    "collections OrderedDict": lambda path: {},
}


def _short(value: Any) -> str:
    """A value of the file, for a message: never long, one line, and without descending into it."""
    match value:
        case _Name(text):
            return text[:80]
        case tuple() if all(type(item) in (str, int) for item in value):
            return repr(value)[:80]
        case str() | int():
            return repr(value)[:80]
    return f"a {type(value).__name__}"
