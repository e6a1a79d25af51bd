"""Workdirs and files behind an address, copied to where they can be read."""

import hashlib
from pathlib import Path

from etils import epath

from salt_jax.errors import UserError
from salt_jax.io.cache import cache_home


def copied(address: str, step: int | None) -> Path:
    """What is at gs://.. or the like, in the cache: of a workdir what says who is who, and one
    checkpoint; of a folder or file everything. What is there already is not copied again.

    Raises:
      UserError: there is nothing, or it cannot be read.
    """
    source = epath.Path(address)
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    target = cache_home() / "remote" / name / source.name
    try:
        if not source.exists():
            raise UserError(f"there is nothing at {address}; check the address")
        checkpoints = source / "checkpoints"
        if not checkpoints.exists():
            _copy(source, target)
            return target
        steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]
        wanted = step if step is not None else max(steps, default=None)
        if wanted not in steps:
            raise UserError(f"there is no checkpoint of step {wanted} in {address}")
        for path in source.iterdir():
            if path.suffix == ".json":
                _copy(path, target / path.name)
        _copy(checkpoints / str(wanted), target / "checkpoints" / str(wanted))
    except OSError as error:
        raise UserError(f"cannot read {address} ({error})") from error
    return target


def _copy(source: epath.Path, target: Path) -> None:
    """A file, or a folder with all that is in it; JSON files, which change, always."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            # a bucket's folder that is an object, as consoles make them, is listed in itself
            if path.name != source.name or path.exists():
                _copy(path, target / path.name)
    elif not target.exists() or target.suffix == ".json":
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        epath.Path(source).copy(partial, overwrite=True)
        partial.replace(target)
