"""Latents to pixels, as they come."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from salt_jax.models.tiny_decoder import Memory, decode_tiny
from salt_jax.models.vae import VAEConfig, decode_first, decode_next, decode_tiled
from salt_jax.types import Latent, Params

decode_first_frame = jax.jit(decode_first, static_argnums=(2, 3))
decode_more = jax.jit(decode_next, static_argnums=(3, 4), donate_argnums=1)
_decode_tiled = jax.jit(decode_tiled, static_argnums=(2, 3, 4, 5))
_decode_tiny = jax.jit(decode_tiny, static_argnums=3, donate_argnums=1)


def decode_chunk(
    params: Params, config: VAEConfig, dtype: DTypeLike, memory: Params | None, chunk: Latent
) -> tuple[tuple[jax.Array, ...], Params]:
    """The frames of the next latents of a video, float32 [B, t, H, W, 3] each in [-1, 1] and not
    waited for, and what the decoder remembers of them. It gives up `memory`, which is None before a
    video's first latents.
    """
    frames = ()
    if memory is None:
        first, memory = decode_first_frame(params, chunk[:, :1], config, dtype)
        chunk, frames = chunk[:, 1:], (first,)
    if chunk.shape[1]:
        more, memory = decode_more(params, memory, chunk, config, dtype)
        frames = (*frames, more)
    return frames, memory


def decode_chunk_tiny(
    params: Params, memory: Memory | None, chunk: Latent
) -> tuple[tuple[jax.Array, ...], Memory]:
    """As `decode_chunk`, with the tiny decoder in float32."""
    frames, seen = _decode_tiny(params, memory, chunk, jnp.float32)
    return (frames,), seen


def stream_pixels(
    params: Params, config: VAEConfig, chunks: Iterable[np.ndarray], dtype: DTypeLike
) -> Iterator[np.ndarray]:
    """Latent chunks of a video, [B, f, h, w, 16] each -> its frames, uint8 [B, t, H, W, 3], chunk
    by chunk.
    """
    memory = None
    for chunk in chunks:
        frames, memory = decode_chunk(params, config, dtype, memory, jnp.asarray(chunk))
        yield to_bytes(np.concatenate(frames, axis=1))


def decode_whole(
    params: Params, config: VAEConfig, dtype: DTypeLike, tile: int, latents: Latent
) -> jax.Array:
    """All frames of a video at once, in tiles of `tile` latent rows and columns a quarter of which
    overlaps: less memory, and seams may be seen.
    """
    return _decode_tiled(params, latents, config, dtype, tile, tile // 4)


def to_bytes(pixels: jax.Array | np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8, cut off and not rounded, as Wan 2.1 writes its videos."""
    return (np.clip((np.asarray(pixels) + 1) / 2, 0, 1) * 255).astype(np.uint8)
