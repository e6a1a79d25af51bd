"""Parameter trees as safetensors files, read and written one array at a time; nested keys are
joined by "/".
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike
from safetensors import SafetensorError

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, blocks, in_bucket, made_on_disk, read_ranges
from salt_jax.io.header import read_header
from salt_jax.io.slices import Bounds, bounds, slices
from salt_jax.types import Leaf, Params

CODES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U8": np.uint8, "U32": np.uint32, "BOOL": np.bool_,
        "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    }.items()
}  # fmt: skip


class TensorRef(NamedTuple):
    """An array in a file: byte offset of its first number, and strides in elements."""

    path: AnyPath
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
    """The array without reading it: pages of the file come into memory when they are looked at.

    Of a file in a bucket it is read; see `slices` for parts of it.
    """
    if 0 in stored.shape:
        return np.empty(stored.shape, stored.dtype)
    size = stored.dtype.itemsize
    span = 1 + sum((n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True))
    if in_bucket(stored.path):
        (data,) = read_ranges(stored.path, [(stored.offset, span * size)])
    else:
        data = np.memmap(stored.path, mode="r", offset=stored.offset, shape=(span * size,))
    return np.ndarray(stored.shape, stored.dtype, data, strides=[s * size for s in stored.strides])


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array that lies in the order of its axes."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def list_tensors(path: str | AnyPath) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """What a safetensors file holds, by name, and its metadata.

    Raises:
      OSError, SafetensorError: it is absent or damaged.
    """
    header, metadata, begin = read_header(path)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in CODES:
            raise SafetensorError(f"{name} is {entry['dtype']}, which cannot be read here")
        dtype, shape, (start, end) = (
            CODES[entry["dtype"]],
            tuple(entry["shape"]),
            entry["data_offsets"],
        )
        if end - start != dtype.itemsize * math.prod(shape):
            raise SafetensorError(
                f"{name} has {end - start} bytes, too many or too few for {shape}"
            )
        found[name] = TensorRef(as_path(path), begin + start, dtype, shape, contiguous(shape))
    return found, metadata


def layer(stored: TensorRef, i: int) -> np.ndarray:
    """An array's i-th part along its first axis, without reading the others."""
    if not in_bucket(stored.path):
        return view(stored)[i]
    part = ((i, i + 1), *((0, n) for n in stored.shape[1:]))
    return slices_of(stored, [part])(part)[0]


def slices_of(stored: TensorRef, wanted: Iterable[Bounds]) -> Callable[[Bounds], np.ndarray]:
    return slices(stored.path, stored.offset, stored.dtype, stored.shape, wanted)


Report = Callable[[int], object]
"""Called with the bytes that were read or written."""


def no_report(nbytes: int) -> None:
    """A `Report` that nobody sees."""


def digest(path: AnyPath, report: Report = no_report) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    `report` is called with the bytes of each piece that was read.
    """
    state = hashlib.sha256()
    for block in blocks(path):
        state.update(block)
        report(len(block))
    return state.hexdigest()


def write_tensors(
    path: str | AnyPath,
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
    try:
        with made_on_disk(as_path(path)) as temporary, temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                for data in pieces(name, tensors[name]):
                    file.write(data.data)
                    report(data.size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error}); make room or choose another place"
        ) from error


def pieces(name: str, tensor: TensorWriter) -> Iterator[np.ndarray]:
    """The bytes of an array in the order of its axes, uint8, part by part.

    Raises ValueError where they are more or fewer than its shape says.
    """
    left = tensor.nbytes
    for part in tensor.parts():
        data = _in_order(part, tensor.dtype).reshape(-1).view(np.uint8)
        yield data
        left -= data.size
    if left:
        raise ValueError(f"the parts of {name} and its shape differ by {left} bytes")


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


def save_weights(path: str | AnyPath, params: Params, dtype: str, metadata: dict[str, str]) -> None:
    """Writes a tree.

    `dtype` is how it is stored: float32, bfloat16 or float16. Atomic, one array at a time.
    """

    def writer(leaf: Leaf) -> TensorWriter:
        parts = lambda: [np.asarray(jax.device_get(leaf))]
        return TensorWriter(np.dtype(dtype), np.shape(leaf), parts)

    flat: dict[str, Leaf] = flatten_dict(params, sep="/")
    write_tensors(path, {name: writer(leaf) for name, leaf in flat.items()}, metadata)


def load_weights(
    path: str | AnyPath,
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
        as_asked = stored.dtype if dtype is None else dtype
        if shardings is None:
            return jnp.asarray(np.array(view(stored), as_asked))
        take = None
        if in_bucket(stored.path):
            here = places[name].addressable_devices_indices_map(stored.shape).values()
            take = slices_of(stored, dict.fromkeys(bounds(i, stored.shape) for i in here))

        def read(index) -> np.ndarray:
            if take:
                return np.asarray(take(bounds(index, stored.shape)), as_asked)
            # a copy: an array on the CPU could otherwise stay a window on the file
            return np.array(view(stored)[index], as_asked)

        return jax.make_array_from_callback(stored.shape, places[name], read)

    return unflatten_dict({name: load(name, stored) for name, stored in flat.items()}, sep="/")
