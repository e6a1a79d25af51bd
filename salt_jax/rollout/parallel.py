"""The whole clip at once: the student's step in training, and sampling with any number of steps."""

import operator
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from salt_jax.choices import Solver
from salt_jax.flow.multistep import SolverStep
from salt_jax.flow.transition import euler, renoise
from salt_jax.types import Conditioning, Denoiser, Latent, Params, Prediction, Sigma


def noise_at(
    keys: Key[Array, "b"],
    sigma: Float[Array, ""],
    frames: Int[Array | np.ndarray, "f"],
    shape: tuple[int, ...],
) -> Latent:
    """The noise of some frames of each clip at one noise level, [B, F, *shape].

    A function of the clip's key, the level and the frame's number alone: the same whatever the
    batch and the chunks it is made in, and shared by all schedules that visit the level, so that 2,
    4 and 8 steps can be compared noise for noise. Needs JAX's default PRNG, threefry: other
    implementations draw differently under vmap.
    """
    level = jax.lax.bitcast_convert_type(jnp.asarray(sigma, jnp.float32), jnp.uint32)

    def draw(key, frame):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, level), frame), shape)

    over_frames = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_frames, in_axes=(0, None))(keys, jnp.asarray(frames))


def advance(
    x: Latent,
    prediction: Prediction,
    sigma: Sigma,
    sigma_next: Float[Array, ""],
    solver: Solver,
    keys: Key[Array, "b"],
    frames: Int[Array | np.ndarray, "f"],
) -> Latent:
    """The state at `sigma_next`, one level for all clips, given what the network says at
    `sigma`, [B].

    `frames` are the numbers of the frames of `x` in the video.
    """
    after = jnp.full(x.shape[0], sigma_next)
    if solver == "euler":
        return euler(x, prediction.velocity, sigma, after)
    return renoise(prediction.x0, noise_at(keys, sigma_next, frames, x.shape[2:]), after)


def sample(
    denoiser: Denoiser,
    params: Params,
    cond: Conditioning,
    sigmas: Float[Array | np.ndarray, "k"],
    solver: Solver,
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
) -> Latent:
    """Makes clean latents from noise with one network evaluation per step.

    Args:
      denoiser, params: student, or a (guided) teacher.
      cond: one per clip.
      sigmas: K + 1 levels, falling from 1 to 0 (`flow.schedule.grid(K, shift)`). K is static.
      solver: static.
      keys: one per clip; all its noise comes from it.
      shape: (F, H, W, C), static.
    """

    def update(x, levels):
        sigma, sigma_next = jnp.full(x.shape[0], levels[0]), levels[1]
        return advance(
            x, denoiser.denoise(params, x, sigma, cond), sigma, sigma_next, solver, keys, frames
        ), None

    sigmas, frames = jnp.asarray(sigmas), np.arange(shape[0])
    x = noise_at(keys, sigmas[0], frames, shape[1:])
    return jax.lax.scan(update, x, (sigmas[:-1], sigmas[1:]))[0]


class History(NamedTuple):
    """The state of a multistep solver between steps."""

    x: Latent  # the next input of the network; after the last step the clean latent
    state: Latent  # the corrected state of the last step
    before: Latent  # clean estimates of the last step but one, and of the last
    last: Latent


def multistep_start(noise: Latent) -> History:
    """`noise` is standard normal; `noise_at` level 1 is what `sample` starts from."""
    return History(noise, noise, jnp.zeros_like(noise), jnp.zeros_like(noise))


def multistep_step(
    denoiser: Denoiser, params: Params, cond: Conditioning, history: History, step: SolverStep
) -> History:
    """One row of a solver's table (`flow.multistep`), with one call of the denoiser.

    The clean estimate is formed with the true level of the state, whatever level the network is
    given.
    """
    x, state, before, last = history
    seen = jnp.full(x.shape[0], step.seen)
    now = x - step.sigma * denoiser.denoise(params, x, seen, cond).velocity
    state = _mix(step.correct, state, before, last, now)
    return History(_mix(step.predict, state, last, now), state, last, now)


def _mix(weights: Float[Array | np.ndarray, "n"], *latents: Latent) -> Latent:
    return reduce(operator.add, (w * z for w, z in zip(weights, latents, strict=True)))


def midpoint(x_s: Latent, v_s: Latent, sigma_s: Sigma, sigma_m: Sigma, stop: bool) -> Latent:
    """x_m = Psi^{s->m}(x_s), where the composed path of Salt Eq. 7 evaluates its second velocity.

    `stop` cuts the gradient through the state (stop-gradient "midpoint" of the self-consistency
    loss).
    """
    x_m = euler(x_s, v_s, sigma_s, sigma_m)
    return jax.lax.stop_gradient(x_m) if stop else x_m
