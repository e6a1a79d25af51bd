"""What fills a device when a program needs the most, from the files that XLA writes with --xla_dump_to.

They are there too when a TPU's compiler has refused the program. Workspaces of libraries are not among them.
"""

import re
from pathlib import Path
from typing import NamedTuple

SIZE = r"\{([\d,]*)\}: (\d+) bytes"


class Buffer(NamedTuple):
    """One array at the peak."""

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
    """The largest arrays that live at the peak of the largest program in the folder, largest first; maybe none."""
    ranges = max(folder.glob("*live-range.txt"), key=lambda file: file.stat().st_size, default=None)
    if ranges is None:
        return []
    peak = ranges.read_text().partition("(peak):\n")[2].partition("Stack trace")[0]
    found: list[tuple[str, str, str]] = re.findall(rf"^ +(\S+?){SIZE}", peak, re.MULTILINE)[:count]
    stem = ranges.name.removesuffix("-live-range.txt")
    shapes = _shapes(folder / f"{stem}-buffer-assignment.txt")
    sources = _sources(folder / f"{stem}.txt", {name for name, _, _ in found})
    key = lambda name, index: f"{name}{{{index}}}" if index else name
    return [
        Buffer(shapes.get(key(name, index), "?"), int(size), sources.get(name, name))
        for name, index, size in found
    ]


def _shapes(file: Path) -> dict[str, str]:
    """Of all values, such as {"fusion.3{1}": "f32[8,4]"}."""
    return dict(re.findall(r"value: <\d+ (\S+)(?: \(phi\))? @\d+> \([^)]*\): (\w+\[[\d,]*\])", _text(file)))


def _sources(file: Path, names: set[str]) -> dict[str, str]:
    """What the named instructions come from: paths in the program that was traced, or arguments."""
    rows = re.findall(r'^ +(?:ROOT )?%?(\S+) = .*?op_name="([^"]*)"', _text(file), re.MULTILINE)
    return {name: source.replace("\\'", "'") for name, source in rows if name in names}


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
