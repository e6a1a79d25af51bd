"""Networks as denoisers: the only place that turns sigma into Wan's timestep."""

import jax.numpy as jnp
import numpy as np

from salt_jax.flow.prediction import from_velocity, guide
from salt_jax.models.wan import Compute, WanConfig, apply_wan
from salt_jax.types import Denoiser, Latent, Params, Prediction, Sigma, TextEmb

WAVES = (4, 2, 2)  # cosines along frames, rows and columns
PRODUCTS = 2  # of the frames' cosines, multiplied with each of a place
POSITION_CHANNELS = sum(WAVES) + PRODUCTS * (WAVES[1] + WAVES[2])


def position_channels(frames: int, height: int, width: int) -> np.ndarray:
    """Where an element is in its clip: the lowest cosines, float32 [F, H, W, POSITION_CHANNELS].

    Rotary positions tell a token how far another one is, not where it is itself. Large models find that out from
    content; over noise alone, a small one does not. So small presets read these channels behind the latent's own, as
    Wan's image-to-video models read their conditioning. A motion is a product of place and time: without the products
    training did not tell left from right (docs/decisions.md, 13b).
    """
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in (frames, height, width)), indexing="ij")
    time, *place = (
        [np.cos(np.pi * k * axis) for k in range(1, n + 1)] for axis, n in zip(grid, WAVES, strict=True)
    )
    place = [wave for axis in place for wave in axis]
    return np.stack([*time, *place, *(t * p for t in time[:PRODUCTS] for p in place)], -1).astype(np.float32)


def wan_denoiser(config: WanConfig, compute: Compute) -> Denoiser:
    """Wan as a `Denoiser`. Its input and output are float32 whatever `compute.dtype` is.

    A network that reads more channels than it writes gets `position_channels` behind the latent.

    Raises:
      ValueError: the number of additional input channels is not that of `position_channels`.
    """
    more = config.in_channels - config.out_channels
    if more not in (0, POSITION_CHANNELS):
        raise ValueError(f"{more} additional input channels; position channels are {POSITION_CHANNELS}")

    def denoise(params: Params, x: Latent, sigma: Sigma, text: TextEmb) -> Prediction:
        inputs = x
        if more:
            position = jnp.asarray(position_channels(*x.shape[1:4]))
            inputs = jnp.concatenate([x, jnp.broadcast_to(position, (*x.shape[:4], more))], axis=-1)
        return from_velocity(x, apply_wan(params, inputs, 1000.0 * sigma, text, config, compute), sigma)

    return denoise


def guided(denoiser: Denoiser, null_text: TextEmb, guidance: float) -> Denoiser:
    """The same denoiser under classifier-free guidance; `null_text` is [1, T, D], guidance 1 is none.

    Two evaluations a call, as the peers do: their memory then peaks at one batch, not at two.
    """

    def denoise(params: Params, x: Latent, sigma: Sigma, text: TextEmb) -> Prediction:
        if guidance == 1.0:
            return denoiser(params, x, sigma, text)
        null = null_text.repeat(x.shape[0], axis=0)
        return guide(denoiser(params, x, sigma, text), denoiser(params, x, sigma, null), guidance)

    return denoise
