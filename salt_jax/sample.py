"""Checkpoint and captions in, clips out: few-step students and many-step teachers through one function."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.flow.schedule import grid
from salt_jax.rollout.parallel import Solver, sample
from salt_jax.types import Denoiser, Params

_sample = jax.jit(sample, static_argnums=(0, 4, 6))


def clip_keys(seed: int, count: int) -> jax.Array:
    """One key per clip, [count]: all noise of clip i comes from the i-th."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))


def sample_clips(
    denoiser: Denoiser,
    params: Params,
    text: np.ndarray,
    keys: jax.Array,
    num_updates: int,
    shift: float,
    solver: Solver,
    shape: tuple[int, ...],
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yields batches of float32 latents [batch_size, F, H, W, C], in order; the last may be smaller.

    The noise of a clip does not depend on its batch. With `batch_size` 1 every clip runs through the same program,
    so its bits depend on nothing but its key and text.

    Args:
      text: float32 [N, T, D].
      keys: [N], from `clip_keys`.
      shape: (F, H, W, C).
    """
    sigmas = grid(num_updates, shift)
    for start in range(0, len(text), batch_size):
        part = slice(start, start + batch_size)
        yield np.asarray(
            _sample(denoiser, params, jnp.asarray(text[part]), sigmas, solver, keys[part], shape)
        )
