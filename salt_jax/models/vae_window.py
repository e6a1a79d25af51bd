"""The first latent of a window that begins in mid-video, as Wan's VAE has the first of a video.

There a video's first latent encodes one frame, each later one four. A network that judges a window
takes its first latent for the first of a video, so LongLive and Self Forcing decode up to it and
encode the last frame anew.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from salt_jax.models.vae import VAEConfig, decode_first, decode_next, encode_video
from salt_jax.types import Latent, Params


def sizes_of(params: Params) -> VAEConfig:
    """The sizes of a VAE, read off its arrays."""
    return VAEConfig(
        params["decoder"]["norm_out"]["scale"].shape[0], params["from_latent"]["bias"].shape[0]
    )


def as_first(params: Params, latents: Latent, dtype: DTypeLike) -> Float[Array, "b 1 h w c"]:
    """The last of some latents as the first of a video: [B, F, h, w, 16] -> float32
    [B, 1, h, w, 16], of one frame.

    They are decoded as a video that begins with them, one latent in memory at a time; the last
    frame, which the last latent has too, is encoded alone. `dtype` is that of the convolutions.
    """
    config = sizes_of(params)
    first = decode_first(params, latents[:, :1], config, dtype)

    def step(carried, latent):
        _, cache = carried
        frames, cache = decode_next(params, cache, latent[:, None], config, dtype)
        return (frames[:, -1:], cache), None

    (frame, _), _ = lax.scan(step, first, jnp.moveaxis(latents[:, 1:], 1, 0))
    return encode_video(params, frame, config, dtype)
