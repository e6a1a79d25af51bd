"""Parameter trees as safetensors files: nested keys joined by "/", float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from salt_jax.errors import UserError
from salt_jax.types import Params


def save_weights(path: str | Path, params: Params, dtype: str, metadata: dict[str, str]) -> None:
    """Writes a tree. `dtype` is how it is stored, float32 or float16; reading gives float32 back. Atomic."""
    flat = {k: np.asarray(jax.device_get(v), dtype) for k, v in flatten_dict(params, sep="/").items()}
    temporary = Path(path).with_suffix(".partial")
    save_file(flat, temporary, metadata)
    temporary.replace(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save_weights` was given to write beside the arrays. Raises UserError where the file cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); name a file that launch.export wrote") from error


def load_weights(path: str | Path, like: Params) -> Params:
    """Reads a tree that must have exactly the keys and shapes of `like` (arrays or ShapeDtypeStructs).

    Raises:
      UserError: the file is absent, damaged, or holds another model; the first difference is named.
    """
    try:
        with safe_open(path, "numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read weights from {path} ({error}); check config.weights") from error
    expected: dict[str, Any] = flatten_dict(like, sep="/")
    for name in sorted(set(flat) | set(expected)):
        found = flat[name].shape if name in flat else "absent"
        wanted = expected[name].shape if name in expected else "absent"
        if found != wanted:
            raise UserError(
                f"{path} does not fit the model: {name} is {found}, expected {wanted}; "
                "check config.model.preset and config.weights"
            )
    return unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep="/")
