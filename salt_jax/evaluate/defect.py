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

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from salt_jax.choices import Solver
from salt_jax.flow.schedule import grid
from salt_jax.flow.transition import euler
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import CausalDenoiser
from salt_jax.models.kv_cache import plan_next_chunk
from salt_jax.rollout.causal import ChunkSpec, Steps, extend
from salt_jax.rollout.parallel import advance, noise_at
from salt_jax.rollout.sampler import read_prompt, start_session
from salt_jax.rollout.settings import Sampler
from salt_jax.types import Conditioning, Denoiser, Latent, Params, Prediction, Sigma

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


class Norms(NamedTuple):
    """Squared norms over the elements of each clip, or of a chunk of it, by interval."""

    bend: Float[Array, "n b"]  # |v_m - v_s|^2
    velocity: Float[Array, "n b"]  # |v_s|^2


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

    Raises:
      ValueError: the levels do not have as many intervals as midpoints, or there is no such solver.
    """
    _refuse(path, solver)

    def denoise(x, sigma):
        return denoiser.denoise(params, x, sigma, cond)

    _, norms = _walk(denoise, path, solver, np.arange(shape[0]), shape[1:])
    return _defect(norms, path)


def causal_defect(
    network: CausalDenoiser,
    params: Params,
    cond: Conditioning,
    path: Path,
    solver: Solver,
    shape: tuple[int, ...],
    policy: CachePolicy,
) -> Defect:
    """The same for a student that works chunk by chunk, on the path of `rollout.sampler.generate`:
    each chunk goes through all levels, and the next one sees of it what `extend` leaves in the
    cache.

    Squared norms go over all chunks of a clip. Arguments as in `semigroup_defect`.
    """
    _refuse(path, solver)
    sampler = Sampler(len(path.midpoints), 1.0, solver, policy)
    cache, found = start_session(sampler, network, path.keys, shape).cache, []
    cond = jax.tree.map(jnp.asarray, cond)
    read = read_prompt(network, params, cond)
    for size in policy.sizes(shape[0]):
        cache, norms = _measured_chunk(
            network, params, cache, read, path, solver, ChunkSpec(size, policy)
        )
        found.append(norms)
    return _defect(jax.tree.map(lambda *parts: jnp.stack(parts).sum(axis=0), *found), path)


@partial(jax.jit, static_argnames=("network", "solver", "spec"), donate_argnames="cache")
def _measured_chunk(network, params, cache, cond, path, solver, spec):
    """The cache with the next chunk in it, finished, and the norms on the way there."""
    plan = plan_next_chunk(cache, spec.policy, spec.size)

    def denoise(x, sigma):
        return network.denoise(params, x, sigma, cond, plan)

    _, norms = _walk(denoise, path, solver, plan.frames, cache.x0.shape[2:])
    steps = Steps(jnp.asarray(path.sigmas), len(path.midpoints) - 1, solver)
    *_, cache = extend(network, params, cache, cond, steps, (path.keys, 0), spec)
    return cache, norms


def _walk(
    denoise: Callable[[Latent, Sigma], Prediction],
    path: Path,
    solver: Solver,
    frames: Int[Array | np.ndarray, "f"],
    picture: tuple[int, ...],
) -> tuple[Latent, Norms]:
    """From noise to clean along the path: where it ends, and the two velocities of each interval.

    Args:
      frames: numbers of the frames in their video.
      picture: (H, W, C).
    """
    sigmas, midpoints = (jnp.asarray(levels, jnp.float32) for levels in path[:2])

    def squared_norm(x):
        return jnp.sum(jnp.square(x), axis=(1, 2, 3, 4))

    def interval(x_s, levels):
        sigma_s, sigma_m, sigma_e = levels
        per_example = partial(jnp.full, len(x_s), dtype=jnp.float32)
        at_s = denoise(x_s, per_example(sigma_s))
        v_s = at_s.velocity.astype(jnp.float32)
        x_m = euler(x_s, v_s, per_example(sigma_s), per_example(sigma_m))
        v_m = denoise(x_m, per_example(sigma_m)).velocity.astype(jnp.float32)
        x_e = advance(x_s, at_s, per_example(sigma_s), sigma_e, solver, path.keys, frames)
        return x_e, Norms(squared_norm(v_m - v_s), squared_norm(v_s))

    start = noise_at(path.keys, sigmas[0], frames, picture)
    return jax.lax.scan(interval, start, (sigmas[:-1], midpoints, sigmas[1:]))


def _defect(norms: Norms, path: Path) -> Defect:
    """Eq. (4) and its second factor, means over the clips.

    Form (4): the difference of two endpoints would lose the digits that the two have in common.
    """
    sigmas, midpoints = (jnp.asarray(levels, jnp.float32)[:, None] for levels in path[:2])
    displacement = jnp.square(sigmas[:-1] - sigmas[1:]) * norms.velocity
    defects = jnp.square(midpoints - sigmas[1:]) * norms.bend / (displacement + EPS)
    per_interval = defects.mean(axis=1)
    curvature = (norms.bend / (norms.velocity + EPS)).mean(axis=1)
    return Defect(per_interval, per_interval.mean(), curvature)


def _refuse(path: Path, solver: Solver) -> None:
    if len(path.sigmas) != len(path.midpoints) + 1:
        raise ValueError(
            f"{len(path.sigmas)} noise levels have {len(path.sigmas) - 1} intervals, which need as "
            f"many midpoints, got {len(path.midpoints)}"
        )
    if solver not in ("euler", "cm"):
        raise ValueError(f"unknown solver {solver!r}, expected 'euler' or 'cm'")
