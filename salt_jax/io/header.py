"""What a safetensors file says of itself. No jax in here, as in `choices`."""

import json
import re
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, in_bucket, read_ranges, size
from salt_jax.keys import Json

C = TypeVar("C")

MAX_HEADER = 10**8  # bytes, of safetensors' own reader


def read_metadata(path: str | AnyPath) -> dict[str, str]:
    """What was written beside the arrays, such as by `weights.save_weights`.

    Raises UserError: it cannot be read.
    """
    try:
        return read_header(path)[1]
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path} ({error}); name a file that launch.export wrote"
        ) from error


def read_header(path: str | AnyPath) -> tuple[dict[str, Json], dict[str, str], int]:
    """What a safetensors file says of its arrays, by name; its metadata; and where arrays begin.

    On a disk safetensors' own reader has checked it. In a bucket only the header is read, and
    checked in the same way but for sizes of arrays.

    Raises:
      OSError, SafetensorError: it is absent or damaged.
    """
    where = as_path(path)
    if not in_bucket(where):
        with safe_open(where, "numpy"):
            pass
    (first,) = read_ranges(where, [(0, 8)])
    length = int.from_bytes(first.tobytes(), "little")
    if length > MAX_HEADER:
        raise SafetensorError(f"its header would have {length} bytes")
    (text,) = read_ranges(where, [(8, length)])
    try:
        header = json.loads(text.tobytes())
        metadata = header.pop("__metadata__", {})
        places = sorted(entry["data_offsets"] for entry in header.values())
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise SafetensorError(f"its header is no description of arrays ({error})") from error
    begins, ends = [0, *(end for _, end in places)], [*(start for start, _ in places)]
    if begins[:-1] != ends or 8 + length + begins[-1] != size(where):
        raise SafetensorError("its arrays do not fill it; it is cut off or damaged")
    return header, metadata, 8 + length


def stored_sizes(path: AnyPath, kind: type[C]) -> C:
    """The sizes of the network in a file of launch.convert_wan, as a `kind`.

    Raises:
      UserError: it is absent or does not say them.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; make it with launch.convert_wan")
    config = read_metadata(path).get("config")
    try:
        sizes = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config or "").items()
        }
        return kind(**sizes)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not say its sizes; make it with launch.convert_wan"
        ) from error


def stored_student(path: AnyPath) -> str:
    """The key that the network in a file of launch.convert_wan stood under in a checkpoint of
    several; "" where it stood alone, or nothing is recorded.
    """
    try:
        return str(json.loads(read_metadata(path).get("source", ""))["student"])
    except (ValueError, TypeError, LookupError):
        return ""


def refuse_other_student(path: AnyPath, key: str, recipe: str) -> None:
    """Raises UserError where a converted network is another one of its checkpoint than the one that
    a released recipe is sampled with: the one under `key`; "" is any.
    """
    found = stored_student(path) if key and path.is_file() else ""
    if found and key not in re.split(r"[./]", found):
        raise UserError(
            f"{path} is {found} of its checkpoint, and {recipe} is sampled with {key}; convert the "
            f"checkpoint with --key={key}, or give the values of the recipe one by one"
        )
