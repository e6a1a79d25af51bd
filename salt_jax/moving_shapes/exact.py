"""The optimal denoiser of a finite set of clips, in closed form.

If data are the clips c_1..c_N with equal weight, then at noise level sigma

    p(c_i | x) = softmax_i( -|x - (1 - sigma) c_i|^2 / (2 sigma^2) )
    E[x0 | x]  = sum_i p(c_i | x) c_i

No network can have a lower flow-matching loss. It serves as an exact teacher and as the measure of
a trained one. The clips of other captions are masked out: the caption is read off its text
embedding.

In an endless world clips are sums of frames in the exponent, so what is computed and stored goes
with the number of frames there are, not of clips (`moving_shapes.every_clip`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.flow.prediction import from_x0
from salt_jax.types import Conditioning, Latent, Params, Prediction, Sigma, TextEmb


def closed_form_params(clips: Mapping[str, np.ndarray], captions: np.ndarray) -> Params:
    """Packs the set for `ClosedForm`.

    Args:
      clips: of `every_clip.every_clip`: listed, M clips for each of K captions, or as frames and
        paths.
      captions: float32 [K, T, D], their text embeddings, all different.
    """
    return {name: jnp.asarray(part) for name, part in clips.items()} | {
        "captions": jnp.asarray(captions)
    }


def log_posterior(params: Params, x: Latent, sigma: Sigma, text: TextEmb) -> jax.Array:
    """log p(clip | x, text), float32 [B, K * M]; -inf for clips of another caption.

    A text that is none of the captions (the null text) leaves all clips in: the unconditional
    posterior.
    """
    find = _frames_likelihood if "paths" in params else _clips_likelihood
    logits = find(params, x, 1 - sigma.reshape(-1, 1)) / sigma.reshape(-1, 1) ** 2
    same = (jnp.abs(text[:, None] - params["captions"][None]) < 1e-5).all((2, 3))  # [B, K]
    allowed = same | ~same.any(-1, keepdims=True)
    allowed = jnp.repeat(allowed, logits.shape[1] // allowed.shape[1], axis=1)
    return jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)


def _clips_likelihood(params: Params, x: Latent, part: Float[Array, "b 1"]) -> jax.Array:
    """sigma^2 log p(x | clip) but for a constant, [B, K * M]; `part` is 1 - sigma."""
    clips = params["clips"].reshape(-1, x[0].size)
    cross = jnp.einsum("bd,nd->bn", x.reshape(x.shape[0], -1), clips, precision="highest")
    return part * cross - 0.5 * part**2 * (clips**2).sum(-1)[None]


def _frames_likelihood(params: Params, x: Latent, part: Float[Array, "b 1"]) -> jax.Array:
    """The same: a clip's is the sum over its frames."""
    frames = params["frames"].reshape(*params["frames"].shape[:2], -1)
    seen = x.reshape(*x.shape[:2], -1)
    cross = jnp.einsum("bfd,opd->fpbo", seen, frames, precision="highest")
    part, power = part[None, None], (frames**2).sum(-1).T[None, :, None]
    each = part * cross - 0.5 * part**2 * power  # [F, P, B, O]

    def add(total, frame):
        likelihood, path = frame
        return total + likelihood[path], None

    zero = jnp.zeros((*params["paths"].shape[1:], *each.shape[2:]))
    total = jax.lax.scan(add, zero, (each, params["paths"]))[0]  # [D, M, B, O]
    return total.transpose(2, 3, 0, 1).reshape(len(x), -1)


def _clips_mean(params: Params, posterior: jax.Array, x: Latent) -> jax.Array:
    clips = params["clips"].reshape(-1, x[0].size)
    return jnp.einsum("bn,nd->bd", posterior, clips, precision="highest").reshape(x.shape)


def _frames_mean(params: Params, posterior: jax.Array, x: Latent) -> jax.Array:
    frames, (_, ways, modes) = params["frames"], params["paths"].shape
    objects, places = frames.shape[:2]
    posterior = posterior.reshape(len(x), objects, ways, modes).transpose(2, 3, 0, 1)

    def at_places(path):  # how likely each object is at each place in a frame, [P, B, O]
        there = jnp.argsort(path).reshape(ways, places, -1)  # the modes that are at a place
        return jax.vmap(lambda part, there: part[there].sum(1))(posterior, there).sum(0)

    weight = jax.lax.map(at_places, params["paths"])
    frames = frames.reshape(objects, places, -1)
    mean = jnp.einsum("fpbo,opd->bfd", weight, frames, precision="highest")
    return mean.reshape(x.shape)


@dataclass(frozen=True)
class ClosedForm:
    """A `Denoiser` without a network."""

    def denoise(self, params: Params, x: Latent, sigma: Sigma, cond: Conditioning) -> Prediction:
        """One sigma per example, [B], in (0, 1]; `params` are from `closed_form_params`."""
        assert cond.image is None, "this world has no pictures"
        posterior = jnp.exp(log_posterior(params, x, sigma, cond.text))
        mean = _frames_mean if "paths" in params else _clips_mean
        return from_x0(x, mean(params, posterior, x), sigma)


def expected_error(
    params: Params, prediction: Prediction, x: Latent, sigma: Sigma, cond: Conditioning
) -> jax.Array:
    """Mean squared velocity error of a prediction against the optimum, float32 [B]."""
    best = ClosedForm().denoise(params, x, sigma, cond)
    return ((prediction.velocity - best.velocity) ** 2).mean((1, 2, 3, 4))
