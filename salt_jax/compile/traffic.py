"""How long what a program sends is under way, at the rates that vendors name: a bound, no
measurement.

Bytes are those of `hlo`, by the axes of the mesh that a collective runs along. A group whose
devices are all near each other (one host of GPUs, one slice of TPUs) sends over their links; one
that is spread over several sends over the network, for which each device has its own port: m of its
devices side by side share m ports.
"""

import math
from collections.abc import Mapping

import numpy as np

from salt_jax.compile.target import Target


def group(mesh: Mapping[str, int], axes: str, near: int) -> tuple[int, int]:
    """Devices of a group along axes "data+fsdp" of a mesh, and those of them that are near each
    other. `near`: how many devices of the mesh, one after another, are.
    """
    grid = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    first = grid[tuple(slice(None) if name in axes.split("+") else 0 for name in mesh)]
    return first.size, int((first < near).sum())


def rate(target: Target, mesh: Mapping[str, int], axes: str) -> float:
    """Bytes a second that one device of the target sends at best along these axes."""
    chip = target.described
    assert chip, "rates are those of described devices"
    whole, side_by_side = group(mesh, axes, target.near)
    if side_by_side == whole:
        return chip.link
    return min(chip.link, side_by_side * chip.network)


def seconds(target: Target, mesh: Mapping[str, int], sent: Mapping[str, float]) -> float:
    """For all that one device sends, by axes, one after another."""
    return sum(size / rate(target, mesh, axes) for axes, size in sent.items() if axes)
