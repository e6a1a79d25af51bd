"""The gradient of a large batch, a few clips at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from salt_jax.models.kv_cache import KVCache
from salt_jax.state import Stream
from salt_jax.types import Params

SHARED = -1  # no batch axis
AXES = Stream(KVCache(k=1, v=1, x0=0, frames=SHARED, filled=SHARED, end=SHARED), 0)


def mean_gradient(
    loss: Callable, params: Params, batch: Any, noise: Any, stream: Stream | None, count: int
) -> tuple[tuple[jax.Array, tuple[dict[str, jax.Array], Stream | None]], Params]:
    """What `jax.value_and_grad(loss, has_aux=True)` returns for the whole batch, from `count`
    micro-batches in turn.

    Micro-batch i has the examples i, i + count, ... So a device that holds a run of the batch has
    its share of each micro-batch, and no example moves, if the batch is a multiple of devices x
    count. Gradients are summed in the parameters' type, float32.

    Args:
      loss: (params, batch, noise, stream) -> (value, (metrics, stream)), where value and metrics
        are means over examples, and so are the results.
      batch, noise: [B, ...] each.
      stream: the videos under way, or None where there are none; then `loss` returns None too.
    """
    slope = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return slope(params, batch, noise, stream)
    axes = stream and AXES

    def turn(carried, i):
        total, made = carried
        given = jax.tree.map(lambda x: _take(x, 0, i, count), (batch, noise))
        # The videos are written where they were read. What all share is read as it was before the
        # first turn.
        mine = jax.tree.map(
            lambda new, old, axis: old if axis < 0 else _take(new, axis, i, count),
            made,
            stream,
            axes,
        )
        (value, (metrics, mine)), grads = slope(params, *given, mine)
        made = jax.tree.map(
            lambda x, part, axis: part if axis < 0 else _put(x, part, axis, i, count),
            made,
            mine,
            axes,
        )
        return (jax.tree.map(jnp.add, total, grads), made), (value, metrics)

    start = jax.tree.map(jnp.zeros_like, params), stream
    (total, made), means = jax.lax.scan(turn, start, jnp.arange(count))
    value, metrics = jax.tree.map(lambda x: x.mean(0), means)
    return (value, (metrics, made)), jax.tree.map(lambda g: g / count, total)


def in_turn(f: Callable, batch: Any, count: int) -> Any:
    """f(batch) [B, ...], of `count` micro-batches in turn, those of `mean_gradient`; f treats
    examples alike.
    """
    if count == 1:
        return f(batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(_apart(x, 0, count), 1, 0), batch)
    together = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    return jax.tree.map(together, jax.lax.map(f, parts))


def _apart(x: Any, axis: int, count: int) -> Any:
    """[.., B, ..] -> [.., B / count, count, ..]."""
    return x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])


def _take(x: Any, axis: int, i: Any, count: int) -> Any:
    return jax.lax.dynamic_index_in_dim(_apart(x, axis, count), i, axis + 1, keepdims=False)


def _put(x: Any, part: Any, axis: int, i: Any, count: int) -> Any:
    return jax.lax.dynamic_update_index_in_dim(_apart(x, axis, count), part, i, axis + 1).reshape(
        x.shape
    )
