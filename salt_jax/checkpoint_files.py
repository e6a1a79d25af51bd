"""A checkpoint as files, WORKDIR/checkpoints/STEP/ITEM: which steps are whole, and what is in them.
No array is read, and Orbax is not asked.
"""

import hashlib
import json
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from salt_jax import hosts
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, below, in_bucket, write_whole
from salt_jax.io.tensor_files import Report, digest, no_report

log = logging.getLogger(__name__)

JSONS = ("data", "meta")
RECORD = "_CHECKPOINT_METADATA"  # in which Orbax says what it has written


def directory_of(workdir: str | AnyPath) -> AnyPath:
    where = as_path(workdir)
    return (where if in_bucket(where) else where.absolute()) / "checkpoints"


def make_writable(workdir: str | AnyPath) -> None:
    """Makes the folder of checkpoints. Raises as `refuse_unwritable`."""
    refuse_unwritable(workdir)
    directory = directory_of(workdir)
    if isinstance(directory, Path):
        directory.mkdir(parents=True, exist_ok=True)


def refuse_unwritable(workdir: str | AnyPath) -> None:
    """Leaves nothing behind.

    Raises:
        UserError: the workdir cannot be written to, or not be made.
    """
    directory = directory_of(workdir)
    try:
        if isinstance(directory, Path):
            there = next(path for path in (directory, *directory.parents) if path.exists())
            tempfile.TemporaryFile(dir=there).close()
        else:
            probe = directory.parent / f"probe.{uuid.uuid4().hex}"
            write_whole(probe, b"")
            probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror or error}); pass a --workdir "
            "you may write to"
        ) from error


def trees(step: AnyPath) -> list[str]:
    """The items of arrays that a step was written with, whether or not they are there still.

    Raises:
        OSError: Orbax' record of them is lost or damaged.
    """
    try:
        return sorted(set(json.loads((step / RECORD).read_text())["item_handlers"]) - {*JSONS})
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{step / RECORD} is damaged") from error


def refuse_uncommitted(step: AnyPath) -> None:
    """Orbax takes a half-copied directory for a step; only these files say that its writer, or a
    copy, finished.

    Raises:
        OSError: one of them is missing.
    """
    for item in ("", *JSONS, *trees(step)):
        if not (step / item / "commit_success.txt").is_file():
            raise OSError(f"{step / item}/commit_success.txt is missing")


def damage(error: Exception) -> str:
    """A few words for what Orbax and TensorStore raise on missing or cut-off files, some of it as a
    bare Exception.

    Raises:
        anything else again.
    """
    known = (ValueError, KeyError, OSError, hosts.Elsewhere)
    if type(error) is not Exception and not isinstance(error, known):
        raise error
    return str(error).split("\n")[0].split(". See")[0][:200]


def set_aside(directory: AnyPath, damaged: Sequence[int]) -> None:
    """Renames steps to STEP.damaged.TIME; nothing is deleted."""
    for step in damaged:
        (directory / str(step)).rename(directory / f"{step}.damaged.{time.time_ns()}")


@contextmanager
def full_disk(directory: AnyPath) -> Iterator[None]:
    """Errors of a disk without room, which TensorStore raises as one of several classes, as a
    sentence.
    """
    try:
        yield
    except Exception as error:
        if not re.search(r"ENOSPC|EFBIG|EDQUOT|No space left|File too large|quota", str(error)):
            raise
        steps = _whole_steps(directory)
        whole = f"step {max(steps)} is whole" if steps else "there is none yet"
        raise UserError(
            f"a checkpoint could not be written to {directory}: the disk is full; make room, or "
            f"lower config.keep, and start again (of the checkpoints {whole})"
        ) from error


def newest_step(workdir: str | AnyPath) -> int:
    """The newest step whose writer, or a copy, finished. Its arrays are not looked at.

    Raises:
        UserError: there is none.
    """
    directory = directory_of(workdir)
    found = _whole_steps(directory)
    if not found:
        raise UserError(
            f"there is no whole checkpoint in {directory}; train there first, or name another "
            "workdir"
        )
    return max(found)


def _whole_steps(directory: AnyPath) -> list[int]:
    """Of those that are not whole it warns."""
    found = []
    for path in directory.glob("*"):
        if path.name.isascii() and path.name.isdigit():
            try:
                refuse_uncommitted(path)
                found.append(int(path.name))
            except OSError as error:
                log.warning(
                    "checkpoint step %s in %s is passed over (%s)", path.name, directory, error
                )
    return found


def checkpoint_digest(
    workdir: str | AnyPath, step: int, what: str, report: Report = no_report
) -> str:
    """SHA-256 of an item of a step, in hexadecimal digits: over the names of its files, sorted, and
    what is in them; `report` is called with each piece's bytes.

    Raises:
        UserError: there is no such item.
    """
    item, state = directory_of(workdir) / str(step) / what, hashlib.sha256()
    files = {path.relative_to(item).as_posix(): path for path in below(item)}
    if not files:
        raise UserError(f"there is no {item}; name a step that is there, or another workdir")
    for name in sorted(files):
        state.update(f"{name}\0{digest(files[name], report)}\0".encode())
    return state.hexdigest()
