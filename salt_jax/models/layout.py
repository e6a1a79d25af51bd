"""How a network's arrays are laid out over a mesh of (data, fsdp, context, tensor); see `train.sharding`."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")
TOKENS = (BATCH, None, ("context",))  # of [B, F, S, D]


def fitting(mesh: Mesh, size: int, axes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The axes of a mesh if together they cut `size` numbers evenly, else none."""
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def lay(x: Any, mesh: Mesh | None, *axes: tuple[str, ...] | None) -> Any:
    """`x` with its first axes cut as they are told, where that divides; the rest whole. Without a mesh as it is."""
    if mesh is None:
        return x
    spec = P(*(fitting(mesh, n, told) for n, told in zip(x.shape, axes, strict=False)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def platform_of(mesh: Mesh | None) -> str:
    """Of the devices that a program is for, which need not be here: "cpu", "gpu" or "tpu"."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform


def lay_cache(x: Any, mesh: Mesh | None) -> Any:
    """Keys or values [layers, B, F, S, A, d] as attention reads them: whole clips of some heads."""
    heads = mesh and (fitting(mesh, x.shape[4], ("tensor", "context")) or ("tensor",))
    return lay(x, mesh, None, BATCH, None, None, heads)
