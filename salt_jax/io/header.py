"""What a safetensors file says of itself. No jax in here, as in `choices`."""

import json
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from salt_jax.errors import UserError

C = TypeVar("C")


def read_metadata(path: str | Path) -> dict[str, str]:
    """What was written beside the arrays, such as by `weights.save_weights`.

    Raises UserError: it cannot be read.
    """
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path} ({error}); name a file that launch.export wrote"
        ) from error


def stored_sizes(path: Path, kind: type[C]) -> C:
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
