"""Random weights for what is measured or compared without files."""

import jax
import numpy as np
from jax.typing import DTypeLike

from salt_jax import sharding
from salt_jax.types import Params


def random_params(
    shapes: Params, dtype: DTypeLike | None, seed: int, shardings: Params = None
) -> Params:
    """Weights of these shapes, of `dtype` if it is given, made without compiling anything. Every
    array matters, or a wrong one could hide: kernels of variance 1 / fan-in, gains around one,
    everything else of .1. Moments and counters are zero.

    Made of one draw, over and over, each array from another place of it.
    """
    noise = np.random.default_rng(seed).standard_normal(1 << 20, np.float32)

    def fill(i, path, leaf, place):
        *parents, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        kind = dtype or leaf.dtype  # cast before it grows: a teacher has 14e9 numbers
        if leaf.dtype.kind == "i" or "opt_state" in parents:
            values = np.zeros(leaf.shape, kind)
        else:
            stacked = int("blocks" in parents)
            std = float(np.prod(leaf.shape[stacked:-1])) ** -0.5 if name == "kernel" else 0.1
            drawn = std * np.roll(noise, 7919 * i) + float(name == "scale")
            values = np.resize(drawn.astype(kind), leaf.shape)
        return sharding.put(values, place) if place else jax.device_put(values)

    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    places = jax.tree.leaves(shardings) if shardings else [None] * len(flat)
    every = zip(flat, places, strict=True)
    return tree.unflatten([fill(i, path, leaf, at) for i, ((path, leaf), at) in enumerate(every)])
