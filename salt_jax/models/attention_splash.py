"""Attention by JAX's splash kernel for TPU (Pallas): scores stay on the chip, forward and
backward.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from salt_jax.models.remat import ATTENTION

LANES, BLOCK = 128, 512  # tokens are padded to whole lanes, and long ones to whole blocks


def attend_splash(
    q: Float[Array, "b l a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    length: Int[Array, ""] | None,
    interpret: bool = False,
) -> Float[Array, "b l a d"]:
    """As `models.attention.attention`. `interpret` runs it anywhere, slowly."""
    queries, heads, width, keys = *q.shape[1:], k.shape[1]
    (rows, block_q), (columns, block_k) = _padded(queries), _padded(keys)
    scaled = (q * (1 / math.sqrt(width))).astype(q.dtype)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    run = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    if length is not None:
        there, run.dkv_mask_info = _blocks_that_count(
            length, rows // block_q, columns // block_k, block_k
        )
        run.fwd_mask_info = run.dq_mask_info = there
    segments = None
    if length is not None or columns > keys:  # keys of the other segment do not count
        other = jnp.arange(columns) >= (keys if length is None else length)
        segments = splash.SegmentIds(jnp.zeros(rows, jnp.int32), other.astype(jnp.int32))
    over_batch = jax.vmap(run, in_axes=(0, 0, 0, None))
    ready = _heads_first(scaled, rows), _heads_first(k, columns), _heads_first(v, columns)
    out = over_batch(*ready, segments)
    assert isinstance(out, jax.Array)  # without the row sums, which nobody asks for
    return jnp.swapaxes(out[:, :, :queries], 1, 2)


def _heads_first(x: Float[Array, "b l a d"], length: int) -> Float[Array, "b a n d"]:
    """Padded with zeros to so many tokens."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))


def _blocks_that_count(
    length: Int[Array, ""], rows: int, columns: int, block: int
) -> tuple[MaskInfo, MaskInfo]:
    """Of a grid of blocks, for a kernel that goes along the keys and one that goes along the
    queries.

    Blocks whose keys do not count are not multiplied, nor loaded: the block that is there stays. Of
    the last one that counts the rest is masked by its segment.
    """
    row, column = jnp.arange(rows)[None, :, None], jnp.arange(columns)[None, None]
    last = (length - 1) // block
    counts = jnp.broadcast_to(column <= last, (1, rows, columns))
    mask = jnp.where(counts, 2, 0).astype(jnp.int32)
    along_keys, along_queries = (
        MaskInfo(following.astype(jnp.int32), None, mask, None, None)
        for following in (jnp.where(counts, column, last), jnp.where(counts, row, 0))
    )
    return along_keys, along_queries


def _padded(tokens: int) -> tuple[int, int]:
    """How many tokens a kernel is given for so many, and in blocks of how many."""
    unit = LANES if tokens <= BLOCK else BLOCK
    whole = -(-tokens // unit) * unit
    return whole, min(whole, BLOCK)
