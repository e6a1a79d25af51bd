"""Files that a user names: on this machine, or in a bucket behind gs://.

`as_path` makes pathlib's paths of the one and epath's of the other, which have the same methods.
What a bucket does in another way is a function here. No jax in here.

In a bucket there are no folders, only names with slashes: making one does nothing, and none is
there without a file in it. A file is written by one put and never changed in part, so it is whole
as soon as it is seen.
"""

import functools
import importlib.util
import logging
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from salt_jax.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

AnyPath = Path | epath.Path
"""Of a file or folder, wherever it is."""

BLOCK = 2**23  # bytes of a request to a bucket
TOGETHER = 16  # requests at once; one alone does not fill a network


def as_path(where: str | os.PathLike[str], name: str = "") -> AnyPath:
    """The path of what a user calls `where`.

    Args:
      name: of the flag or key that says so, for the message.

    Raises:
      UserError: it is an address other than gs://, or what reads gs:// is not installed.
    """
    refuse_scheme(where, name)
    if not in_bucket(where):
        return Path(where)
    said = f"{name}={os.fspath(where)}" if name else os.fspath(where)
    if not _prepared():
        raise UserError(f"{said} needs the library gcsfs; pip install 'salt_jax[gcs]'")
    return epath.Path(where)


def real(where: AnyPath) -> AnyPath:
    """The one spelling of a path: absolute, without ".." and links."""
    if not isinstance(where, epath.Path):
        return where.resolve()
    return epath.Path("gs://" + posixpath.normpath(str(where).removeprefix("gs://")))


def refuse_scheme(where: object, name: str = "") -> None:
    """Raises UserError for an address other than gs://; see `as_path`."""
    text = os.fspath(where) if isinstance(where, str | os.PathLike) else ""
    scheme = re.match(r"[A-Za-z][\w.+-]*(?=://)", text)
    if scheme and scheme[0] != "gs":
        said = f"{name}={text}" if name else text
        raise UserError(
            f"{said}: {scheme[0]}:// cannot be read or written here; mount it as a folder and name "
            "that, or copy it to gs://"
        )


def in_bucket(where: str | os.PathLike[str]) -> bool:
    """Whether it is an address."""
    return "://" in os.fspath(where)


@functools.cache
def _prepared() -> bool:
    """Whether buckets can be read. Before the first one is looked at, for all libraries of this
    process: other processes write there too, so what a listing said is not kept; and one library
    reads them, whether or not TensorFlow is installed.
    """
    if not importlib.util.find_spec("gcsfs"):
        return False
    import fsspec.config

    # what it logs, with a traceback, it also raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "false")
    return True


@functools.cache
def _buckets() -> "AbstractFileSystem":
    import fsspec

    return fsspec.filesystem("gs")


def write_whole(where: AnyPath, content: bytes | str) -> None:
    """Writes a file at once, text as UTF-8: a reader sees the old one or the whole new one. Makes
    the folder if needed.
    """
    data = content.encode() if isinstance(content, str) else content
    if isinstance(where, epath.Path):
        where.write_bytes(data)
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    temporary = where.with_name(f".{where.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        temporary.replace(where)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(where: AnyPath, lines: bytes) -> None:
    """Adds whole lines to a file, behind one that was cut off; makes it and its folder if needed.

    On a disk by one write, so processes may share the file. In a bucket it is written anew.
    """
    if isinstance(where, epath.Path):
        before = where.read_bytes() if where.exists() else b""
        where.write_bytes(before + b"\n" * (not before.endswith(b"\n") and before != b"") + lines)
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    with where.open("ab+") as file:
        cut_off = file.seek(0, 2) and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut_off + lines)


def size(where: AnyPath) -> int:
    """Of a file, in bytes."""
    return where.stat().length if isinstance(where, epath.Path) else where.stat().st_size


def below(folder: AnyPath) -> list[AnyPath]:
    """The files in a folder and in those below it, sorted; none if it is not there."""
    if not isinstance(folder, epath.Path):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    # what ends with a slash stands for a folder, as consoles make them
    names = [name for name in _buckets().find(str(folder)) if not name.endswith("/")]
    return [epath.Path(f"gs://{name}") for name in sorted(names)]


def read_ranges(where: AnyPath, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Parts of a file as bytes, uint8 [n] each.

    Args:
      ranges: (offset, number of bytes).

    Raises:
      OSError: it is not there, or ends before.
    """
    found = [np.empty(count, np.uint8) for _, count in ranges]
    if not isinstance(where, epath.Path):
        with where.open("rb") as file:
            for (start, count), part in zip(ranges, found, strict=True):
                file.seek(start)
                if file.readinto(part.data) != count:
                    raise OSError(f"{where} ends before byte {start + count}")
        return found
    pieces = [
        (part[at : at + BLOCK], start + at)
        for (start, count), part in zip(ranges, found, strict=True)
        for at in range(0, count, BLOCK)
    ]
    for i in range(0, len(pieces), TOGETHER):
        some = pieces[i : i + TOGETHER]
        starts, ends = [at for _, at in some], [at + part.size for part, at in some]
        names = [str(where)] * len(some)
        answers = _buckets().cat_ranges(names, starts, ends, on_error="raise")
        for (part, at), answer in zip(some, answers, strict=True):
            if len(answer) != part.size:
                raise OSError(f"{where} ends before byte {at + part.size}")
            part[:] = np.frombuffer(answer, np.uint8)
    return found


def blocks(where: AnyPath) -> Iterator[bytes | memoryview]:
    """A file from its beginning to its end, in pieces."""
    if not isinstance(where, epath.Path):
        with where.open("rb") as file:
            while block := file.read(2 * BLOCK):
                yield block
        return
    total, step = size(where), BLOCK * TOGETHER
    for start in range(0, total, step):
        yield read_ranges(where, [(start, min(step, total - start))])[0].data


def refusal(error: BaseException) -> str:
    """What the user can do about an error of the library that reads buckets; "" of any other.

    Many of them are no OSError, and after several tries they come from wherever a file is opened.
    """
    if type(error).__module__.partition(".")[0] not in ("gcsfs", "google", "aiohttp", "requests"):
        return ""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"the bucket cannot be read or written ({reason}); check its name, what you may do there, "
        "and the credentials (gcloud auth application-default login)"
    )


@contextmanager
def on_disk(where: AnyPath) -> Iterator[Path]:
    """A file for libraries that open files by themselves: the file, or a copy that is gone when the
    block ends. For small ones.
    """
    if not isinstance(where, epath.Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="salt_jax_") as folder:
        copy = Path(folder) / where.name
        _buckets().get_file(str(where), str(copy))
        yield copy


@contextmanager
def made_on_disk(where: AnyPath) -> Iterator[Path]:
    """A place for a file that is written piece by piece; when the block ends it is put where it
    belongs, whole. After an error nothing of it is left.
    """
    if isinstance(where, epath.Path):
        with tempfile.TemporaryDirectory(prefix="salt_jax_") as folder:
            temporary = Path(folder) / where.name
            yield temporary
            upload(temporary, where)
        return
    temporary = where.with_name(f"{where.name}.partial")
    try:
        yield temporary
        temporary.replace(where)
    finally:
        temporary.unlink(missing_ok=True)


def upload(file: Path, where: epath.Path) -> None:
    """Puts a file of this machine into a bucket."""
    _buckets().put_file(str(file), str(where))


@contextmanager
def all_or_nothing(dst: AnyPath) -> Iterator[Path]:
    """An empty folder of this machine; what is in it when the block ends goes to `dst`. After an
    error nothing of it is left.

    Files of the same name in `dst` are replaced, others stay. Raises UserError where the disk
    refuses.
    """
    made = not dst.exists()
    bucket = isinstance(dst, epath.Path)
    temporary = Path(tempfile.mkdtemp(prefix="salt_jax_")) if bucket else dst / ".partial"
    put: list[epath.Path] = []
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
        yield temporary
        for file in below(temporary):
            place = dst / file.relative_to(temporary)
            if isinstance(place, epath.Path):
                upload(Path(file), place)
                put.append(place)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    except OSError as error:
        for place in put:
            place.unlink(missing_ok=True)
        raise UserError(
            f"cannot write to {dst} ({error}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made and not bucket and dst.is_dir() and not any(dst.iterdir()):
            dst.rmdir()


def free_bytes(folder: AnyPath) -> int:
    """How much can be written to a folder, which need not be there; for a bucket to where its files
    are made.
    """
    there = Path(tempfile.gettempdir()) if isinstance(folder, epath.Path) else folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
