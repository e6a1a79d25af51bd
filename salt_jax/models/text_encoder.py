"""umT5 encoder: token ids -> the text embedding that conditions the denoiser.

A T5 v1.1 encoder (arXiv:1910.10683, arXiv:2002.05202) whose layers each own a relative position
bias (umT5, arXiv:2304.09151). What differs from a usual transformer:
  no 1/sqrt(d) in attention (the initialisation of q absorbs it), no absolute positions, no linear
  biases, RMS norms with a gain only, a GELU-gated feed-forward, token embedding not scaled.
Parameter names follow transformers' `UMT5EncoderModel`; its `encoder.block.{i}.layer.{0,1}` are
`blocks`, stacked on a leading layer axis.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Int

from salt_jax.models.blocks import apply
from salt_jax.models.presets import TEXT_PRESETS, TextEncoderConfig
from salt_jax.types import Params, PRNGKey, TextEmb, TokenIds

PRESETS = TEXT_PRESETS
PAD = 0  # the token that fills a row behind its text
WIDTH = 64  # `encode_prompts` encodes multiples of so many tokens: few programs, little padding


def init_text_encoder(key: PRNGKey, config: TextEncoderConfig) -> Params:
    """Fresh float32 parameters with T5's initialisation: every sub-layer puts out values of order
    one.
    """
    k_shared, k_blocks, k_norm = jax.random.split(key, 3)
    x, buckets = jnp.zeros((1, 1, config.dim)), relative_buckets(1, config)
    table = nn.Embed(config.vocab_size, config.dim, embedding_init=nn.initializers.normal(1.0))

    def block(key):
        is_text = jnp.ones((1, 1), bool)
        return _Block(config, jnp.float32).init(key, x, is_text, buckets)["params"]

    return {
        "shared": table.init(k_shared, jnp.zeros((1, 1), jnp.int32))["params"],
        "blocks": jax.vmap(block)(jax.random.split(k_blocks, config.num_layers)),
        "final_layer_norm": nn.RMSNorm(config.eps).init(k_norm, x)["params"],
    }


def encode_text(
    params: Params, tokens: TokenIds, config: TextEncoderConfig, *, dtype: DTypeLike = jnp.float32
) -> TextEmb:
    """The embedding of each token in the light of its text; rows past the end of the text are zero.

    Padding (id 0) is no key for attention, so a row does not depend on the length it is padded to.
    `dtype` is that of the activations and of the result; norms' statistics and the softmax are
    float32 whatever it is. Weights may be stored in another one: a layer's are converted when it
    runs, of the token table only the rows read.
    """
    is_text = tokens != PAD
    buckets = relative_buckets(tokens.shape[1], config)

    def layer(x, block):
        return apply(_Block(config, dtype), block, x, is_text, buckets), None

    x = jnp.take(params["shared"]["embedding"], tokens, axis=0).astype(dtype)
    x, _ = jax.lax.scan(layer, x, params["blocks"])
    x = apply(nn.RMSNorm(config.eps, dtype=dtype), params["final_layer_norm"], x)
    return jnp.where(is_text[..., None], x, 0)


def encode_prompts(
    params: Params,
    tokens: Int[np.ndarray, "b t"],
    config: TextEncoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
) -> TextEmb:
    """`encode_text` at the cost of the longest text: the columns that are padding in every row are
    not computed.

    Equal to `encode_text` up to rounding. Reads the ids, so it is for concrete ones, not inside
    `jit`.
    """
    longest = int(np.max(np.nonzero(tokens)[1], initial=0)) + 1
    read = tokens[:, : -(-longest // WIDTH) * WIDTH]
    rows = _encode(params, jnp.asarray(read), config, dtype=dtype)
    return jnp.pad(rows, ((0, 0), (0, tokens.shape[1] - read.shape[1]), (0, 0)))


_encode = jax.jit(encode_text, static_argnames=("config", "dtype"))


def relative_buckets(length: int, config: TextEncoderConfig) -> np.ndarray:
    """Which row of a position bias table each (query, key) pair reads, int32 [length, length].

    With n buckets a side: keys after the query use the upper n; distances below n/2 have a bucket
    each, the rest grow logarithmically up to `max_distance` (T5, arXiv:1910.10683, section 2.1).
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    side = config.num_buckets // 2
    exact = side // 2
    distance = np.abs(relative)
    octaves = np.log(np.maximum(distance, 1) / exact) / np.log(config.max_distance / exact)
    # 1e-6 keeps distances on a bucket's edge (16, 32, 64, 128) from falling below it by rounding
    far = np.minimum(exact + np.floor(octaves * (side - exact) + 1e-6), side - 1)
    return (np.where(relative > 0, side, 0) + np.where(distance < exact, distance, far)).astype(
        np.int32
    )


class _Block(nn.Module):
    """Self-attention with its own position bias, then the gated feed-forward, both pre-norm."""

    config: TextEncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, is_text: jax.Array, buckets: np.ndarray) -> jax.Array:
        c = self.config
        inner = c.num_heads * c.head_dim
        norm = partial(nn.RMSNorm, c.eps, dtype=self.dtype)

        def linear(name, features, variance):
            init = nn.initializers.normal(variance**-0.5)
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        h = norm(name="attention_layer_norm")(x)
        # 1 / head_dim here in place of a scale below
        q = linear("q", inner, c.dim * c.head_dim)(h)
        k, v = linear("k", inner, c.dim)(h), linear("v", inner, c.dim)(h)
        q, k, v = (z.reshape(*h.shape[:2], c.num_heads, c.head_dim) for z in (q, k, v))
        init = nn.initializers.normal(c.dim**-0.5)
        table = nn.Embed(
            c.num_buckets, c.num_heads, embedding_init=init, name="relative_attention_bias"
        )
        bias = table(buckets).transpose(2, 0, 1)[None]  # [1, A, query, key]
        mask = is_text[:, None, None, :]  # [B, 1, 1, key]
        # "xla" is the one whose logits and softmax are float32 on every backend
        h = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0, implementation="xla")
        x = x + linear("o", c.dim, inner)(h.reshape(*h.shape[:2], inner))

        h = norm(name="ffn_layer_norm")(x)
        gate = nn.gelu(linear("wi_0", c.ffn_dim, c.dim)(h), approximate=True)
        return x + linear("wo", c.dim, c.ffn_dim)(gate * linear("wi_1", c.ffn_dim, c.dim)(h))
