"""The small networks that come with the package, by name: "shapes_teacher", "shapes_causal"."""

import os
from pathlib import Path

from salt_jax.io.files import AnyPath, as_path

FOLDER = Path(__file__).parents[1] / "assets"


def located(where: str | os.PathLike[str]) -> AnyPath:
    """The file of the shipped asset of this name; any other path as it is, "./NAME" too.

    Raises:
      UserError: it is an address that is not read.
    """
    file = FOLDER / f"{where}.safetensors"
    return file if str(where).isidentifier() and file.is_file() else as_path(where)
