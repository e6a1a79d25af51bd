"""What fills a device, from the files that XLA writes with --xla_dump_to.

They are there too when a TPU's compiler has refused the program.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ALLOCATION = re.compile(r"allocation (\d+): size \d+(, color [1-9])?")
VALUE = re.compile(
    r" value: <\d+ ([^\s{]+)\S*(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\(?\w+\[[\d,]*\])"
)
SOURCE = re.compile(r' +(?:ROOT )?%?(\S+) = .*?op_name="([^"]*)"')


class Buffer(NamedTuple):
    """One array in the memory of a device."""

    shape: str  # "bf16[30,21,1560,1536]"
    bytes: int
    source: str  # what of the program made it, or the argument that it is

    def __str__(self):
        where = "/".join(self.source.split("/")[-4:])
        return f"{self.shape} {self.bytes / 2**30:.2f} GiB ({where})"


def dump_flags(folder: Path) -> str:
    """XLA_FLAGS that make `largest` find something in the folder."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text"


def largest(folder: Path, count: int) -> list[Buffer]:
    """The largest arrays of the largest program in the folder, largest first; maybe none.

    Arrays take turns in one place: of those that overlap the largest stands for all.
    """
    files = folder.glob("*buffer-assignment.txt")
    file = max(files, key=lambda file: file.stat().st_size, default=None)
    if file is None:
        return []
    found: dict[tuple[int, int, int], dict[str, str]] = {}
    for where, name, shape in _values(file):
        found.setdefault(where, {})[name] = shape
    chosen: list[tuple[int, int, int]] = []
    for size, place, offset in sorted(found, reverse=True):
        if not any(place == p and offset < o + s and o < offset + size for s, p, o in chosen):
            chosen.append((size, place, offset))
        if len(chosen) == count:
            break
    names = {name for where in chosen for name in found[where]}
    sources = _sources(file.with_name(file.name.replace("-buffer-assignment", "")), names)
    # Loops hand arrays on under names that say nothing.
    telling = [
        next((n for n in found[where] if n in sources), next(iter(found[where])))
        for where in chosen
    ]
    return [
        Buffer(found[where][name], where[0], sources.get(name, name))
        for where, name in zip(chosen, telling, strict=True)
    ]


def _values(file: Path) -> Iterator[tuple[tuple[int, int, int], str, str]]:
    """(Size, allocation, offset in it), instruction and shape of every array in the device's main
    memory.
    """
    place = None  # an allocation; None in another memory, which a TPU has on the chip
    with file.open() as lines:
        for line in lines:
            if match := ALLOCATION.match(line):
                place = None if match[2] else int(match[1])
            elif place is not None and (match := VALUE.match(line)):
                yield (int(match[2]), place, int(match[3])), match[1], match[4].lstrip("(")


def _sources(file: Path, names: set[str]) -> dict[str, str]:
    """What the named instructions come from: paths in the program that was traced, or arguments."""
    found = {}
    if file.exists():
        with file.open() as lines:
            for line in lines:
                match = SOURCE.match(line)
                if match and match[1] in names:
                    found[match[1]] = match[2].replace("\\'", "'")
    return found
