"""Where every array lives: one mesh with four named axes, and rules from a parameter's path to its
PartitionSpec.

| axis    | cuts                                | note                                      |
|---------|-------------------------------------|-------------------------------------------|
| data    | the batch                           | parameters are copied along it            |
| fsdp    | the batch, parameters and moments   | gathered layer by layer, when they are used |
| context | the tokens of a clip                | exchanged for heads to attend; no parameters |
| tensor  | the width of the matrix products    |                                           |

A single device is a mesh of one: axes of size 1 stay, so no spec ever changes. The compiler
propagates (Auto axes); a jitted step fixes its inputs and outputs with the shardings made here.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from salt_jax.errors import UserError
from salt_jax.models.layout import BATCH, cache_spec, fitting
from salt_jax.types import Leaf, Tree

AXES = ("data", "fsdp", "context", "tensor")

# The first rule that matches a path wins. Moments and EMA end in the path of their parameter, so
# they follow it. Column-parallel kernels feed row-parallel ones: along `tensor` the wide activation
# between the two is never gathered.
RULES = (
    (r"(^|/)blocks/((self|cross)_attn/[qkv]|ffn_in)/kernel$", P(None, "fsdp", "tensor")),
    (r"(^|/)blocks/((self|cross)_attn/o|ffn_out)/kernel$", P(None, "tensor", "fsdp")),
)
CACHE = r"(^|/)stream/cache/[kv]$"
VIDEOS = r"(^|/)stream/(cache/x0|text|switch|past)$"  # spread as the batch is
WHOLE = r"(^|/)vae/"  # small, and its convolutions are of whole pictures
LARGE = r"(^|/)(kernel|embedding)$"  # any other matrix: its largest axis that divides, over fsdp
WAITING = r"(^|/)(opt_state|ema)/"  # what only its own update reads
HOST = "pinned_host"
SPREAD = {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}
STACKED = r"(^|/)blocks/"  # axis 0 counts layers; a scan slices it, so it is never cut


def make_mesh(sizes: Mapping[str, object], devices: Sequence | None = None) -> Mesh:
    """The devices as a grid of data x fsdp x context x tensor.

    Args:
        sizes: as in `axis_sizes`.
        devices: the jax.Device of each, all by default.

    Raises:
        UserError: as `axis_sizes`.
    """
    there = jax.devices() if devices is None else devices
    shape = tuple(axis_sizes(sizes, len(there)).values())
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    # on a TPU: 8 x 8 on a torus of 4 x 4 x 4 cuts one of its axes in two
    except NotImplementedError:
        grid = mesh_utils.create_device_mesh(shape, there, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def axis_sizes(sizes: Mapping[str, object], count: int) -> dict[str, int]:
    """How many of `count` devices each axis has, in the order of `AXES`.

    Args:
        sizes: one size for each of `AXES`; one of them may be -1, which takes all devices that are
          left.

    Raises:
        UserError: an axis is missing, unknown or not a positive number, or the sizes do not make up
          the devices.
    """
    asked = {axis: sizes.get(axis) for axis in AXES} | dict(sizes)
    shown = ", ".join(f"{axis}={size}" for axis, size in asked.items())
    known = {axis: n for axis, n in asked.items() if isinstance(n, int) and n > 0}
    left = [axis for axis, size in asked.items() if size == -1]
    if set(asked) != set(AXES) or len(left) > 1 or {*known, *left} != set(AXES):
        raise UserError(
            f"config.mesh is ({shown}), but it needs {', '.join(AXES)} and no other, each a whole "
            "number >= 1; "
            "one of them may be -1, which takes the devices that are left"
        )
    taken = math.prod(known.values())
    found = known | dict.fromkeys(left, count // taken)
    if math.prod(found.values()) != count:
        raise UserError(
            f"config.mesh ({shown}) does not fit {count} device(s): the product of the sizes has "
            f"to be {count}; "
            "set one of them to -1 to take the devices that are left, or change the others"
        )
    return {axis: found[axis] for axis in AXES}


def partition_spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """How an array of `shape` at `path` (keys joined by "/") is cut; an axis that does not divide
    stays whole.
    """
    if re.search(CACHE, path):
        return cache_spec(sizes, shape)
    if re.search(VIDEOS, path):
        return P(fitting(sizes, shape[0], BATCH))
    if re.search(WHOLE, path):
        return P()
    first = 1 if re.search(STACKED, path) else 0
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(shape) == len(spec):
            ways = [sizes.get(name, 1) for name in spec]
            cut = zip(spec, shape, ways, strict=True)
            return P(*(name if n % size == 0 else None for name, n, size in cut))
    divisible = [i for i in range(first, len(shape)) if shape[i] % sizes["fsdp"] == 0]
    if not re.search(LARGE, path) or not divisible:
        return P()
    largest = max(divisible, key=lambda i: shape[i])
    return P(*(None,) * largest, "fsdp")


def state_shardings(mesh: Mesh, abstract_state: Tree, host: bool = False) -> Tree:
    """A sharding for every array of a tree: parameters, EMA, moments, or a whole TrainState
    (see `jax.eval_shape`).

    `host`: moments and EMA of a TrainState lie in the host's memory, cut alike; counters stay.
    """

    def sharding(path: tuple, leaf: Leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        where = NamedSharding(mesh, partition_spec(name, leaf.shape, mesh.shape))
        return (
            where.with_memory_kind(HOST)
            if host and leaf.ndim and re.search(WAITING, name)
            else where
        )

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def laid_out(abstract: Tree, shardings: Tree) -> Tree:
    """A tree of shapes, each array's with where it lies: for Orbax and planners."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract, shardings
    )


def put(tree: Tree, shardings: Tree) -> Tree:
    """Arrays where their shardings, or the one for all of them, say; what is there already is not
    copied.

    Every process has to have the same values: each takes what its own devices hold.
    """

    def place(x: Leaf, where: Sharding) -> jax.Array:
        if isinstance(x, jax.Array):
            if x.sharding.is_equivalent_to(where, x.ndim):
                return x
            if where.is_fully_addressable or not x.is_fully_addressable:
                return jax.device_put(x, where)
        here = np.asarray(x)
        with jax.transfer_guard("allow"):  # it is asked for
            return jax.make_array_from_callback(here.shape, where, lambda index: here[index])

    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """Which of `count` rows the devices of this process hold, int [n], sorted.

    A mesh whose batch axes do not cover the processes gives several processes the same rows.
    """
    slices = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in slices]))


def put_rows(local: np.ndarray, rows: np.ndarray, count: int, sharding: NamedSharding) -> jax.Array:
    """An array of `count` rows, of which `local` holds `rows`, those of `local_rows`."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(count)
        first = np.searchsorted(rows, start)
        return local[first : first + stop - start]

    with jax.transfer_guard("allow"):  # it is asked for
        return jax.make_array_from_callback((count, *local.shape[1:]), sharding, read)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are spread over data and fsdp; an example is whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def all_devices() -> Mesh:
    """For work without a batch to cut: parameters are spread over all devices."""
    return make_mesh(SPREAD)


def own_devices() -> Mesh:
    """As `all_devices`, of this process alone: its programs wait for no other one."""
    return make_mesh(SPREAD, jax.local_devices())
