"""How a network's arrays are laid out over a mesh of (data, fsdp, context, tensor); see
`sharding`.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

BATCH = ("data", "fsdp")
TOKENS = (BATCH, None, ("context",))  # of [B, F, S, D]
EXCHANGED = ("tensor", "context")  # of heads, where tokens are exchanged for them


def fitting(
    sizes: Mapping[str, int], size: int, axes: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The axes of a mesh of these sizes if together they cut `size` numbers evenly, else none."""
    return axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None


def head_axes(sizes: Mapping[str, int], heads: int) -> tuple[str, ...] | None:
    """How the heads of a KV cache are cut."""
    return fitting(sizes, heads, EXCHANGED) or fitting(sizes, heads, ("tensor",))


def lay(x: Array, mesh: Mesh | None, *axes: tuple[str, ...] | None) -> Array:
    """`x` with its first axes sharded as given, where they divide; the rest whole.

    Without a mesh as it is.
    """
    if mesh is None:
        return x
    spec = P(*(fitting(mesh.shape, n, names) for n, names in zip(x.shape, axes, strict=False)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def platform_of(mesh: Mesh | None) -> str:
    """Of the devices that a program is for, which need not be here: "cpu", "gpu" or "tpu"."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform


def cache_spec(sizes: Mapping[str, int], shape: tuple[int, ...]) -> P:
    """Of keys or values [layers, B, F, S, A, d], as attention reads them: whole clips of some
    heads.
    """
    return P(None, fitting(sizes, shape[1], BATCH), None, None, head_axes(sizes, shape[4]))


def lay_cache(x: Array, mesh: Mesh | None) -> Array:
    """Keys or values laid out so; without a mesh as they are."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, cache_spec(mesh.shape, x.shape)))
