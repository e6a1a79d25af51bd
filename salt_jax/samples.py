"""Videos on disk, each with a record of what made it: one line of JSON a file in an index,
`samples.jsonl`.

A line holds the name of a file, the SHA-256 of its bytes, `source`, which says where the network
was read, and `made_with`: everything its pixels depend on. So a file is left alone only where it is
what would be made again, and nothing is ever put in the place of somebody else's work. Lines are
added and never changed; the one that counts is the last about the bytes that are there. A line is
written before its file, so work that was stopped leaves no file without. Of several processes each
adds to an index of its own, and one of them gathers these.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, append, write_whole
from salt_jax.keys import Json

NAME = "samples.jsonl"


class Sample(NamedTuple):
    """A file that is wanted."""

    file: AnyPath
    source: str  # where the network is: a workdir, a file or a folder
    made_with: Json  # all that decides its content


class Found(NamedTuple):
    """What is there of the files that are wanted."""

    there: set[AnyPath]  # as wanted
    older: set[AnyPath]  # of the same source, made with something else


def look_up(index: AnyPath, wanted: Sequence[Sample]) -> Found:
    """Which of the wanted files are there, and which would be replaced.

    Raises:
      UserError: a file is there that nothing is recorded of, or whose bytes have changed since, or
        that another source made.
    """
    lines: dict[tuple[str, str], Json] = {}
    for line in _read(index):
        lines[line["file"], line["sha256"]] = line
    there, older, others = set(), set(), []
    for sample in wanted:
        if not sample.file.exists():
            continue
        line = lines.get((sample.file.name, hashlib.sha256(sample.file.read_bytes()).hexdigest()))
        if line is None:
            others.append(f"{sample.file} is there, and {index} does not tell what made it")
        elif line["made_with"] == _plain(sample.made_with):
            there.add(sample.file)
        elif line["source"] != sample.source:
            others.append(f"{sample.file} was made by {line['source']}, not by {sample.source}")
        else:
            older.add(sample.file)
    if others:
        more = f" (and so for {len(others) - 1} more)" if others[1:] else ""
        raise UserError(f"{others[0]}{more}; name another --out, or move it away")
    return Found(there, older)


def put(index: AnyPath, sample: Sample, content: bytes) -> None:
    """Writes a file, at once or not at all, and its line in the index."""
    note(index, sample, hashlib.sha256(content).hexdigest())
    write_whole(sample.file, content)


def note(index: AnyPath, sample: Sample, sha256: str) -> None:
    """Adds the line of a file of that digest, which is to be there next."""
    record = {
        "file": sample.file.name,
        "sha256": sha256,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": sample.source,
        "made_with": sample.made_with,
    }
    append(index, json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")


def index_of(index: AnyPath, process: int) -> AnyPath:
    """Where a process of several adds its lines: the first one to the index itself."""
    return index.with_name(f"{index.stem}.{process}.jsonl") if process else index


def gather(index: AnyPath) -> None:
    """Moves the lines of other processes' indices, also of those that were stopped, to the one."""
    own = re.compile(re.escape(index.stem) + r"\.\d+\.jsonl")
    there = index.parent.iterdir() if index.parent.is_dir() else ()
    for file in sorted(path for path in there if own.fullmatch(path.name)):
        append(index, file.read_bytes())
        file.unlink()


def _read(index: AnyPath) -> list[Json]:
    """The lines that can be read; one may have been cut off when a process was killed."""
    if not index.exists():
        return []
    found = []
    for line in index.read_bytes().decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"file", "sha256", "source", "made_with"} <= record.keys():
            found.append(record)
    return found


def _plain(value: Json) -> Json:
    """As it would be read back."""
    return json.loads(json.dumps(value))
