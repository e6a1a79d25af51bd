"""Attention in plain jax that never stores all scores at once, with a gradient written by hand.

Queries are worked off some at a time, each against all keys, so a softmax needs no second pass. The
backward pass makes the scores again from the row sums (Dao et al., arXiv:2205.14135, section 3.1
and appendix B.2); with

    P = exp(S - lse),  dP = dO V^T,  dS = P (dP - sum_d dO O)

it also is fewer passes over the scores than what jax derives from a softmax.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from salt_jax.models.remat import ATTENTION

# Of one block, over batch and heads: 256 MiB in float32, a few times in the backward pass.
MOST_SCORES = 2**26


def attend_by_blocks(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    length: Int[Array, ""] | None,
) -> Float[Array, "b l a d"]:
    """As `models.attention.attention`. It has no JVP."""
    scaled = (q * (1 / math.sqrt(q.shape[-1]))).astype(q.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(_attend(*heads_first, length), 1, 2)


@jax.custom_vjp
def _attend(q, k, v, length):
    return _forward(q, k, v, length)[0]


def _forward(q, k, v, length):
    def block(nothing, q):
        scores = _scores(q, k, length)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum(
            "balm,bamd->bald", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return nothing, ((out / total).astype(q.dtype), (top + jnp.log(total))[..., 0])

    count = _count(q, k)
    made = jax.lax.scan(block, None, _split(q, count), unroll=count == 1)[1]
    return jax.tree.map(lambda y: _join(y, q.shape[2]), made)


def _attend_forward(q, k, v, length):
    out, lse = checkpoint_name(_forward(q, k, v, length), ATTENTION)
    return out, (q, k, v, length, out, lse)


def _attend_backward(saved, d_out):
    q, k, v, length, out, lse = saved
    f32 = dict(preferred_element_type=jnp.float32)
    inner = jnp.einsum("bald,bald->bal", d_out, out, **f32)

    def block(sums, given):
        q, d_out, lse, inner = given
        weights = jnp.exp(_scores(q, k, length) - lse[..., None])
        d_weights = jnp.einsum("bald,bamd->balm", d_out, v, **f32)
        d_scores = (weights * (d_weights - inner[..., None])).astype(q.dtype)
        d_q = jnp.einsum("balm,bamd->bald", d_scores, k, **f32)
        d_k = jnp.einsum("balm,bald->bamd", d_scores, q, **f32)
        d_v = jnp.einsum("balm,bald->bamd", weights.astype(q.dtype), d_out, **f32)
        return (sums[0] + d_k, sums[1] + d_v), d_q.astype(q.dtype)

    sums, count = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)), _count(q, k)
    given = tuple(_split(x, count) for x in (q, d_out, lse, inner))
    (d_k, d_v), d_q = jax.lax.scan(block, sums, given, unroll=count == 1)
    return _join(d_q, q.shape[2]), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q, k, length):
    scores = jnp.einsum("bald,bamd->balm", q, k, preferred_element_type=jnp.float32)
    if length is None:
        return scores
    counts = jnp.arange(k.shape[2]) < length
    return jnp.where(counts[None, None, None], scores, -jnp.inf)


def _count(q, k) -> int:
    """Blocks that the queries are worked off in."""
    b, a, rows = q.shape[:3]
    return -(-rows // max(MOST_SCORES // (b * a * k.shape[2]), 1))


def _split(x, count: int):
    """[B, A, L, ...] as [count, B, A, l, ...], padded with zeros.

    A query of zeros whose cotangent is zero adds nothing to any gradient.
    """
    each = -(-x.shape[2] // count)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, count * each - x.shape[2])) + ((0, 0),) * (x.ndim - 3))
    return jnp.moveaxis(padded.reshape(*x.shape[:2], count, each, *x.shape[3:]), 2, 0)


def _join(y, rows: int):
    """The inverse of `_split`."""
    count, b, a, each = y.shape[:4]
    return jnp.moveaxis(y, 0, 2).reshape(b, a, count * each, *y.shape[4:])[:, :, :rows]
