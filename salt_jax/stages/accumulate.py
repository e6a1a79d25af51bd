"""The gradient of a large batch, a few clips at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from salt_jax.models.kv_cache import KVCache
from salt_jax.stages.stage import Metrics
from salt_jax.state import Stream
from salt_jax.types import Params

# Trees of arrays [B, ...] each.
Batch = TypeVar("Batch")
Noise = TypeVar("Noise")
Made = TypeVar("Made")

More = tuple[Metrics, Stream | None]
"""What a loss returns beside its value."""

SHARED = -1  # no batch axis
CACHE_AXES = KVCache(k=1, v=1, x0=0, frames=SHARED, filled=SHARED, end=SHARED)


def mean_gradient(
    loss: Callable[[Params, Batch, Noise, Stream | None], tuple[Float[Array, ""], More]],
    params: Params,
    batch: Batch,
    noise: Noise,
    stream: Stream | None,
    count: int,
) -> tuple[tuple[Float[Array, ""], More], Params]:
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
    axes = stream and replace(jax.tree.map(lambda _: 0, stream), cache=CACHE_AXES)

    def turn(carried, i):
        total, made = carried
        given = jax.tree.map(lambda x: _take(x, 0, i, count), (batch, noise))

        # The videos are written where they were read. What all share is read as it was before the
        # first turn.
        def mine_of(new, old, axis):
            return old if axis < 0 else _take(new, axis, i, count)

        def with_mine(x, part, axis):
            return part if axis < 0 else _put(x, part, axis, i, count)

        mine = jax.tree.map(mine_of, made, stream, axes)
        (value, (metrics, mine)), grads = slope(params, *given, mine)
        made = jax.tree.map(with_mine, made, mine, axes)
        return (jax.tree.map(jnp.add, total, grads), made), (value, metrics)

    start = jax.tree.map(jnp.zeros_like, params), stream
    (total, made), means = jax.lax.scan(turn, start, jnp.arange(count))
    value, metrics = jax.tree.map(lambda x: x.mean(0), means)
    return (value, (metrics, made)), jax.tree.map(lambda g: g / count, total)


def in_turn(f: Callable[[Batch], Made], batch: Batch, count: int) -> Made:
    """f(batch) [B, ...], of `count` micro-batches in turn, those of `mean_gradient`; f treats
    examples alike.
    """
    if count == 1:
        return f(batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(_apart(x, 0, count), 1, 0), batch)
    made = jax.lax.map(f, parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), made)


def _apart(x: Array, axis: int, count: int) -> Array:
    """[.., B, ..] -> [.., B / count, count, ..]."""
    return x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])


def _take(x: Array, axis: int, i: Int[Array, ""], count: int) -> Array:
    return jax.lax.dynamic_index_in_dim(_apart(x, axis, count), i, axis + 1, keepdims=False)


def _put(x: Array, part: Array, axis: int, i: Int[Array, ""], count: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(_apart(x, axis, count), part, i, axis + 1).reshape(
        x.shape
    )
