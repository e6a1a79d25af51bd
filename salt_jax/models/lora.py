"""Low-rank adaptation: instead of a matrix W train a and b, and use W + alpha / rank a b
(arXiv:2106.09685).
"""

from typing import Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from salt_jax.types import Leaf, Params, PRNGKey


@runtime_checkable
class Adaptation(Protocol):
    """`config.lora`."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...


def init_lora(key: PRNGKey, params: Params, rank: int) -> Params:
    """a and b for each matrix of the blocks, stacked by layer. b is zero: the network starts
    unchanged.
    """
    adapted = {}
    for path, kernel in _flat(params["blocks"]).items():
        if path[-1] == "kernel":
            key, k_a = jax.random.split(key)
            layers, rows, columns = kernel.shape
            a = jax.random.normal(k_a, (layers, rows, rank)) * rows**-0.5
            adapted[(*path, "lora_a")], adapted[(*path, "lora_b")] = (
                a,
                jnp.zeros((layers, rank, columns)),
            )
    return {"blocks": unflatten_dict(adapted)}


def merge(base: Params, params: Params, lora: Adaptation) -> Params:
    """The whole network.

    `params` already is, unless `lora.rank` says that it adapts `base`, which gets no gradient.
    """
    if not lora.rank:
        return params
    flat, adapted = _flat(jax.lax.stop_gradient(base)), _flat(params)
    for path in {path[:-1] for path in adapted}:
        product = jnp.matmul(adapted[(*path, "lora_a")], adapted[(*path, "lora_b")])
        flat[path] = flat[path] + lora.alpha / lora.rank * product
    return unflatten_dict(flat)


def _flat(params: Params) -> dict[tuple[str, ...], Leaf]:
    """Parameters by their paths."""
    return cast(dict[tuple[str, ...], Leaf], flatten_dict(params))
