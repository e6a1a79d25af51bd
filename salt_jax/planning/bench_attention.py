"""How fast the kernels of attention run beside each other, in the shapes of a recipe."""

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.models.attention import attention
from salt_jax.models.presets import Kernel
from salt_jax.planning.bench import Result, measure

AnyKernel = Kernel | Literal["tokamax"]


def attention_kernel(recipe: Recipe, name: AnyKernel, runs: int) -> Iterator[Result]:
    """One kernel of `models.attention`, or what tokamax chooses, where a student attends: a chunk
    to itself, a chunk to the clip, and a clip to itself. Forward, then with the gradients by all
    three.

    The plain kernel is left out where twice its scores do not fit the device.

    Raises:
      UserError: tokamax is not installed.
    """
    c, (frames, height, width, _) = recipe.wan, recipe.clip_shape
    frame = height * width // (c.patch_size[1] * c.patch_size[2])
    chunk, clip = recipe.memory.chunk * frame, frames * frame
    attend = _tokamax() if name == "tokamax" else partial(attention, kernel=name)

    def forward(q, k, v):
        return attend(q, k, v)

    gradients = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))
    seeds = jax.random.split(jax.random.key(recipe.seed), 3)
    for queries, keys in ((chunk, chunk), (chunk, clip), (clip, clip)):
        if name == "plain" and 8 * c.num_heads * queries * keys > _memory():
            continue
        shapes = ((1, length, c.num_heads, c.head_width) for length in (queries, keys, keys))
        args = tuple(map(partial(_normal, dtype=recipe.compute.dtype), seeds, shapes))
        flops, part = 4.0 * queries * keys * c.dim, f"{name} {queries} x {keys}"
        yield measure(part, jax.jit(forward), args, flops, runs)
        # all kernels but the plain one make the scores again
        flops *= 3 if name == "plain" else 3.5
        yield measure(f"{part}, gradient", jax.jit(gradients), args, flops, runs)


def _normal(seed, shape, dtype) -> jax.Array:
    return jax.random.normal(seed, shape, dtype)


def _memory() -> int:
    """Bytes that a program may fill."""
    stats = jax.devices()[0].memory_stats() or {}
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", here)


def _tokamax() -> Callable[..., jax.Array]:
    try:
        return importlib.import_module("tokamax").dot_product_attention
    except ImportError as error:
        raise UserError(
            f"tokamax cannot be loaded ({error}); pip install tokamax, or leave attention_tokamax "
            "out of --what"
        ) from error
