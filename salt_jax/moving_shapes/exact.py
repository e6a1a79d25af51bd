"""The optimal denoiser of a finite set of clips, in closed form.

If data are the clips c_1..c_N with equal weight, then at noise level sigma

    p(c_i | x) = softmax_i( -|x - (1 - sigma) c_i|^2 / (2 sigma^2) )
    E[x0 | x]  = sum_i p(c_i | x) c_i

No network can have a lower flow-matching loss. It serves as an exact teacher and as the measure of
a trained one. The clips of other captions are masked out: the caption is read off its text
embedding.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.flow.prediction import from_x0
from salt_jax.types import Conditioning, Latent, Params, Prediction, Sigma, TextEmb


def closed_form_params(clips: np.ndarray, captions: np.ndarray) -> Params:
    """Packs the set for `ClosedForm`.

    Args:
      clips: float32 [K, M, F, H, W, C], M clips for each of K captions.
      captions: float32 [K, T, D], their text embeddings, all different.
    """
    return {"clips": jnp.asarray(clips), "captions": jnp.asarray(captions)}


def log_posterior(params: Params, x: Latent, sigma: Sigma, text: TextEmb) -> jax.Array:
    """log p(clip | x, text), float32 [B, K * M]; -inf for clips of another caption.

    A text that is none of the captions (the null text) leaves all clips in: the unconditional
    posterior.
    """
    clips = params["clips"].reshape(-1, x[0].size)
    sigma = sigma.reshape(-1, 1)
    cross = jnp.einsum("bd,nd->bn", x.reshape(x.shape[0], -1), clips, precision="highest")
    logits = ((1 - sigma) * cross - 0.5 * (1 - sigma) ** 2 * (clips**2).sum(-1)[None]) / sigma**2
    same = (jnp.abs(text[:, None] - params["captions"][None]) < 1e-5).all((2, 3))  # [B, K]
    allowed = same | ~same.any(-1, keepdims=True)
    allowed = jnp.repeat(allowed, params["clips"].shape[1], axis=1)
    return jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)


@dataclass(frozen=True)
class ClosedForm:
    """A `Denoiser` without a network."""

    def denoise(self, params: Params, x: Latent, sigma: Sigma, cond: Conditioning) -> Prediction:
        """One sigma per example, [B], in (0, 1]; `params` are from `closed_form_params`."""
        assert cond.image is None, "this world has no pictures"
        posterior = jnp.exp(log_posterior(params, x, sigma, cond.text))
        clips = params["clips"].reshape(-1, x[0].size)
        x0 = jnp.einsum("bn,nd->bd", posterior, clips, precision="highest")
        return from_x0(x, x0.reshape(x.shape), sigma)


def expected_error(
    params: Params, prediction: Prediction, x: Latent, sigma: Sigma, cond: Conditioning
) -> jax.Array:
    """Mean squared velocity error of a prediction against the optimum, float32 [B]."""
    best = ClosedForm().denoise(params, x, sigma, cond)
    return ((prediction.velocity - best.velocity) ** 2).mean((1, 2, 3, 4))
