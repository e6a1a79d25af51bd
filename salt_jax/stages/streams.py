"""Streaming long tuning (LongLive): what an update continues from, and what it leaves to the next
one.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from salt_jax.config.schema import Recipe
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.kv_cache import KVCache, trim
from salt_jax.rollout.causal import Origin, Trajectory, recache
from salt_jax.stages.stage import ABSENT, Inputs, Weights
from salt_jax.state import Stream
from salt_jax.types import Params


def first_stream(student: WanDenoiser, weights: Weights, recipe: Recipe) -> Stream:
    """Before the first update: its form, and no video."""
    slots, picture = recipe.memory.capacity(0), recipe.clip_shape[1:]
    text = jnp.zeros((recipe.batch_size, *weights.null_text.shape[1:]))
    switch = ABSENT if weights.switch is ABSENT else text
    return Stream(student.empty_cache(recipe.batch_size, slots, picture), text, switch)


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
    switch = before.switch
    if sequence == "new" and switch is not ABSENT:
        switch = inputs.batch.switch
    return Stream(trim(made.cache, recipe.memory), origin.cond.text, switch)
