"""The fixed autoencoder of Moving Shapes, which stands where Wan's VAE stands.

Every square of `world.patch` pixels becomes its lowest cosines, as in JPEG: those whose orders down
and across add up to 2 or less, so 6 of a square of 4 x 4, for each of red, green and blue. They are
orthogonal, hence decoding is the transpose, and the distance of two latents goes with that of their
pixels but for what is left out. A basis fitted to the clips (PCA) leaves out about as much; this
one is the same on every machine. Squares of one pixel are their own latent.
"""

import functools

import numpy as np

from salt_jax.moving_shapes.shapes import World

HIGHEST = 2  # sum of the orders of a cosine
SCALE = 6.0  # of a mean colour; it varies by about 1 then, as latents of a VAE do


@functools.cache
def _cosines(patch: int) -> np.ndarray:
    """float32 [cosines, patch, patch]; the first is 1 everywhere, all have its norm."""
    waves = np.cos(np.pi * np.outer(np.arange(patch), np.arange(patch) + 0.5) / patch)
    waves[1:] *= np.sqrt(2)
    orders = [(i, j) for i in range(patch) for j in range(patch) if i + j <= HIGHEST]
    return np.stack([np.outer(waves[i], waves[j]) for i, j in orders]).astype(np.float32)


def clip_shape(world: World) -> tuple[int, int, int, int]:
    """(F, H, W, C) of a clip's latent."""
    side = world.size // world.patch
    return world.frames, side, side, 3 * len(_cosines(world.patch))


def to_latent(video: np.ndarray, world: World) -> np.ndarray:
    """uint8 pixels [..., H, W, 3] -> float32 [..., H / patch, W / patch, C]; black is 0, white has
    `SCALE` in its first three channels. A latent of single pixels is in [-1, 1].
    """
    p, side = world.patch, world.size // world.patch
    if p == 1:
        return video.astype(np.float32) / 127.5 - 1
    squares = (video / np.float32(255)).reshape(*video.shape[:-3], side, p, side, p, 3)
    basis = SCALE / p**2 * _cosines(p)
    found = np.einsum("...ypxqc,kpq->...yxkc", squares, basis, optimize=True)
    return found.reshape(*found.shape[:-2], -1)


def to_pixels(latent: np.ndarray, world: World) -> np.ndarray:
    """Latent -> uint8, clipped to the range."""
    pixels = np.asarray(latent, np.float32)
    if world.patch > 1:
        found, basis = pixels.reshape(*pixels.shape[:-1], -1, 3), _cosines(world.patch)
        squares = np.einsum("...yxkc,kpq->...ypxqc", found, 2 / SCALE * basis, optimize=True)
        pixels = squares.reshape(*pixels.shape[:-3], world.size, world.size, 3) - 1
    return np.round((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
