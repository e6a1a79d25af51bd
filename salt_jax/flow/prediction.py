"""Conversions between the ways to say the same thing about a noisy latent.

With the rectified flow of Salt Eq. 1 and velocity = noise - x0:

    x        = (1 - sigma) x0 + sigma noise                                            (1)
    velocity = (x - x0) / sigma        <=>   x0 = x - sigma velocity                   (2)
    score    = -noise_hat / sigma = -(x - (1 - sigma) x0) / sigma^2                    (3)

Differences of scores are differences of x0:
score_a - score_b = (1 - sigma) / sigma^2 (x0_a - x0_b), which is why `losses.dmd` needs no score.
"""

import chex
from jaxtyping import Array, Float

from salt_jax.types import Latent, Prediction, Sigma


def expand(sigma: Sigma, like: Latent) -> Float[Array, "b _ 1 1 1"]:
    """[B] or [B, F] -> [B, 1 or F, 1, 1, 1], to multiply latents with.

    Raises AssertionError where `like` has other clips or frames: noise levels broadcast over these
    axes only.
    """
    chex.assert_rank(sigma, {1, 2})
    chex.assert_shape(sigma, like.shape[: sigma.ndim])
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(x0: Latent, noise: Latent, sigma: Sigma) -> Latent:
    """The forward process, Eq. (1) above."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def from_velocity(x: Latent, velocity: Latent, sigma: Sigma) -> Prediction:
    """Completes a velocity to a `Prediction`."""
    return Prediction(velocity, x - expand(sigma, x) * velocity)


def from_x0(x: Latent, x0: Latent, sigma: Sigma) -> Prediction:
    """Completes a clean estimate to a `Prediction`. Sigma must be positive."""
    return Prediction((x - x0) / expand(sigma, x), x0)


def score(x: Latent, x0: Latent, sigma: Sigma) -> Latent:
    """Score of the noisy density, Eq. (3) above. Sigma must be positive."""
    sigma = expand(sigma, x)
    return -(x - (1 - sigma) * x0) / sigma**2


def guide(conditional: Prediction, unconditional: Prediction, guidance: float) -> Prediction:
    """Classifier-free guidance, u + w (c - u). w = 1 is none.

    Self-Forcing writes c + g (c - u): its `guidance_scale: 3.0` is w = 4.0 here.
    """
    pairs = zip(conditional, unconditional, strict=True)
    return Prediction(*(u + guidance * (c - u) for c, u in pairs))
