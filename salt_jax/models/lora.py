"""Low-rank adaptation: instead of a matrix W train a and b, and use W + alpha / rank a b
(arXiv:2106.09685).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from salt_jax.types import Params, PRNGKey


def init_lora(key: PRNGKey, params: Params, rank: int) -> Params:
    """a and b for each matrix of the blocks, stacked by layer. b is zero: the network starts
    unchanged.
    """
    adapted = {}
    flat: dict[Any, Any] = dict(flatten_dict(params["blocks"]))
    for path, kernel in flat.items():
        if path[-1] == "kernel":
            key, k_a = jax.random.split(key)
            layers, rows, columns = kernel.shape
            a = jax.random.normal(k_a, (layers, rows, rank)) * rows**-0.5
            adapted[(*path, "lora_a")], adapted[(*path, "lora_b")] = (
                a,
                jnp.zeros((layers, rank, columns)),
            )
    return {"blocks": unflatten_dict(adapted)}


def merge(base: Params, params: Params, lora: Any) -> Params:
    """The whole network.

    `params` already is, unless `lora.rank` says that it adapts `base`, which gets no gradient.
    """
    if not lora.rank:
        return params
    flat: dict[Any, Any] = dict(flatten_dict(jax.lax.stop_gradient(base)))
    adapted: dict[Any, Any] = dict(flatten_dict(params))
    for path in {path[:-1] for path in adapted}:
        product = jnp.matmul(adapted[(*path, "lora_a")], adapted[(*path, "lora_b")])
        flat[path] = flat[path] + lora.alpha / lora.rank * product
    return unflatten_dict(flat)
