"""Networks as denoisers: the only place that turns sigma into Wan's timestep."""

from salt_jax.flow.prediction import from_velocity, guide
from salt_jax.models.wan import Compute, WanConfig, apply_wan
from salt_jax.types import Denoiser, Latent, Params, Prediction, Sigma, TextEmb


def wan_denoiser(config: WanConfig, compute: Compute) -> Denoiser:
    """Wan as a `Denoiser`. Its input and output are float32 whatever `compute.dtype` is."""

    def denoise(params: Params, x: Latent, sigma: Sigma, text: TextEmb) -> Prediction:
        return from_velocity(x, apply_wan(params, x, 1000.0 * sigma, text, config, compute), sigma)

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
