"""Everything that is measured of a student of Wan 2.1, as one dictionary of plain numbers.

What needs no judge of videos: whether steps agree with each other, how much moves, and whether a
video stays as it began. VBench scores how good it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np

from salt_jax.choices import Solver
from salt_jax.evaluate.change import drift, motion
from salt_jax.evaluate.cross_step import cross_step_distance
from salt_jax.evaluate.suite import DefectNumbers, clips, defect
from salt_jax.io.video import looks
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.settings import Sampler
from salt_jax.types import Params

Decode = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
"""Latent chunks [1, f, H, W, C] of a video -> its frames, uint8 [t, H, W, 3], chunk by chunk."""


class WanTask(NamedTuple):
    """What to make: one prompt per clip."""

    text: np.ndarray  # float32 [N, T, D]
    shape: tuple[int, int, int, int]  # (F, H, W, C)
    sampler: Sampler  # whose numbers of steps and solver are varied
    seed: int
    batch_size: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latent frames of the chunks of a clip."""
        policy, frames = self.sampler.memory, self.shape[0]
        return policy.sizes(frames) if policy else (frames,)


class VideoNumbers(TypedDict):
    """What is measured of clips made with one number of steps."""

    motion: dict[str, float]  # of "latents", and of "pixels" in [0, 1]
    drift: list[float]  # of the latents by chunk, see `change.drift`
    looks: list[dict[str, float]]  # of the pixels by chunk, see `io.video.looks`


class WanNumbers(TypedDict):
    """What is measured of a student under one solver. Without a VAE nothing is said of pixels."""

    defect: DefectNumbers
    cross_step: dict[str, dict[str, float]]  # of latents and pixels, by pair of numbers of steps
    videos: dict[int, VideoNumbers]  # by number of steps


def measure(
    network: WanDenoiser,
    params: Params,
    task: WanTask,
    num_steps: Sequence[int],
    solver: Solver,
    decode: Decode | None,
    shown: int = 0,
) -> tuple[WanNumbers, list[dict[int, np.ndarray]]]:
    """A student under one solver, means over the clips; and the pixels of the first `shown` clips
    by number of steps, uint8 [T, H, W, 3], where there is a `decode`.
    """
    made = {k: clips(network, params, task, k, solver) for k in num_steps}
    means, videos = video_numbers(made, task, decode, shown)
    found = defect(network, params, task, solver)
    return {"defect": found, "cross_step": means["cross_step"], "videos": means["videos"]}, videos


def video_numbers(
    made: Mapping[int, np.ndarray], task: WanTask, decode: Decode | None, shown: int = 0
) -> tuple[Any, list[dict[int, np.ndarray]]]:
    """`WanNumbers` of clips [N, F, H, W, C] but for the defect, and pixels as `measure` has them.
    One clip at a time is decoded.
    """
    found, videos = [], []
    for i in range(len(task.text)):
        latents = {k: x[i : i + 1] for k, x in made.items()}
        pixels = {k: decoded(x, task, decode) for k, x in latents.items()} if decode else {}
        found.append(clip_numbers(latents, pixels, task))
        if len(videos) < shown and pixels:
            videos.append({k: np.concatenate(chunks) for k, chunks in pixels.items()})
    return jax.tree.map(lambda *values: float(np.mean(values)), *found), videos


def decoded(latents: np.ndarray, task: WanTask, decode: Decode) -> list[np.ndarray]:
    """The pixels of a clip [1, F, H, W, C] by chunk."""
    return list(decode(np.split(latents, np.cumsum(task.sizes)[:-1], axis=1)))


def clip_numbers(
    latents: Mapping[int, np.ndarray], pixels: Mapping[int, Sequence[np.ndarray]], task: WanTask
) -> dict:
    """`WanNumbers` of one clip but for the defect: its latents [1, F, H, W, C] and pixels by number
    of steps.
    """
    scaled = {k: np.concatenate(x)[None].astype(np.float32) / 255 for k, x in pixels.items()}
    kinds = {"latents": latents} | ({"pixels": scaled} if scaled else {})
    several = len(latents) > 1
    return {
        "cross_step": {kind: cross_step_distance(x) for kind, x in kinds.items() if several},
        "videos": {
            k: {
                "motion": {kind: motion(x[k]) for kind, x in kinds.items()},
                "drift": drift(latents[k], task.sizes),
                "looks": [looks(chunk) for chunk in pixels.get(k, ())],
            }
            for k in latents
        },
    }
