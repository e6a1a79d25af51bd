"""The whole clip at once: the student's update in training, and sampling with any number of updates."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from salt_jax.flow.transition import euler, renoise
from salt_jax.types import Denoiser, Latent, Params, PRNGKey, Sigma, TextEmb

Solver = Literal["euler", "cm"]
"""How to go from one noise level to the next: Euler keeps the path, CM re-noises the clean estimate afresh."""


def sample(
    denoiser: Denoiser,
    params: Params,
    noise: Latent,
    text: TextEmb,
    sigmas: Float[Array, "k"],
    solver: Solver,
    key: PRNGKey,
) -> Latent:
    """Makes clean latents from noise with one network evaluation per update.

    Args:
      denoiser, params: student, or a (guided) teacher.
      noise: standard Gaussian, the state at sigmas[0] = 1.
      sigmas: K + 1 levels, falling to 0 (`flow.schedule.grid(K, shift)`). K is static.
      solver: static.
      key: for the fresh noises of the CM solver; Euler does not use it.
    """
    batch = noise.shape[0]

    def update(x, inputs):
        sigma, sigma_next, key = inputs
        now, after = jnp.full(batch, sigma), jnp.full(batch, sigma_next)
        prediction = denoiser(params, x, now, text)
        if solver == "euler":
            return euler(x, prediction.velocity, now, after), None
        return renoise(prediction.x0, jax.random.normal(key, x.shape), after), None

    keys = jax.random.split(key, sigmas.shape[0] - 1)
    return jax.lax.scan(update, noise, (sigmas[:-1], sigmas[1:], keys))[0]


def midpoint(x_s: Latent, v_s: Latent, sigma_s: Sigma, sigma_m: Sigma, stop: bool) -> Latent:
    """x_m = Psi^{s->m}(x_s), where the composed path of Salt Eq. 7 evaluates its second velocity.

    `stop` cuts the gradient through the state (stop-gradient "midpoint" of the self-consistency loss).
    """
    x_m = euler(x_s, v_s, sigma_s, sigma_m)
    return jax.lax.stop_gradient(x_m) if stop else x_m
