"""Parts of arrays in files, without reading the rest."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable

import numpy as np

from salt_jax.io.files import AnyPath, read_ranges

SHORTEST = 2**17  # bytes of a run that is worth a request to a bucket

Bounds = tuple[tuple[int, int], ...]
"""A slice of an array: first index and the one behind the last, on each axis."""


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(cut.indices(n)[:2] for cut, n in zip(index, shape, strict=True))


def slices(
    path: AnyPath, offset: int, dtype: np.dtype, shape: tuple[int, ...], wanted: Iterable[Bounds]
) -> Callable[[Bounds], np.ndarray]:
    """Reads slices of an array that lies in a file in the order of its axes, and gives each of
    them. What two slices share is read once.

    A slice is read as runs of bytes, as few as there can be. Where cuts through inner axes would
    leave runs shorter than `SHORTEST` they are made in memory, of longer runs.
    """
    shape, wanted = (1, *shape), [((0, 1), *part) for part in wanted]
    inner = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    cut = [i for i, n in enumerate(shape) if any(part[i] != (0, n) for part in wanted)]

    def shortest(axis: int) -> int:
        return min(inner[axis] * (part[axis][1] - part[axis][0]) for part in wanted)

    # runs go along this axis; the first one is not cut, so there a run is the whole array
    able = (i for i in reversed(range(max(cut, default=0) + 1)) if shortest(i) >= SHORTEST)
    axis = next(able, 0)
    axis = max((i for i in cut if i <= axis), default=0)

    def runs(part: Bounds) -> list[tuple[int, int]]:
        """Offset and length of each run."""
        first, last = part[axis]
        outer = itertools.product(*(range(*place) for place in part[:axis]))
        starts = (sum(map(operator.mul, place, inner)) for place in outer)
        begin = offset + first * inner[axis]
        return [(begin + start, (last - first) * inner[axis]) for start in starts]

    places = list(dict.fromkeys(run for part in wanted for run in runs(part)))
    read = dict(zip(places, read_ranges(path, places), strict=True))

    def take(part: Bounds) -> np.ndarray:
        part = ((0, 1), *part)
        first, last = part[axis]
        inside = (last - first, *shape[axis + 1 :])
        rows = [read[run].view(dtype).reshape(inside) for run in runs(part)]
        rows = [row[(slice(None), *itertools.starmap(slice, part[axis + 1 :]))] for row in rows]
        joined = rows[0] if len(rows) == 1 else np.stack(rows)
        return joined.reshape([end - begin for begin, end in part[1:]])

    return take
