"""The pickle in a file of torch.save, read as data: nothing that it says is ever run.

Handing it to Python's unpickler would let it call what it names. Here the opcodes below are
followed one by one, a function or class stays a string, and the few that mean something are looked
up in the tables below. All else is refused, with its name. Nothing recurses, so depth cannot
exhaust the stack.
"""

import math
import pickletools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from salt_jax.io.files import AnyPath
from salt_jax.io.tensor_files import TensorRef

STORAGES: dict[str, np.dtype] = {
    f"torch {name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16, "Double": np.float64,
        "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
} | {"torch.storage UntypedStorage": np.dtype(np.uint8)}  # fmt: skip
DTYPES: dict[str, np.dtype] = {
    f"torch {name}": np.dtype(getattr(jnp, name, None) or getattr(np, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
    )
} | {"torch bool": np.dtype(np.bool_)}  # fmt: skip
# Names that may stand as a value and are never called.
INERT = {"torch Tensor", "torch.nn.parameter Parameter", "typing Any", *DTYPES} | {
    f"{module} {name}"
    for module in ("builtins", "__builtin__")
    for name in ("dict", "list", "tuple", "str", "unicode", "int", "long", "float", "bool")
}
# Objects that stand beside tensors and that nobody reads: what makes one is noted, and neither
# called nor built.
DATA = {
    *(
        f"{core}.multiarray {name}"
        for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")
    ),
    "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer",
    "numpy ndarray", "numpy dtype", "_codecs encode", "torch device",
    "argparse Namespace", "types SimpleNamespace", "pathlib PosixPath",
    "datetime datetime", "datetime timedelta", "collections Counter", "collections deque",
    "omegaconf.dictconfig DictConfig", "omegaconf.listconfig ListConfig",
    "omegaconf.base ContainerMetadata", "omegaconf.base Metadata",
    "ml_collections.config_dict.config_dict ConfigDict", "easydict EasyDict",
    "lightning_fabric.utilities.data AttributeDict",
    "lightning.fabric.utilities.data AttributeDict",
    "pytorch_lightning.utilities.parsing AttributeDict",
    *(
        f"omegaconf.nodes {kind}Node"
        for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")
    ),
    *(
        f"{module} {name}"
        for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "bytearray")
    ),
}  # fmt: skip
CONSTANTS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
EMPTY: dict[str, Callable[[], object]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_AXES, MAX_LENGTH = 16, 2**40


T = TypeVar("T")


class Name(NamedTuple):
    """A function or class that the pickle names: "module name", nothing that could be called."""

    text: str


class Storage(NamedTuple):
    path: AnyPath
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    count: int  # numbers


class Mark:
    """Where on the stack items begin."""


class Opaque:
    """An object of `DATA`, or a set. Nothing of it is kept."""


class Refused(Exception):
    """What the pickle asks for."""


EMPTY |= {"EMPTY_SET": Opaque, "MARK": Mark}


def follow(pickle: bytes, storage: Callable[[object], Storage]) -> object:
    """What the pickle describes.

    The opcodes are those that pickling dicts of tensors gives, in protocols 2 to 5.
    """
    stack: list[object] = []
    memo: dict[object, object] = {}
    for opcode, value, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in CONSTANTS:
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name, value))
            case name if name in TUPLES:
                stack.append(tuple(_pop(stack, TUPLES[name])))
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "APPEND" | "APPENDS":
                items = _pop(stack, 1) if opcode.name == "APPEND" else _pop_to_mark(stack)
                _put(_top(stack, list, Opaque), items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, 2) if opcode.name == "SETITEM" else _pop_to_mark(stack)
                _set_items(_top(stack, dict, Opaque), items)
            case "ADDITEMS":
                _pop_to_mark(stack)
                _top(stack, Opaque)
            case "FROZENSET":
                _pop_to_mark(stack)
                stack.append(Opaque())
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = _top(stack, object)
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_name(*str(value).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*_pop(stack, 2)))
            case "BINPERSID":
                stack.append(storage(*_pop(stack, 1)))
            case "REDUCE":
                stack.append(_rebuild(*_pop(stack, 2)))
            case "NEWOBJ":
                stack.append(_make(*_pop(stack, 2)))
            case "BUILD":  # attributes of an OrderedDict, such as a state_dict's: nobody reads them
                _pop(stack, 1)
                _top(stack, dict, Opaque)
            case "STOP":
                return _pop(stack, 1)[0]
            case name:
                raise Refused(f"its pickle uses {name}, which a dict of tensors does not need")
    raise ValueError("the pickle has no end")


def _pop(stack: list[object], count: int) -> list[object]:
    if len(stack) < count:
        raise ValueError("the pickle takes more than it has put down")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    if any(isinstance(item, Mark) for item in items):
        raise ValueError("the pickle takes a mark for a value")
    return items


def _pop_to_mark(stack: list[object]) -> list[object]:
    count = next((n for n, item in enumerate(reversed(stack)) if isinstance(item, Mark)), None)
    if count is None:
        raise ValueError("the pickle closes what it has not opened")
    items = _pop(stack, count)
    stack.pop()
    return items


def _top(stack: list[object], *kinds: type[T]) -> T:
    top = stack[-1] if stack else None
    if not stack or not isinstance(top, kinds):
        raise Refused(f"it changes {short(stack[-1:])}, which is no {kinds[0].__name__}")
    return top


def _put(into: list[object] | Opaque, items: list[object]) -> None:
    if isinstance(into, list):
        into.extend(items)


def _set_items(into: dict[object, object] | Opaque, items: list[object]) -> None:
    if isinstance(into, Opaque):
        return
    if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
        raise Refused("it has a dict whose keys are neither names nor numbers")
    into.update(zip(items[::2], items[1::2], strict=True))


def _name(module: object, name: object) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError(f"the pickle names {short(module)} and {short(name)}")
    text = f"{module} {name}"
    if not any(text in table for table in (INERT, DATA, STORAGES, REBUILD)):
        raise Refused(f"it asks for {short(text)}, which is no part of a tensor")
    return Name(text)


def _rebuild(called: object, args: object) -> object:
    if not isinstance(called, Name) or not isinstance(args, tuple):
        raise Refused(f"it calls {short(called)} with {short(args)}")
    if called.text in DATA:
        return Opaque()
    if called.text not in REBUILD:
        raise Refused(f"it calls {short(called)} with {short(args)}")
    return REBUILD[called.text](*args)


def _make(kind: object, args: object) -> Opaque:
    if not isinstance(kind, Name) or kind.text not in DATA:
        raise Refused(
            f"its pickle uses NEWOBJ of {short(kind)}, which a dict of tensors does not need"
        )
    return Opaque()


def _tensor(storage, offset, shape, strides, requires_grad, hooks, *_) -> TensorRef:
    if not isinstance(storage, Storage):
        raise Refused(f"it makes a tensor of {short(storage)}")
    numbers = (offset, *shape, *strides)
    wrong = any(type(n) is not int or not 0 <= n < MAX_LENGTH for n in numbers)
    if wrong or len(shape) > MAX_AXES or len(shape) != len(strides):
        raise ValueError(f"a tensor has offset, shape and strides {short(numbers)}")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else -1
    if max(last + 1, count) > storage.count:
        raise ValueError(
            f"a tensor of shape {short(shape)} is larger than its storage of {storage.count}"
        )
    start = storage.offset + offset * storage.dtype.itemsize
    return TensorRef(storage.path, start, storage.dtype, tuple(shape), tuple(strides))


def _tensor_of_dtype(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> TensorRef:
    """As torch writes kinds of numbers that have no storage of their own: bytes, and what they
    stand for.
    """
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise Refused(f"it makes a tensor of numbers {short(dtype)}")
    kind = DTYPES[dtype.text]
    if isinstance(storage, Storage) and storage.dtype == np.uint8:
        storage = storage._replace(dtype=kind, count=storage.count // kind.itemsize)
    elif isinstance(storage, Storage) and storage.dtype != kind:
        raise ValueError(f"a tensor of {kind} has a storage of {storage.dtype}")
    return _tensor(storage, offset, shape, strides, requires_grad, hooks)


def _parameter(tensor, *_) -> TensorRef:
    if not isinstance(tensor, TensorRef):
        raise Refused(f"it makes a parameter of {short(tensor)}")
    return tensor


def _of_type(function, kind, args, state) -> object:
    if function == Name("torch._tensor _rebuild_from_type_v2"):
        raise Refused("it rebuilds a tensor by rebuilding a tensor")
    return _rebuild(function, args)


REBUILD: dict[str, Callable[..., object]] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _of_type,
    "torch Size": lambda lengths: lengths,
    "collections OrderedDict": lambda: {},
    "collections defaultdict": lambda *_: {},
}


def short(value: object) -> str:
    """A value of the file, for a message: never long, one line, and without descending into it."""
    match value:
        case Name(text):
            return text[:80]
        case tuple() if all(type(item) in (str, int) for item in value):
            return repr(value)[:80]
        case str() | int():
            return repr(value)[:80]
    return f"a {type(value).__name__}"
