"""Parameter trees as safetensors files, read and written one array at a time; nested keys are
joined by "/".
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from salt_jax.errors import UserError
from salt_jax.types import Leaf, Params

CODES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U8": np.uint8, "BOOL": np.bool_,
        "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    }.items()
}  # fmt: skip


class TensorRef(NamedTuple):
    """An array in a file: byte offset of its first number, and strides in elements."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorWriter(NamedTuple):
    """An array to be written: `parts()` makes it piece by piece, in the order of memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def view(stored: TensorRef) -> np.ndarray:
    """The array without reading it: pages of the file come into memory when they are looked at."""
    if 0 in stored.shape:
        return np.empty(stored.shape, stored.dtype)
    size = stored.dtype.itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
    data = np.memmap(stored.path, mode="r", offset=stored.offset, shape=(span * size,))
    return np.ndarray(stored.shape, stored.dtype, data, strides=[s * size for s in stored.strides])


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array that lies in the order of its axes."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def list_tensors(path: str | Path) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """What a safetensors file holds, by name, and its metadata.

    Raises:
      OSError, SafetensorError: it is absent or damaged.
    """
    with safe_open(path, "numpy") as file:  # checks all that is relied on below
        metadata = file.metadata() or {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] not in CODES:
                raise SafetensorError(f"{name} is {entry['dtype']}, which cannot be read here")
            shape, start = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            found[name] = TensorRef(
                Path(path), start, CODES[entry["dtype"]], shape, contiguous(shape)
            )
    return found, metadata


Report = Callable[[int], object]
"""Called with the bytes that were read or written."""


def no_report(nbytes: int) -> None:
    """A `Report` that nobody sees."""


def digest(path: Path, report: Report = no_report) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    `report` is called with the bytes of each piece that was read.
    """
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            state.update(block)
            report(len(block))
    return state.hexdigest()


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, TensorWriter],
    metadata: Mapping[str, str],
    report: Report = no_report,
) -> None:
    """Writes a safetensors file part by part; a file of that name appears when all of it is on the
    disk, or not at all.

    `report` is called with the bytes of each part. Raises UserError where the disk refuses.
    """
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    order, end = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)), 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    temporary = Path(f"{path}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                left = tensors[name].nbytes
                for part in tensors[name].parts():
                    data = _in_order(part, tensors[name].dtype).reshape(-1).view(np.uint8)
                    file.write(data.data)
                    report(data.size)
                    left -= data.size
                if left:
                    raise ValueError(f"the parts of {name} and its shape differ by {left} bytes")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); make room or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _in_order(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in the order of its axes.

    A transposed matrix is copied in strips that fit the cache.
    """
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array, dtype)
    copy = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], 64):
        copy[:, start : start + 64] = array[:, start : start + 64]
    return copy


@contextmanager
def all_or_nothing(dst: str | Path) -> Iterator[Path]:
    """An empty folder; what is in it when the block ends goes to `dst`. After an error nothing of
    it is left.

    Files of the same name in `dst` are replaced, others stay. Raises UserError where the disk
    refuses.
    """
    dst, made = Path(dst), not Path(dst).exists()
    temporary = dst / ".partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            (dst / path.relative_to(temporary)).parent.mkdir(parents=True, exist_ok=True)
            path.replace(dst / path.relative_to(temporary))
    except OSError as error:
        raise UserError(
            f"cannot write to {dst} ({error}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and dst.is_dir() and not any(dst.iterdir()):
            dst.rmdir()


def save_weights(path: str | Path, params: Params, dtype: str, metadata: dict[str, str]) -> None:
    """Writes a tree.

    `dtype` is how it is stored: float32, bfloat16 or float16. Atomic, one array at a time.
    """

    def writer(leaf: Leaf) -> TensorWriter:
        parts = lambda: [np.asarray(jax.device_get(leaf))]
        return TensorWriter(np.dtype(dtype), np.shape(leaf), parts)

    flat: dict[str, Leaf] = flatten_dict(params, sep="/")
    write_tensors(path, {name: writer(leaf) for name, leaf in flat.items()}, metadata)


def load_weights(
    path: str | Path,
    like: Params,
    dtype: DTypeLike | None = jnp.float32,
    shardings: Params | None = None,
) -> Params:
    """Reads a tree that must have exactly the keys and shapes of `like`.

    Args:
      path: of a safetensors file.
      like: arrays or ShapeDtypeStructs; their dtypes are not looked at.
      dtype: of the result; None: as stored.
      shardings: one for each array: every device gets its slice straight from the file, nothing
        else is read.

    Raises:
      UserError: the file is absent, damaged, or holds another model; the first difference is named.
    """
    try:
        flat, _ = list_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read weights from {path} ({error}); check config.weights"
        ) from error
    expected: dict[str, Leaf] = flatten_dict(like, sep="/")
    for name in sorted(set(flat) | set(expected)):
        found = flat[name].shape if name in flat else "absent"
        wanted = expected[name].shape if name in expected else "absent"
        if found != wanted:
            raise UserError(
                f"{path} does not fit the model: {name} is {found}, expected {wanted}; "
                "check config.model.preset and config.weights"
            )
    places: dict[str, Leaf] = {} if shardings is None else flatten_dict(shardings, sep="/")

    def load(name: str, stored: TensorRef) -> Array:
        def read(index) -> np.ndarray:
            # a copy: an array on the CPU could otherwise stay a window on the file
            return np.array(view(stored)[index], stored.dtype if dtype is None else dtype)

        if shardings is None:
            return jnp.asarray(read(...))
        return jax.make_array_from_callback(stored.shape, places[name], read)

    return unflatten_dict({name: load(name, stored) for name, stored in flat.items()}, sep="/")
