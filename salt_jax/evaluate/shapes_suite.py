"""Everything that is measured of a student on Moving Shapes, as one dictionary of plain numbers."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.choices import Solver
from salt_jax.evaluate.cross_step import cross_step_distance
from salt_jax.evaluate.defect import causal_defect, defect_grid, semigroup_defect
from salt_jax.flow.prediction import add_noise
from salt_jax.flow.schedule import student_levels
from salt_jax.io.video import looks
from salt_jax.models.denoiser import Network
from salt_jax.models.memory import CachePolicy
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.exact import expected_error
from salt_jax.moving_shapes.score import score
from salt_jax.moving_shapes.shapes import World, to_pixels
from salt_jax.sample import Cue, Sampler, clip_keys, sample_clips, stream_chunks
from salt_jax.types import Denoiser, Params

DEFECT_UPDATES = 4  # Eq. 16 is measured on T(4) with the midpoints of T(8)


class Task(NamedTuple):
    """What to make: one caption per clip."""

    world: World
    scene: np.ndarray  # int [N], index into moving_shapes.shapes.scenes
    text: np.ndarray  # float32 [N, T, D]
    shape: tuple[int, int, int, int]  # (F, H, W, C)
    shift: float  # of the grids
    seed: int
    batch_size: int
    policy: CachePolicy | None  # chunk by chunk; None: whole clips
    first_steps: int  # of the first chunk; 0 is as the others
    levels: tuple[float, ...] = ()  # that the student was trained at, as timesteps; () is the grid


def clips(
    network: Network, params: Params, task: Task, num_steps: int, solver: Solver
) -> np.ndarray:
    """float32 latents [N, F, H, W, C]; clip i has the same noise for every network, solver and
    number of steps.
    """
    keys, size = clip_keys(task.seed, len(task.text)), task.batch_size
    levels = lambda k: student_levels(k, task.shift, task.levels)
    first = levels(task.first_steps) if task.first_steps else None
    sampler = Sampler(levels(num_steps), solver, task.policy, first)
    if task.policy is None:
        args = (task.text, keys, sampler, task.shape, size)
        return np.concatenate(list(sample_clips(network.denoise, params, *args)))
    made = []
    for start in range(0, len(keys), size):
        part = slice(start, start + size)
        args = ({0: Cue(task.text[part])}, keys[part], sampler, task.shape)
        made.append(np.concatenate(list(stream_chunks(network, params, *args)), axis=1))
    return np.concatenate(made)


def shapes_score(latents: np.ndarray, task: Task) -> dict[str, float]:
    """The scorer's report card."""
    return score(to_pixels(latents), task.scene, task.world)


def defect(
    network: Network, params: Params, task: Task, solver: Solver
) -> dict[str, list[float] | float]:
    """Salt Eq. 16 over all of the task's captions (as many as fill whole batches)."""
    sigmas, midpoints = defect_grid(DEFECT_UPDATES, task.shift)
    whole = task.policy is None
    measure = (
        partial(semigroup_defect, network.denoise) if whole else partial(causal_defect, network)
    )
    keys, b = clip_keys(task.seed, len(task.text)), task.batch_size
    starts = range(0, max(len(task.text) - b + 1, 1), b)
    parts = [
        measure(
            params,
            jnp.asarray(task.text[i : i + b]),
            sigmas,
            midpoints,
            solver,
            keys[i : i + b],
            task.shape,
            *(() if whole else (task.policy,)),
        )
        for i in starts
    ]
    mean = jax.tree.map(lambda *a: np.mean(np.stack(a), axis=0), *parts)
    return {
        "per_interval": mean.per_interval.tolist(),
        "mean": float(mean.mean),
        "curvature": mean.curvature.tolist(),
    }


def measure(
    network: Network,
    params: Params,
    task: Task,
    num_steps: Sequence[int],
    solver: Solver,
    tick: Callable[[], object],
) -> tuple[dict, dict[int, np.ndarray]]:
    """A student under one solver; `tick` is called after each of the len(num_steps) + 1 parts.

    Returns:
      {"score": {K: {...}}, "cross_step": {"2-4": ...}, "defect": {...}}, JSON-ready, and {K:
      latents}.
    """
    made = {}
    for k in num_steps:
        made[k] = clips(network, params, task, k, solver)
        tick()
    numbers = {
        "score": {k: shapes_score(made[k], task) for k in num_steps},
        "cross_step": cross_step_distance(made),
        "defect": defect(network, params, task, solver),
    }
    tick()
    return numbers, made


def drift(latents: np.ndarray, task: Task) -> dict[str, list]:
    """How a long video changes: the scorer's card of each stretch of one clip's length, and looks
    by chunk.

    A stretch is read as a clip of its own, so an object that starts elsewhere is no fault;
    saturation, contrast and brightness are means over the pixels of each chunk, in [0, 1].
    """
    assert task.policy
    frames, pixels = task.world.frames, to_pixels(latents)
    stretches = [pixels[:, i : i + frames] for i in range(0, pixels.shape[1] - frames + 1, frames)]
    edges = np.cumsum((0, *task.policy.sizes(pixels.shape[1])))
    chunks = [pixels[:, a:b] for a, b in pairwise(edges)]
    return {
        "stretches": [score(part, task.scene, task.world) for part in stretches],
        "looks": [looks(chunk) for chunk in chunks],
    }


def real_clips(
    world: World, count: int, seed: int, embed: Callable[[Sequence[str]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Random clips of the world with their captions' embeddings: float32 [N, F, H, W, C] and
    [N, T, D].
    """
    rng, scenes, modes = np.random.default_rng(seed), shapes.scenes(world), shapes.modes(world)
    drawn = [
        (scenes[rng.integers(len(scenes))], modes[rng.integers(len(modes))]) for _ in range(count)
    ]
    latents = np.array(
        [shapes.to_latent(shapes.render(scene, mode, world)) for scene, mode in drawn]
    )
    return latents, embed([shapes.caption(scene) for scene, _ in drawn])


def velocity_errors(
    denoiser: Denoiser,
    params: Params,
    exact: Params,
    latents: np.ndarray,
    text: np.ndarray,
    sigmas: Sequence[float],
    seed: int,
) -> dict[str, float]:
    """Mean squared velocity error against the closed form by noise level, on clips [N, F, H, W, C]
    noised alike.
    """
    x0, given = jnp.asarray(latents), jnp.asarray(text)
    noise = jax.random.normal(jax.random.key(seed), x0.shape)

    @jax.jit
    def error(params, exact, sigma):
        level = jnp.full(len(x0), sigma)
        x = add_noise(x0, noise, level)
        return expected_error(exact, denoiser(params, x, level, given), x, level, given).mean()

    return {str(sigma): float(error(params, exact, sigma)) for sigma in sigmas}
