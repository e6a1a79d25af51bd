"""A tiny decoder of Wan 2.1's latents, for videos that are watched while they are made: TAEHV
(github.com/madebyollin/taehv), the network of its file taew2_1. The VAE is the exact one.

It reads latents as the transformer leaves them, normalised, one after the other. Three levels
double rows and columns, the last two of them also frames. A block sees each frame beside the one
before it, as it came to that block; nothing else looks back, so what the blocks saw last is all
that a stream has to remember. Every latent gives four frames, of which those of a video's first
latent but the last are dropped: F latents are 4F - 3 frames, as of the VAE.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from salt_jax.models.latent_size import TIME
from salt_jax.models.vae import Video
from salt_jax.types import Latent, Params

Frames = Float[Array, "b _ _ _ _"]
"""Some frames inside the network, [B, T, H, W, C]."""

Memory = dict[str, tuple[Float[Array, "b _ _ _"], ...]]
"""By level: the last frame that came to each of its blocks, [B, H, W, C]."""

WIDTHS = (256, 128, 64, 64)  # channels of each level, and of what the last one leaves
GROWTH = (1, 2, 2)  # frames that a level makes of one
BLOCKS = 3  # of a level
BOUND = 3.0  # latents are squeezed to magnitudes below it


def decoder_shapes(widths: tuple[int, ...], channels: int) -> Params:
    """The parameters as jax.ShapeDtypeStruct, float32; kernels are [kh, kw, I, O].

    Args:
      widths: of the levels and behind them, four; `WIDTHS` in TAEHV's file.
      channels: of a latent.
    """

    def conv(size: int, i: int, o: int, bias: bool = True) -> Params:
        shapes = {"kernel": (size, size, i, o)} | ({"bias": (o,)} if bias else {})
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def block(c: int) -> Params:
        return {"conv1": conv(3, 2 * c, c), "conv2": conv(3, c, c), "conv3": conv(3, c, c)}

    levels = {
        str(i): {
            "blocks": {str(j): block(c) for j in range(BLOCKS)},
            "grow": conv(1, c, GROWTH[i] * c, bias=False),
            "conv": conv(3, c, widths[i + 1], bias=False),
        }
        for i, c in enumerate(widths[:-1])
    }
    ends = {"conv_in": conv(3, channels, widths[0]), "conv_out": conv(3, widths[-1], 3)}
    return {"up": levels, **ends}


def decode_tiny(
    params: Params, memory: Memory | None, latents: Latent, dtype: DTypeLike
) -> tuple[Video, Memory]:
    """The next latents of a video, normalised, [B, f, h, w, 16] -> their frames, float32
    [B, t, 8h, 8w, 3] in [-1, 1], and what the blocks saw last. t is 4f, for a video's first
    latents 4f - 3.

    However the latents of a video are split into calls, the frames are the same. One latent is in
    work at a time, whatever f.

    Args:
      params: of the form of `decoder_shapes`.
      memory: of the call before; None: these are a video's first latents.
      dtype: of the convolutions and of the memory.
    """
    begins = memory is None
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    before = _nothing_seen(params, latents, dtype) if memory is None else memory
    after, frames = lax.scan(
        partial(_decode_one, params), before, jnp.moveaxis(latents, 1, 0).astype(dtype)
    )  # [f, B, 4, 8h, 8w, 3]
    frames = jnp.moveaxis(frames, 0, 1)
    video = frames.reshape(frames.shape[0], -1, *frames.shape[3:])
    return video[:, (TIME - 1) * begins :], after


def _nothing_seen(params, latents, dtype) -> Memory:
    """The memory before a video: zeros."""
    b, _, h, w, _ = latents.shape

    def level(i, blocks):
        widths = (block["conv1"]["kernel"].shape[-1] for block in blocks.values())
        return tuple(jnp.zeros((b, h << i, w << i, width), dtype) for width in widths)

    return {name: level(i, up["blocks"]) for i, (name, up) in enumerate(params["up"].items())}


def _decode_one(params, memory, latent):
    """(memory, one latent frame [B, h, w, 16]) -> (memory, its four frames)."""
    x = jnp.tanh(latent[:, None] / BOUND) * BOUND
    x, seen = jax.nn.relu(_conv(params["conv_in"], x)), {}
    for name, up in params["up"].items():
        last = []
        for block, past in zip(up["blocks"].values(), memory[name], strict=True):
            last.append(x[:, -1])
            x = _block(block, x, past)
        seen[name] = tuple(last)
        # Grown before it is enlarged: the kernel is 1 x 1, so the numbers are the same, and their
        # count is a quarter.
        x = _enlarged(_grown(up["grow"], x))
        x = _conv(up["conv"], x)
    x = _conv(params["conv_out"], jax.nn.relu(x)).astype(jnp.float32)
    return seen, jnp.clip(2 * x - 1, -1, 1)  # the network's white is 1, its black 0


def _block(params, x, past):
    """Three convolutions of each frame beside the one before it, added to it."""
    before = jnp.concatenate([past[:, None], x[:, :-1]], axis=1)
    h = jax.nn.relu(_conv(params["conv1"], jnp.concatenate([x, before], axis=-1)))
    h = jax.nn.relu(_conv(params["conv2"], h))
    return jax.nn.relu(_conv(params["conv3"], h) + x)


def _grown(params, x: Frames) -> Frames:
    """Several frames of each: one after the other in the channels of a convolution."""
    b, t, h, w, c = x.shape
    apart = _conv(params, x).reshape(b, t, h, w, -1, c)
    return jnp.moveaxis(apart, 4, 2).reshape(b, -1, h, w, c)


def _enlarged(x: Frames) -> Frames:
    """Every row and column twice."""
    return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)


def _conv(params, x: Frames) -> Frames:
    """Of each frame alone, with zeros around it."""
    b, t, *picture = x.shape
    y = lax.conv_general_dilated(
        x.reshape(b * t, *picture),
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(b, t, *y.shape[1:])
    return y + params["bias"][None, None, None, None] if "bias" in params else y
