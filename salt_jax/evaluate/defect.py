"""Semigroup defect: how far two short updates land from the one long update they should compose to.

For an interval (sigma_s, sigma_e) of the inference grid with a midpoint sigma_m, Salt Eq. 14-16:

    x1     = Psi^{s->e}(x_s)                                                           (1)
    x2     = Psi^{m->e}(Psi^{s->m}(x_s))                                               (2)
    defect = E[ |x1 - x2|^2 / (|x1 - x_s|^2 + eps) ]                                   (3)

With x1 - x2 = (sigma_m - sigma_e)(v_m - v_s) and x1 - x_s = -(sigma_s - sigma_e) v_s this is

    defect = ((sigma_m - sigma_e) / (sigma_s - sigma_e))^2 |v_m - v_s|^2 / |v_s|^2     (4)

up to eps: a factor that only the grid decides, times a curvature that only the network decides.
Both are reported. Low is not good by itself: an undistilled teacher has a low defect and blurred
few-step videos.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from salt_jax.choices import Solver
from salt_jax.flow.schedule import grid
from salt_jax.flow.transition import euler
from salt_jax.models.denoiser import Network
from salt_jax.models.memory import CachePolicy
from salt_jax.rollout.causal import rollout, sight_of
from salt_jax.rollout.parallel import advance, noise_at
from salt_jax.types import Denoiser, Latent, Params, TextEmb

EPS = 1e-8  # of Eq. 16; the paper gives no value


class Defect(NamedTuple):
    """Means over the samples; one entry for each of the n intervals, from noise to clean."""

    per_interval: Float[Array, " n"]  # Eq. 16
    mean: Float[Array, ""]  # of the intervals, unweighted
    curvature: Float[Array, " n"]  # |v_m - v_s|^2 / |v_s|^2


def defect_grid(num_steps: int, shift_amount: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels [K + 1] of the inference grid T(K) and the K midpoints, the levels that T(2K)
    adds.
    """
    return grid(num_steps, shift_amount), grid(2 * num_steps, shift_amount)[1::2]


@partial(jax.jit, static_argnames=("denoiser", "solver", "shape"))
def semigroup_defect(
    denoiser: Denoiser,
    params: Params,
    text: TextEmb,
    sigmas: Float[Array | np.ndarray, " k"],
    midpoints: Float[Array | np.ndarray, " n"],
    solver: Solver,
    keys: Key[Array, " b"],
    shape: tuple[int, ...],
) -> Defect:
    """Salt Eq. 16 on the test-time path: x_s is where the denoiser's own rollout arrives.

    `sigmas` falls from 1 to 0; midpoint i lies between levels i and i + 1 (`defect_grid`). `solver`
    is how the rollout moves on, `keys` give each clip its noise, `shape` is (F, H, W, C). The
    states are those that `rollout.parallel.sample` passes through with the same arguments. The
    denoiser runs twice per interval; bring it without guidance. Squared norms go over the whole
    clip, in float32.
    """
    if len(sigmas) != len(midpoints) + 1:
        raise ValueError(
            f"{len(sigmas)} noise levels have {len(sigmas) - 1} intervals, which need as many "
            "midpoints, "
            f"got {len(midpoints)}"
        )
    if solver not in ("euler", "cm"):
        raise ValueError(f"unknown solver {solver!r}, expected 'euler' or 'cm'")

    def interval(x_s, levels):
        sigma_s, sigma_m, sigma_e = levels
        per_example = lambda sigma: jnp.full(len(x_s), sigma, jnp.float32)
        at_s = denoiser(params, x_s, per_example(sigma_s), text)
        x_m = euler(
            x_s, at_s.velocity.astype(jnp.float32), per_example(sigma_s), per_example(sigma_m)
        )
        v_m = denoiser(params, x_m, per_example(sigma_m), text).velocity
        x_e = advance(x_s, at_s, per_example(sigma_s), sigma_e, solver, keys, frames)
        return x_e, defect_and_curvature(at_s.velocity, v_m, *levels)

    sigmas, midpoints = jnp.asarray(sigmas, jnp.float32), jnp.asarray(midpoints, jnp.float32)
    frames = np.arange(shape[0])
    x = noise_at(keys, sigmas[0], frames, shape[1:])
    _, (defects, curvatures) = jax.lax.scan(interval, x, (sigmas[:-1], midpoints, sigmas[1:]))
    return Defect(defects, defects.mean(), curvatures)


@partial(jax.jit, static_argnames=("network", "solver", "shape", "policy"))
def causal_defect(
    network: Network,
    params: Params,
    text: TextEmb,
    sigmas: Float[Array | np.ndarray, " k"],
    midpoints: Float[Array | np.ndarray, " n"],
    solver: Solver,
    keys: Key[Array, " b"],
    shape: tuple[int, ...],
    policy: CachePolicy,
) -> Defect:
    """The same for a student that works chunk by chunk: x_s is its rollout up to each interval, on
    the cache of a video whose chunks all stopped there. Both velocities read that cache. Arguments
    as in `semigroup_defect`.
    """
    sigmas, midpoints = jnp.asarray(sigmas, jnp.float32), jnp.asarray(midpoints, jnp.float32)

    def interval(_, given):
        i, levels = given[0], given[1:]
        trajectory = rollout(network, params, text, sigmas, i, solver, keys, shape, policy)
        sight, everywhere = sight_of(trajectory, policy), jnp.ones_like(trajectory.sigma)
        v_s = network.denoise(params, trajectory.x, trajectory.sigma, text, sight).velocity
        sigma_m = levels[1] * everywhere
        x_m = euler(trajectory.x, v_s, trajectory.sigma, sigma_m)
        v_m = network.denoise(params, x_m, sigma_m, text, sight).velocity
        return None, defect_and_curvature(v_s, v_m, *levels)

    given = (jnp.arange(len(midpoints)), sigmas[:-1], midpoints, sigmas[1:])
    _, (defects, curvatures) = jax.lax.scan(interval, None, given)
    return Defect(defects, defects.mean(), curvatures)


def defect_and_curvature(v_s: Latent, v_m: Latent, sigma_s, sigma_m, sigma_e):
    """Eq. (4) of one interval and its second factor, means over the clips, from the two velocities.

    Form (4): the difference of two endpoints would lose the digits that the two have in common.
    """
    squared_norm = lambda x: jnp.sum(jnp.square(x), axis=(1, 2, 3, 4))
    v_s, v_m = v_s.astype(jnp.float32), v_m.astype(jnp.float32)
    bend, displacement = squared_norm(v_m - v_s), squared_norm((sigma_s - sigma_e) * v_s)
    defect = jnp.square(sigma_m - sigma_e) * bend / (displacement + EPS)
    return defect.mean(), (bend / (squared_norm(v_s) + EPS)).mean()
