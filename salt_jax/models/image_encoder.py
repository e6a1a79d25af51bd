"""CLIP image encoder: a preprocessed picture -> the features that an image-to-video denoiser reads.

The vision transformer of CLIP (arXiv:2103.00020) in the size ViT-H/14, as Wan 2.1 uses it: the
features are what the last layer but one puts out, class token first, without the norm behind the
last layer. That layer and norm have no part here: `num_layers` counts the layers that run, one less
than the published model has.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from salt_jax.models.attention import attention
from salt_jax.models.blocks import apply
from salt_jax.types import Params, PRNGKey


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of the encoder."""

    dim: int
    num_layers: int  # that run
    num_heads: int
    mlp_dim: int
    image_size: int  # pixels on a side
    patch_size: int  # pixels on a side
    eps: float = 1e-5  # of every norm of CLIP

    @property
    def num_tokens(self) -> int:
        """The class token and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


PRESETS = {
    "tiny": ImageEncoderConfig(
        dim=40, num_layers=2, num_heads=2, mlp_dim=80, image_size=28, patch_size=14
    ),
    "vit-h-14": ImageEncoderConfig(
        dim=1280, num_layers=31, num_heads=16, mlp_dim=5120, image_size=224, patch_size=14
    ),
}
"""`vit-h-14` is the encoder of Wan 2.1's image to video."""


def init_image_encoder(key: PRNGKey, config: ImageEncoderConfig) -> Params:
    """Fresh float32 parameters: tables of std 1 / sqrt(dim), matrices that keep the variance."""
    k_class, k_position, k_patch, k_norm, k_blocks = jax.random.split(key, 5)
    x = jnp.zeros((1, 1, config.dim))
    image = jnp.zeros((1, config.image_size, config.image_size, 3))

    def table(key, *shape):
        return jax.random.normal(key, shape) * config.dim**-0.5

    def block(key):
        return _Block(config, jnp.float32).init(key, x)["params"]

    return {
        "class_embedding": table(k_class, config.dim),
        "patch_embedding": _patches(config, jnp.float32).init(k_patch, image)["params"],
        "position_embedding": table(k_position, config.num_tokens, config.dim),
        "norm_in": _norm(config, jnp.float32).init(k_norm, x)["params"],
        "blocks": jax.vmap(block)(jax.random.split(k_blocks, config.num_layers)),
    }


def encode_image(
    params: Params,
    pixels: Float[Array, "b h w 3"],
    config: ImageEncoderConfig,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b n d"]:
    """The features of each picture: row 0 is the class token's, then the patches row by row.

    `pixels` come from `image_condition.squash_for_clip` or `crop_for_clip`. `dtype` is that of the
    activations and of the result; norms' statistics and the softmax are float32 whatever it is.

    Raises:
        ValueError: if the picture is not of the size that the positions were learned for.
    """
    if pixels.shape[1:3] != (config.image_size, config.image_size):
        raise ValueError(
            f"the image encoder reads {config.image_size} x {config.image_size} pixels, got "
            f"{pixels.shape[1:3]}"
        )
    patches = apply(_patches(config, dtype), params["patch_embedding"], pixels)
    patches = patches.reshape(len(patches), -1, config.dim)
    first = jnp.broadcast_to(params["class_embedding"].astype(dtype), (len(patches), 1, config.dim))
    x = jnp.concatenate([first, patches], axis=1) + params["position_embedding"].astype(dtype)[None]
    x = apply(_norm(config, dtype), params["norm_in"], x)

    def layer(x, block):
        return apply(_Block(config, dtype), block, x), None

    x, _ = jax.lax.scan(layer, x, params["blocks"])
    return x


def _patches(config: ImageEncoderConfig, dtype: DTypeLike) -> nn.Conv:
    size = (config.patch_size, config.patch_size)
    return nn.Conv(config.dim, size, strides=size, padding="VALID", use_bias=False, dtype=dtype)


def _norm(config: ImageEncoderConfig, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(config.eps, dtype=dtype, use_fast_variance=False, name=name)


class _Block(nn.Module):
    """Self-attention, then the feed-forward, both pre-norm."""

    config: ImageEncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        linear = partial(nn.Dense, dtype=self.dtype)
        h = _norm(c, self.dtype, "norm1")(x)
        projected = (linear(c.dim, name=name)(h) for name in "qkv")
        q, k, v = (z.reshape(*h.shape[:2], c.num_heads, -1) for z in projected)
        x = x + linear(c.dim, name="o")(attention(q, k, v).reshape(h.shape))
        h = linear(c.mlp_dim, name="fc_in")(_norm(c, self.dtype, "norm2")(x))
        return x + linear(c.dim, name="fc_out")(nn.gelu(h, approximate=False))
