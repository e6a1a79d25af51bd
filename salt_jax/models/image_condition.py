"""What conditions an image-to-video denoiser on its first frame, besides the features of
`image_encoder`.

A picture goes two ways. Seen by CLIP: `squash_for_clip` as Wan 2.1's own code does it, or
`crop_for_clip` as diffusers does; the two differ. And as channels behind the noisy latent:
`image_clip`, encoded by the VAE, then `condition_latents`. What works on pictures is numpy, because
each picture has a size of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from salt_jax.models.latent_size import TIME

# of colours in [0, 1], per channel
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def resize_bicubic(
    image: Float[np.ndarray, "*b h w c"], height: int, width: int
) -> Float[np.ndarray, "*b {height} {width} c"]:
    """Bicubic interpolation as torch does it: a = -0.75, pixel centres aligned, edges repeated, no
    antialiasing.

    Nothing is clipped: next to edges in the picture values may leave its range a little.
    """
    return _bicubic(_bicubic(image.astype(np.float32, copy=False), -3, height), -2, width)


def squash_for_clip(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> Float[np.ndarray, "{size} {size} 3"]:
    """Wan 2.1's way to CLIP's pixels: the whole picture, its sides squashed to `size`, without
    antialiasing.
    """
    return (resize_bicubic(image / np.float32(255), size, size) - CLIP_MEAN) / CLIP_STD


def crop_for_clip(
    image: UInt8[np.ndarray, "h w 3"], size: int
) -> Float[np.ndarray, "{size} {size} 3"]:
    """CLIP's and diffusers' way to CLIP's pixels: the shorter side made `size`, with antialiasing,
    then the middle.
    """
    height, width = (size * side // min(image.shape[:2]) for side in image.shape[:2])
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    middle = small[top : top + size, left : left + size]
    return (middle / np.float32(255) - CLIP_MEAN) / CLIP_STD


def image_clip(
    image: UInt8[np.ndarray, "h w 3"], num_frames: int, height: int, width: int
) -> Float[np.ndarray, "{num_frames} {height} {width} 3"]:
    """The clip that the VAE encodes for the condition: the picture, then mid-grey frames,
    in [-1, 1].
    """
    clip = np.zeros((num_frames, height, width, 3), np.float32)
    clip[0] = resize_bicubic(image / np.float32(127.5) - 1, height, width)
    return clip


def known_mask(known: Bool[np.ndarray, "t"]) -> Float[np.ndarray, "f 4"]:
    """Which pixel frames the condition knows, in the VAE's grouping: frame 0 alone, fourfold, then
    four by four.

    Channel j of latent frame f tells of pixel frame 4 f - 3 + j.

    Raises:
        ValueError: if the number of frames is not 4 F - 3.
    """
    latent_frames, rest = divmod(len(known) + TIME - 1, TIME)
    if rest:
        raise ValueError(
            f"a clip of {len(known)} frames does not divide into latent frames: it has 4k + 1, "
            "such as "
            f"{TIME * latent_frames + 1} frames"
        )
    frames = np.arange(TIME * latent_frames).reshape(latent_frames, TIME) - (TIME - 1)
    return known[np.maximum(frames, 0)].astype(np.float32)


def condition_latents(
    latents: Float[Array | np.ndarray, "b f h w c"],
) -> Float[Array | np.ndarray, "b f h w m"]:
    """The channels behind the noisy latent: `known_mask` of a clip whose first frame is known, then
    `latents`.

    `latents` are the normalised latents of `image_clip`, [B, F, H, W, 16]; the result has 20
    channels. In numpy where they are numpy's: a data loader works on the host.
    """
    num_frames = TIME * (latents.shape[1] - 1) + 1
    mask = known_mask(np.arange(num_frames) == 0)[None, :, None, None]
    mask = np.broadcast_to(mask, (*latents.shape[:4], mask.shape[-1])).astype(latents.dtype)
    return (jnp if isinstance(latents, jax.Array) else np).concatenate([mask, latents], axis=-1)


def _bicubic(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    """`length` samples along `axis`, each from the nearest four by Keys' cubic kernel."""
    centre = (np.arange(length) + 0.5) * x.shape[axis] / length - 0.5
    first = np.floor(centre).astype(int) - 1
    total = np.zeros(1, np.float32)
    for sample in (first + tap for tap in range(4)):
        d = np.abs(centre - sample)
        near, far = (1.25 * d - 2.25) * d**2 + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
        weight = np.where(d <= 1, near, far).astype(np.float32).reshape(-1, *[1] * (-axis - 1))
        total = total + weight * np.take(x, np.clip(sample, 0, x.shape[axis] - 1), axis)
    return total
