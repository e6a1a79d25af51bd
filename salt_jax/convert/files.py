"""The tensors in files of others, whatever the files are called: safetensors, or what torch.save
wrote.
"""

from collections.abc import Sequence
from typing import NamedTuple

from safetensors import SafetensorError

from salt_jax.convert.torch_files import read_torch
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath
from salt_jax.io.tensor_files import TensorRef, list_tensors

MAX_DEPTH = 4  # dicts in dicts

# What a file is that has no weights, by its first bytes.
NO_WEIGHTS = {
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file it stands for; fetch that with git lfs pull"
    ),
    b"GGUF": "a GGUF file, quantised in blocks; name one in float32, bfloat16, float16 or fp8",
    b"<": "a web page, not weights; download it again",
}


class Opened(NamedTuple):
    """One file, or the shards of one model. Nothing of the tensors is read yet."""

    tensors: dict[str, TensorRef]  # the keys of nested dicts are joined by "/"
    metadata: dict[str, str]  # of the first file, where it is safetensors


def open_tensors(files: Sequence[AnyPath]) -> Opened:
    """What the files hold.

    Raises:
      UserError: a file cannot be read, or two have the same name.
    """
    tensors: dict[str, TensorRef] = {}
    first: dict[str, str] = {}
    for path in files:
        found, metadata = _open(path)
        twice = tensors.keys() & found.keys()
        if twice:
            raise UserError(
                f"{path} and another file both hold {min(twice)}; convert one model at a time"
            )
        tensors |= found
        first = first or metadata
    return Opened(tensors, first)


def _open(path: AnyPath) -> tuple[dict[str, TensorRef], dict[str, str]]:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); check the name"
        ) from error
    # as safetensors begin: the length of a JSON object, and this object
    headed = start[8:9] == b"{"
    what = (
        ""
        if headed
        else next((what for first, what in NO_WEIGHTS.items() if start.startswith(first)), "")
    )
    if what or not start:
        raise UserError(f"{path} is {what or 'empty; download it again'}")
    if not headed and (path.suffix != ".safetensors" or start.startswith((b"PK\3\4", b"\x80"))):
        return _flat(read_torch(path)), {}
    try:
        return list_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path} ({error}); download it again, or one in float32, bfloat16, "
            "float16 or fp8"
        ) from error


def _flat(found: dict[object, object]) -> dict[str, TensorRef]:
    """The tensors in dicts in dicts, each dict once."""
    tensors, seen, left = {}, {id(found)}, [("", found, 1)]
    while left:
        path, table, depth = left.pop()
        for key, value in table.items():
            if isinstance(value, TensorRef):
                tensors[f"{path}{key}"] = value
            elif isinstance(value, dict) and depth < MAX_DEPTH and id(value) not in seen:
                seen.add(id(value))
                left.append((f"{path}{key}/", value, depth + 1))
    return tensors
