"""Everything that is measured of a student on Moving Shapes, as one dictionary of plain numbers."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.choices import Solver
from salt_jax.evaluate.cross_step import cross_step_distance
from salt_jax.evaluate.suite import DefectNumbers, clips, defect
from salt_jax.flow.prediction import add_noise
from salt_jax.io.video import looks
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.exact import expected_error
from salt_jax.moving_shapes.latents import to_latent, to_pixels
from salt_jax.moving_shapes.score import each, score
from salt_jax.moving_shapes.shapes import World, is_endless
from salt_jax.rollout.settings import Sampler
from salt_jax.types import Conditioning, Denoiser, Params

EACH = ("all", "sharpness", "motion")


class Task(NamedTuple):
    """What to make: one caption per clip."""

    world: World
    scene: np.ndarray  # int [N], index into moving_shapes.shapes.scenes
    text: np.ndarray  # float32 [N, T, D]
    shape: tuple[int, int, int, int]  # (F, H, W, C)
    sampler: Sampler  # whose numbers of steps and solver are varied
    seed: int
    batch_size: int


class StudentNumbers(TypedDict):
    """What is measured of a student under one solver."""

    score: dict[int, dict[str, float]]  # by number of steps, see `moving_shapes.score.score`
    # by number of steps: what EACH names, of each clip
    each: dict[int, dict[str, list[float]]]
    cross_step: dict[str, float]  # by pair of numbers of steps, "2-4"
    defect: DefectNumbers


class DriftNumbers(TypedDict):
    """How a long video changes."""

    segments: list[dict[str, float]]  # the scorer's card of each
    looks: list[dict[str, float]]  # of each chunk, see `io.video.looks`
    # Of an endless world, where a long video has to be right as one clip: its card, each chunk's.
    whole: NotRequired[dict[str, float]]
    chunks: NotRequired[list[dict[str, float]]]


def shapes_score(latents: np.ndarray, task: Task) -> dict[str, float]:
    """The scorer's report card."""
    return score(to_pixels(latents, task.world), task.scene, task.world)


def each_clip(latents: np.ndarray, task: Task) -> dict[str, list[float]]:
    """What intervals are computed of (`evaluate.intervals`)."""
    cards, _ = each(to_pixels(latents, task.world), task.scene, task.world)
    return {name: [round(float(value), 4) for value in cards[name]] for name in EACH}


def measure(
    network: WanDenoiser,
    params: Params,
    task: Task,
    num_steps: Sequence[int],
    solver: Solver,
    tick: Callable[[], object],
) -> tuple[StudentNumbers, dict[int, np.ndarray]]:
    """A student under one solver, and its latents by number of steps; `tick` is called after each
    of the len(num_steps) + 1 parts.
    """
    made = {}
    for k in num_steps:
        made[k] = clips(network, params, task, k, solver)
        tick()
    numbers: StudentNumbers = {
        "score": {k: shapes_score(made[k], task) for k in num_steps},
        "each": {k: each_clip(made[k], task) for k in num_steps},
        "cross_step": cross_step_distance(made),
        "defect": defect(network, params, task, solver),
    }
    tick()
    return numbers, made


def drift(latents: np.ndarray, task: Task) -> DriftNumbers:
    """How a long video changes: the scorer's card of each segment of one clip's length, and looks
    by chunk.

    A segment is read as a clip of its own, so an object that starts elsewhere is no fault;
    saturation, contrast and brightness are means over the pixels of each chunk, in [0, 1].
    """
    policy = task.sampler.memory
    assert policy
    frames, pixels = task.world.frames, to_pixels(latents, task.world)
    segments = [pixels[:, i : i + frames] for i in range(0, pixels.shape[1] - frames + 1, frames)]
    edges = np.cumsum((0, *policy.sizes(pixels.shape[1])))
    chunks = [pixels[:, a:b] for a, b in pairwise(edges)]
    card = functools.partial(score, scene_index=task.scene, world=task.world)
    found: DriftNumbers = {
        "segments": [card(part) for part in segments],
        "looks": [looks(chunk) for chunk in chunks],
    }
    if is_endless(task.world):
        found["whole"], found["chunks"] = card(pixels), [card(chunk) for chunk in chunks]
    return found


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
    videos = np.array([shapes.render(scene, mode, world) for scene, mode in drawn])
    return to_latent(videos, world), embed([shapes.caption(scene) for scene, _ in drawn])


class Clean(NamedTuple):
    """Clips of the world."""

    latents: np.ndarray  # float32 [N, F, H, W, C]
    text: np.ndarray  # float32 [N, T, D], their captions


def velocity_errors(
    denoiser: Denoiser,
    params: Params,
    exact: Params,
    clean: Clean,
    sigmas: Sequence[float],
    seed: int,
) -> dict[str, float]:
    """Mean squared velocity error against the closed form by noise level, on clips [N, F, H, W, C]
    noised alike.
    """
    x0, cond = jnp.asarray(clean.latents), Conditioning(jnp.asarray(clean.text))
    noise = jax.random.normal(jax.random.key(seed), x0.shape)

    @jax.jit
    def error(params, exact, sigma):
        level = jnp.full(len(x0), sigma)
        x = add_noise(x0, noise, level)
        prediction = denoiser.denoise(params, x, level, cond)
        return expected_error(exact, prediction, x, level, cond).mean()

    return {str(sigma): float(error(params, exact, sigma)) for sigma in sigmas}
