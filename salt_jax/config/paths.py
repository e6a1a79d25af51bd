"""Paths in a config. None of them depends on the folder that a later command is run in.

A name of a shipped asset, an absolute path and an address (gs://) stay as they are; other addresses
are refused. A relative path
is made absolute when a config is read: on the command line it is of the current folder, as in any
program; in a file `configs/X.py` of the folder that holds `configs/`, unless that is where packages
are installed. In a config.json, which versions before 0.2 wrote with relative paths, it is of the
nearest folder at or above that file in which it is found.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard

from salt_jax.config.build import all_keys
from salt_jax.config.migrate import flat
from salt_jax.config.schema import Recipe
from salt_jax.io.files import AnyPath, as_path, in_bucket
from salt_jax.io.shipped import located
from salt_jax.keys import Config

PATHS = [path for path, field in all_keys(Recipe) if field.metadata["path"]]


def make_absolute(config: Config, file: Path, overridden: Collection[str]) -> None:
    """Relative paths of a ConfigDict, in place.

    Args:
      file: the config's.
      overridden: keys that the command line changed.

    Raises:
      UserError: one is an address that is not read.
    """
    folder = file.resolve().parent
    home = folder.parent if folder.name == "configs" else folder
    # a config that was installed names what a user has
    if (home / "salt_jax").is_dir() and not (home / "pyproject.toml").is_file():
        home = Path.cwd()
    there = flat(config.to_dict())
    for key in PATHS:
        if isinstance(there[key], str):
            as_path(there[key], f"config.{key}")
    config.update_from_flattened_dict(
        {
            path: str((Path.cwd() if path in overridden else home) / there[path])
            for path in PATHS
            if is_relative(there[path])
        }
    )


def beside(value: object, file: str | AnyPath) -> object:
    """A path that stands in a file of a run."""
    if not is_relative(value) or in_bucket(file):
        return value
    found = [folder / value for folder in Path(file).absolute().parents]
    return next((str(path) for path in found if path.exists()), value)


def is_relative(value: object) -> TypeGuard[str]:
    """Whether it is a path that depends on a folder."""
    if not isinstance(value, str) or not value or "://" in value:
        return False
    return not Path(value).is_absolute() and located(value) == Path(value)
