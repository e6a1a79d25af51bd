"""The one attention. Everything that attends goes through `attention`, so a faster kernel has one place to live."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def flash_takes(dtype: Any, width: int) -> bool:
    """Whether a GPU's flash kernel runs heads of this dtype and width; it makes its scores again for a gradient."""
    return jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128


def attention(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    length: Int[Array, ""] | None = None,
) -> Float[Array, "b l a d"]:
    """Softmax attention without a mask: every query sees every key. Logits in float32, scale 1 / sqrt(d).

    Visibility is never a mask here: callers pass the keys that may be seen (chunks are contiguous). The one
    exception is a cache that fills over time: of its keys only the first `length` count.
    On GPU, half precision runs cuDNN's flash kernel; elsewhere XLA's.
    """
    flash = jax.default_backend() == "gpu" and flash_takes(q.dtype, q.shape[-1])
    lengths = None if length is None else jnp.full(q.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn" if flash else "xla"
    )
