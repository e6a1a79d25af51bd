"""Where an element is in its clip, as channels behind the latent: for the small presets."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.models.visibility import Positions

WAVES = (4, 2, 2)  # cosines along frames, rows and columns
PRODUCTS = 2  # of the frames' cosines, multiplied with each of a place
POSITION_CHANNELS = sum(WAVES) + PRODUCTS * (WAVES[1] + WAVES[2])


def position_channels(frames: int, height: int, width: int) -> np.ndarray:
    """The lowest cosines, float32 [F, H, W, POSITION_CHANNELS].

    Rotary positions tell a token how far another one is, not where it is itself. Large models find
    that out from content; over noise alone, a small one does not. So small presets read these
    channels behind the latent's own, as Wan's image-to-video models read their conditioning. A
    motion is a product of place and time: without the products training did not tell left from
    right (docs/decisions.md, 13b).
    """
    sizes = (frames, height, width)
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in sizes), indexing="ij")
    time, *place = (
        [np.cos(np.pi * k * axis) for k in range(1, n + 1)]
        for axis, n in zip(grid, WAVES, strict=True)
    )
    place = [wave for axis in place for wave in axis]
    products = [t * p for t in time[:PRODUCTS] for p in place]
    return np.stack([*time, *place, *products], -1).astype(np.float32)


@dataclass(frozen=True)
class PositionChannels:
    """The channels of the frames of a video. Frames past the clip that a network was made for get
    the positions of its last chunk.
    """

    frames: int  # of that clip
    chunk: int

    def of(self, numbers: Positions, height: int, width: int) -> Float[Array, "f h w m"]:
        """Of the frames with these numbers."""
        past = self.frames - self.chunk + (numbers - self.frames) % self.chunk
        table = jnp.asarray(position_channels(self.frames, height, width))
        return table[jnp.where(numbers < self.frames, numbers, past)]
