"""Where in a file the networks of Wan 2.1 are: found by the names in it, under any prefix."""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from salt_jax.convert import names
from salt_jax.convert.names import TABLES, Row
from salt_jax.errors import UserError, listed
from salt_jax.io.tensor_files import TensorRef


class Place(NamedTuple):
    """Where in the files a network may be."""

    network: str
    layout: str
    prefix: str  # of its names


def bare(tensors: Mapping[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """Names without the wrappers of training between their parts."""
    found = {}
    for name, tensor in tensors.items():
        short = name
        for wrapper in names.WRAPPERS:
            short = short.replace(wrapper, "")
        if short in found:
            raise UserError(
                f"{where} holds {short} twice, once as {name}; convert one model at a time"
            )
        found[short] = tensor
    return found


def find_places(tensors: Iterable[str]) -> list[Place]:
    """Where more than half of the names of a network stand, whatever one prefix is in front of all
    of them.
    """
    tails = defaultdict(set)  # each name without its first parts, and what these were
    for name in tensors:
        for cut in [0, *(match.end() for match in re.finditer(r"[./]", name))]:
            tails[name[cut:]].add(name[:cut])
    best: dict[tuple[str, str], tuple[float, Place]] = {}
    for network, layout in itertools.product(TABLES, ("official", "diffusers")):
        expected = names_of(TABLES[network], layout)
        apart = [name for name in expected if "{i}" not in name]
        fronts = Counter(front for name in apart for front in tails.get(name, ()))
        for front in (front for front, count in fronts.items() if count * 2 >= len(apart)):
            inside = [name.removeprefix(front) for name in tensors if name.startswith(front)]
            seen = unnumbered(_aliased(inside), TABLES[network], layout)
            share = sum(name in seen for name in expected) / len(expected)
            if share >= 0.5 and share > best.get((network, front), (0.0,))[0]:
                best[network, front] = share, Place(network, layout, front)
    return [place for _, place in best.values()]


def choose(prefixes: Sequence[str], key: str, where: str) -> int:
    """Which of several places is the student: the one that `key` names, or else by
    `names.STUDENTS`.

    Raises:
      UserError: several may be.
    """
    parts = [re.split(r"[./]", prefix) for prefix in prefixes]
    keyed = [i for i, prefix in enumerate(prefixes) if key in (*parts[i], prefix.strip("./"))]
    if key and keyed:
        able = keyed
    else:
        able = [i for i, prefix in enumerate(prefixes) if not re.search(names.HELPERS, prefix)]
    ranks = {i: min(map(_rank, parts[i])) for i in able}
    first = [i for i, rank in ranks.items() if rank == min(ranks.values())]
    if len(first) != 1:
        places = listed(prefixes[i].strip("./") or "the top" for i in first or range(len(prefixes)))
        raise UserError(f"{where} may be what stands under {places}; choose with --key")
    return first[0]


def _rank(part: str) -> int:
    """How soon a part of a prefix is taken for the student's; 99: not at all."""
    if part not in names.STUDENTS and re.search(names.AVERAGE, part):
        part = "ema"
    return names.STUDENTS.index(part) if part in names.STUDENTS else 99


def inside(
    tensors: Mapping[str, TensorRef], prefix: str, others: Sequence[str]
) -> dict[str, TensorRef]:
    """What stands under a prefix, the prefix cut off, without what other networks there have and
    without counters.
    """
    other = tuple(other for other in others if other and other.startswith(prefix))
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
        and not (other and name.startswith(other))
        and not (tensor.dtype.kind in "iu" and math.prod(tensor.shape) == 1)
    }
    for name, first in names.ALIASES.items():
        if name in inside:
            inside.setdefault(first, inside.pop(name))
    return {name: tensor for name, tensor in inside.items() if "/" not in name}


def _aliased(tensors: Iterable[str]) -> list[str]:
    return [names.ALIASES.get(name, name) for name in tensors]


def names_of(table: Iterable[Row], layout: str) -> list[str]:
    return [getattr(row, layout).partition("#")[0] for row in table]


def layers(tensors: Iterable[str], table: Iterable[Row], layout: str) -> dict[str, int]:
    """The names that belong to a layer, and which. The names of a layer all begin alike."""
    front = next(
        (name.partition("{i}")[0] for name in names_of(table, layout) if "{i}" in name), None
    )
    numbered = {
        name: front and re.match(re.escape(front) + r"(\d{1,4})\.", name) for name in tensors
    }
    return {name: int(match[1]) for name, match in numbered.items() if match}


def unnumbered(tensors: Iterable[str], table: Iterable[Row], layout: str) -> set[str]:
    """The names with {i} for the layer."""
    each = layers(tensors, table, layout)
    return {
        re.sub(rf"\b{each[name]}\b", "{i}", name, count=1) if name in each else name
        for name in tensors
    }
