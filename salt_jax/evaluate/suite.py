"""What is made and measured of a student of any world."""

from typing import Protocol, TypedDict, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.choices import Solver
from salt_jax.evaluate.defect import Path, causal_defect, defect_grid, semigroup_defect
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.types import Conditioning, Denoiser, Params

DEFECT_STEPS = 4  # Eq. 16 is measured on T(4) with the midpoints of T(8)


@runtime_checkable
class Task(Protocol):
    """What to make: one prompt per clip."""

    @property
    def text(self) -> np.ndarray: ...  # float32 [N, T, D]

    @property
    def shape(self) -> tuple[int, int, int, int]: ...  # (F, H, W, C)

    @property
    def sampler(self) -> Sampler: ...  # whose numbers of steps and solver are varied

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


class DefectNumbers(TypedDict):
    """As `evaluate.defect.Defect`."""

    per_interval: list[float]
    mean: float
    curvature: list[float]


def clips(
    network: Denoiser, params: Params, task: Task, num_steps: int, solver: Solver
) -> np.ndarray:
    """float32 latents [N, F, H, W, C]; clip i has the same noise for every network, solver and
    number of steps.
    """
    keys, size = clip_keys(task.seed, len(task.text)), task.batch_size
    sampler = task.sampler._replace(num_steps=num_steps, solver=solver)
    made = []
    for start in range(0, len(keys), size):
        part = slice(start, start + size)
        cues = {0: Cue(Conditioning(task.text[part]))}
        chunks = generate(sampler, network, params, cues, keys[part], task.shape)
        made.append(np.concatenate(list(chunks), axis=1))
    return np.concatenate(made)


def defect(network: WanDenoiser, params: Params, task: Task, solver: Solver) -> DefectNumbers:
    """Salt Eq. 16 over all of the task's captions (as many as fill whole batches)."""
    sigmas, midpoints = defect_grid(DEFECT_STEPS, task.sampler.shift)
    keys, b, policy = clip_keys(task.seed, len(task.text)), task.batch_size, task.sampler.memory
    parts = []
    for i in range(0, max(len(task.text) - b + 1, 1), b):
        cond = Conditioning(jnp.asarray(task.text[i : i + b]))
        path = Path(sigmas, midpoints, keys[i : i + b])
        args = (network, params, cond, path, solver, task.shape)
        parts.append(causal_defect(*args, policy) if policy else semigroup_defect(*args))
    mean = jax.tree.map(lambda *a: np.mean(np.stack(a), axis=0), *parts)
    return {
        "per_interval": mean.per_interval.tolist(),
        "mean": float(mean.mean),
        "curvature": mean.curvature.tolist(),
    }
