"""Softmax attention of the transformer and the image encoder, and the choice of its kernel.

| kernel | where       | scores that are kept                                            |
|--------|-------------|-----------------------------------------------------------------|
| cudnn  | GPU         | none; half precision, heads of at most 128                      |
| splash | TPU         | none; heads of a multiple of 128                                |
| blocks | anywhere    | of some queries at a time; a gradient written by hand           |
| plain  | anywhere    | all of them; the only one that has a JVP                        |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from salt_jax.models.attention_blocks import attend_by_blocks
from salt_jax.models.layout import BATCH, EXCHANGED, fitting, platform_of
from salt_jax.models.presets import Compute, Kernel, WanConfig


def choose_kernel(platform: str, dtype: DTypeLike, width: int) -> Kernel:
    """The fastest kernel for heads of this width on "gpu", "tpu" or another platform."""
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128:
        return "cudnn"
    return "splash" if platform == "tpu" and width % 128 == 0 else "blocks"


def compute_here(config: WanConfig, dtype: np.dtype | type) -> Compute:
    """How to run a network on the first device of this machine."""
    return Compute(dtype, kernel=choose_kernel(platform_of(None), dtype, config.head_width))


def is_flash(kernel: Kernel) -> bool:
    """Whether a kernel keeps no scores, and so makes them again for a gradient."""
    return kernel != "plain"


def attention(
    q: Float[Array, "b *l a d"],
    k: Float[Array, "b *m a d"],
    v: Float[Array, "b *m a d"],
    length: Int[Array, ""] | None = None,
    kernel: Kernel = "blocks",
    mesh: Mesh | None = None,
) -> Float[Array, "b *l a d"]:
    """Softmax attention without a mask: every query sees every key. Logits in float32,
    scale 1 / sqrt(d).

    Visibility is never a mask here: callers pass the keys that may be seen (chunks are contiguous).
    The one exception is a cache that fills over time: of its keys only the first `length` count.

    Args:
      q: tokens in any axes; [B, F, S, A, d] in a clip, where a mesh's context axis cuts S.
      k, v: as q, or [B, T, A, d] of a text, which every device along context has whole.
      length: of the keys that count; at least 1. None: all.
      kernel: see `choose_kernel`.
      mesh: where the program runs on many devices, each attends for its share of the batch, heads
        and tokens. A kernel is a black box to the compiler, which would otherwise copy everything
        everywhere.
    """

    def attend(q, k, v, *length):
        flat = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
        return KERNELS[kernel](*flat, *(length or (None,))).reshape(q.shape)

    lengths = () if length is None else (length,)
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, *lengths)
    queries, keys = attention_layout(mesh, q.shape, k.shape)
    specs = (queries, keys, keys, *(P() for _ in lengths))
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(
        q, k, v, *lengths
    )


def attention_layout(mesh: Mesh, queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[P, P]:
    """How queries and keys are cut while they attend: the batch over data and fsdp, heads over
    tensor.

    Along context the tokens of a clip are exchanged for heads, so that each device has all tokens
    of some heads. Where the heads do not divide, and for a text, which is short, queries stay cut
    and the keys are whole.
    """
    sizes, heads = mesh.shape, queries[-2]
    batch, exchanged = fitting(sizes, queries[0], BATCH), fitting(sizes, heads, EXCHANGED)
    if len(keys) == 5 and exchanged:
        both = P(batch, None, None, exchanged)
        return both, both
    across = (None,) * (len(queries) - 4)
    tensor, context = fitting(sizes, heads, ("tensor",)), fitting(sizes, queries[-3], ("context",))
    return P(batch, *across, context, tensor), P(batch, *(None,) * (len(keys) - 3), tensor)


def _plain(q, k, v, length):
    lengths = None if length is None else jnp.full(q.shape[0], length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="xla"
    )


def _cudnn(q, k, v, length):
    """cuDNN has no gradient for an odd number of queries or keys: each is padded by one that is
    ignored.
    """
    queries, keys = q.shape[1], k.shape[1]
    even = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    if length is None and keys % 2:
        length = keys
    lengths = None if length is None else jnp.full(q.shape[0], length, jnp.int32)
    out = jax.nn.dot_product_attention(*even, key_value_seq_lengths=lengths, implementation="cudnn")
    return out[:, :queries]


def _splash(q, k, v, length):
    from salt_jax.models.attention_splash import attend_splash  # here, because Pallas takes a while

    return attend_splash(q, k, v, length)


KERNELS: dict[str, Callable] = {
    "plain": _plain,
    "blocks": attend_by_blocks,
    "cudnn": _cudnn,
    "splash": _splash,
}
