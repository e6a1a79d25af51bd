"""Semigroup defect: how far two short steps land from the one long step they should compose to.

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
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.causal import Origin, Steps, plan_replay, rollout
from salt_jax.rollout.parallel import advance, noise_at
from salt_jax.types import Conditioning, Denoiser, Latent, Params, PerExample

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


class Path(NamedTuple):
    """The test-time path on which the defect is measured."""

    sigmas: Float[Array | np.ndarray, " k"]  # falling from 1 to 0
    midpoints: Float[Array | np.ndarray, " n"]  # the i-th lies between levels i and i + 1
    keys: Key[Array, " b"]  # give each clip its noise


@partial(jax.jit, static_argnames=("denoiser", "solver", "shape"))
def semigroup_defect(
    denoiser: Denoiser,
    params: Params,
    cond: Conditioning,
    path: Path,
    solver: Solver,
    shape: tuple[int, ...],
) -> Defect:
    """Salt Eq. 16 on the test-time path: x_s is where the denoiser's own rollout arrives.

    `solver` is how the rollout moves on, `shape` is (F, H, W, C). The states are those that
    `rollout.parallel.sample` passes through with the same arguments. The denoiser runs twice per
    interval; bring it without guidance. Squared norms go over the whole clip, in float32.
    """
    sigmas, midpoints, keys = path
    if len(sigmas) != len(midpoints) + 1:
        raise ValueError(
            f"{len(sigmas)} noise levels have {len(sigmas) - 1} intervals, which need as many "
            f"midpoints, got {len(midpoints)}"
        )
    if solver not in ("euler", "cm"):
        raise ValueError(f"unknown solver {solver!r}, expected 'euler' or 'cm'")

    def interval(x_s, levels):
        sigma_s, sigma_m, sigma_e = levels
        per_example = partial(jnp.full, len(x_s), dtype=jnp.float32)
        at_s = denoiser.denoise(params, x_s, per_example(sigma_s), cond)
        v_s = at_s.velocity.astype(jnp.float32)
        x_m = euler(x_s, v_s, per_example(sigma_s), per_example(sigma_m))
        v_m = denoiser.denoise(params, x_m, per_example(sigma_m), cond).velocity
        x_e = advance(x_s, at_s, per_example(sigma_s), sigma_e, solver, keys, frames)
        return x_e, defect_and_curvature(at_s.velocity, v_m, *levels)

    sigmas, midpoints = jnp.asarray(sigmas, jnp.float32), jnp.asarray(midpoints, jnp.float32)
    frames = np.arange(shape[0])
    x = noise_at(keys, sigmas[0], frames, shape[1:])
    _, (defects, curvatures) = jax.lax.scan(interval, x, (sigmas[:-1], midpoints, sigmas[1:]))
    return Defect(defects, defects.mean(), curvatures)


@partial(jax.jit, static_argnames=("network", "solver", "shape", "policy"))
def causal_defect(
    network: WanDenoiser,
    params: Params,
    cond: Conditioning,
    path: Path,
    solver: Solver,
    shape: tuple[int, ...],
    policy: CachePolicy,
) -> Defect:
    """The same for a student that works chunk by chunk: x_s is its rollout up to each interval, on
    the cache of a video whose chunks all stopped there. Both velocities read that cache. Arguments
    as in `semigroup_defect`.
    """
    sigmas = jnp.asarray(path.sigmas, jnp.float32)
    midpoints = jnp.asarray(path.midpoints, jnp.float32)

    def interval(_, given):
        i, levels = given[0], given[1:]
        steps = Steps(sigmas, i, solver)
        made = rollout(network, params, Origin(cond), steps, path.keys, shape, policy)
        plan = plan_replay(made, policy)
        v_s = network.denoise(params, made.x, made.sigma, cond, plan).velocity
        sigma_m = levels[1] * jnp.ones_like(made.sigma)
        x_m = euler(made.x, v_s, made.sigma, sigma_m)
        v_m = network.denoise(params, x_m, sigma_m, cond, plan).velocity
        return None, defect_and_curvature(v_s, v_m, *levels)

    given = (jnp.arange(len(midpoints)), sigmas[:-1], midpoints, sigmas[1:])
    _, (defects, curvatures) = jax.lax.scan(interval, None, given)
    return Defect(defects, defects.mean(), curvatures)


def defect_and_curvature(v_s: Latent, v_m: Latent, sigma_s, sigma_m, sigma_e):
    """Eq. (4) of one interval and its second factor, means over the clips, from the two velocities.

    Form (4): the difference of two endpoints would lose the digits that the two have in common.
    """

    def squared_norm(x: Latent) -> PerExample:
        return jnp.sum(jnp.square(x), axis=(1, 2, 3, 4))

    v_s, v_m = v_s.astype(jnp.float32), v_m.astype(jnp.float32)
    bend, displacement = squared_norm(v_m - v_s), squared_norm((sigma_s - sigma_e) * v_s)
    defect = jnp.square(sigma_m - sigma_e) * bend / (displacement + EPS)
    return defect.mean(), (bend / (squared_norm(v_s) + EPS)).mean()
