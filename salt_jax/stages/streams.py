"""Streaming long tuning (LongLive): what an update continues from, and what it leaves to the next
one.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from salt_jax.config.schema import Recipe
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.kv_cache import KVCache, trim
from salt_jax.models.layout import BATCH, fitting
from salt_jax.models.vae_window import as_first
from salt_jax.rollout.causal import Origin, Trajectory, recache
from salt_jax.stages.stage import ABSENT, Inputs, Weights
from salt_jax.stages.start import StartState
from salt_jax.state import Stream
from salt_jax.types import Params


def first_stream(student: WanDenoiser, weights: Weights, recipe: Recipe) -> Stream:
    """Before the first update: its form, and no video."""
    slots, picture = recipe.memory.capacity(0), recipe.clip_shape[1:]
    text = jnp.zeros((recipe.batch_size, *weights.null_text.shape[1:]))
    switch = ABSENT if weights.switch is ABSENT else text
    cache = student.empty_cache(recipe.batch_size, slots, picture)
    past = ABSENT
    if recipe.reencodes:
        past = jnp.zeros((recipe.batch_size, past_frames(recipe), *picture))
    return Stream(cache, text, switch, past)


def past_frames(recipe: Recipe) -> int:
    """How many frames a stream keeps to encode one of them anew: those up to it, and the overlap's
    others.
    """
    return recipe.stream.reencode - 1 + recipe.stream.overlap


def under_way(student: WanDenoiser, params: Params, inputs: Inputs, recipe: Recipe) -> Origin:
    """The prompts and the cache of the videos under way.

    A switch takes the prompts that are paired with theirs, or where there are none the batch's, and
    reads the cached frames again under them, before anything is made.
    """
    cond, stream, draw = inputs.batch.cond, inputs.state.stream, inputs.draw
    assert draw is not None
    if not recipe.stream.switch:
        return Origin(cond._replace(text=stream.text), stream.cache)
    other = cond.text if stream.switch is ABSENT else stream.switch
    # A branch, not a program of its own: that would be half as many programs again.
    cond = cond._replace(text=jnp.where(draw.switch, other, stream.text))

    def again(cache: KVCache) -> KVCache:
        return recache(student, params, cache, cond, recipe.memory)

    return Origin(cond, jax.lax.cond(draw.switch, again, lambda c: c, stream.cache))


def next_stream(
    made: Trajectory, origin: Origin, inputs: Inputs, sequence: Literal["new", "on"], recipe: Recipe
) -> Stream:
    """What the next update continues from."""
    before = inputs.state.stream
    switch, past = before.switch, before.past
    if sequence == "new" and switch is not ABSENT:
        switch = inputs.batch.switch
    if past is not ABSENT:
        frames = [past, made.x0] if sequence == "on" else [made.x0]
        past = jnp.concatenate(frames, axis=1)[:, -past_frames(recipe) :]
    return Stream(trim(made.cache, recipe.memory), origin.cond.text, switch, past)


def as_window(start: StartState, inputs: Inputs, recipe: Recipe, mesh: Mesh | None) -> StartState:
    """The same where teacher and critic see a window of a video under way as a video: its first
    latent encodes one frame (`models.vae_window`). It is of the overlap: nothing in it has a
    gradient, and no loss is of it.

    Every device works for its share of the batch: to the compiler a scan over convolutions is free
    to be cut otherwise.
    """
    past = inputs.state.stream.past[:, : recipe.stream.reencode]
    encode = partial(as_first, dtype=recipe.compute.dtype)
    if mesh is not None and mesh.size > 1:
        mine = P(fitting(mesh.shape, len(past), BATCH))
        specs = {"in_specs": (P(), mine), "out_specs": mine}
        encode = jax.shard_map(encode, mesh=mesh, check_vma=False, **specs)
    first = jax.lax.stop_gradient(encode(inputs.frozen["vae"], past))
    return start._replace(overlap=jnp.concatenate([first, start.overlap[:, 1:]], axis=1))
