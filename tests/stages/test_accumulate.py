"""An update in several portions is the update at once: on toys, on causal students, on streams, on
eight devices.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.kv_cache import KVCache
from salt_jax.rollout.draws import Terms
from salt_jax.stages.accumulate import mean_gradient
from salt_jax.stages.stage import Update
from salt_jax.state import Stream
from salt_jax.train.step import compile_step
from tests.helpers import arguments, host, layout
from tests.stages import small, toys

NUMBERS = jnp.zeros(1, jnp.int32), jnp.int32(1), jnp.int32(1)  # of a cache's frames


def run(stage, update, state, frozen, batch, draw=None, sizes=()):
    """State and metrics of one update, and its program's text."""
    shardings = layout(state, frozen, sizes)
    step = compile_step(stage, update, shardings)
    args = arguments(shardings, state, frozen, batch, draw)
    text = step.lower(*args).compile().as_text() if sizes else ""
    return host(step(*args)), text


def same(found, wanted):
    """To 1e-5, of the size of each array: what is added in another order is rounded otherwise."""

    def agree(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= 1e-5 * max(np.abs(b).max(initial=0), 1e-3)

    jax.tree.map(agree, found, wanted)


@functools.cache
def toy(who, count, size=8, sizes=()):
    stage = toys.stage_of(replace(toys.RECIPE, accumulate=count))
    batch = toys.batch_of(0, (size, *toys.CLIPS[1:]))
    return run(stage, toys.UPDATES[who], toys.toy_state(), toys.FROZEN, batch, sizes=sizes)


@pytest.mark.parametrize("who", toys.UPDATES)
@pytest.mark.parametrize("count", [2, 8])
def test_a_whole_clips_update_is_the_same(who, count):
    same(toy(who, count)[0], toy(who, 1)[0])


def test_what_was_drawn_is_the_same():
    """Bit for bit: the examples of all micro-batches, put together."""
    seen = lambda p, batch, noise, stream: (p * batch.sum(), ({"mean": noise.mean()}, None))
    batch, noise = jnp.arange(8.0), jax.random.normal(jax.random.key(0), (8, 3))
    (_, (metrics, _)), slope = mean_gradient(seen, jnp.ones(()), batch, noise, None, 4)
    assert float(slope) == 28 / 4  # a mean over four portions, each a sum of two
    np.testing.assert_allclose(metrics["mean"], noise.mean(), rtol=1e-6)


@pytest.mark.parametrize("paired", [False, True])
def test_the_prompts_of_a_stream_are_written_where_their_videos_are(paired):
    """And so are those that are paired with them."""
    cache = KVCache(*(jnp.zeros((2, 8, 1, 1, 1, 1)),) * 2, jnp.zeros((8, 1, 1, 1, 1)), *NUMBERS)
    text = jnp.zeros((8, 2, 1))
    stream = Stream(cache, text, text if paired else None)
    batch = jnp.arange(16.0).reshape(8, 2, 1)

    def loss(p, batch, noise, stream):
        switch = None if stream.switch is None else stream.switch - batch
        return p * batch.sum(), ({}, replace(stream, text=stream.text + batch, switch=switch))

    (_, (_, made)), _ = mean_gradient(loss, jnp.ones(()), batch, text, stream, 4)
    np.testing.assert_array_equal(made.text, batch)
    assert not paired or np.array_equal(made.switch, -batch)


@pytest.mark.slow
@pytest.mark.parametrize("who", toys.UPDATES)
def test_on_eight_devices_every_micro_batch_is_spread_and_nothing_moves(who):
    """64 clips in 8 portions, one clip a device at a time; what crosses devices are gradients and
    parameters.
    """
    sizes = (("data", 2), ("fsdp", 4))
    (found, text), (wanted, _) = toy(who, 8, 64, sizes), toy(who, 1, 64)
    same(found, wanted)
    assert not re.findall(r" (all-to-all|collective-permute)", text)
    clip = ",".join(map(str, toys.CLIPS[1:]))
    moved = [
        line
        for line in text.splitlines()
        if re.search(r" all-(gather|reduce)", line) and clip in line
    ]
    assert not moved, moved[0]
    assert f"f32[1,{clip}]" in text, "no device works on one clip"


CASES = {
    "consistent": (Update("student", small.CONSISTENT), small.RECIPE),
    "aligned": (Update("student", small.ALIGNED), small.RECIPE),
    "on": (Update("student", Terms(sequence="on")), small.STREAM),
    "switch": (Update("critic", Terms(sequence="on")), small.STREAM),
}


@functools.cache
def under_way():
    """A state with videos under way, made in four portions."""
    stage, update = small.distil(replace(small.STREAM, accumulate=4)), Update("student")
    state, batch = small.causal_state(small.STREAM), small.batch_of(0)
    return run(stage, update, state, small.FROZEN, batch, small.drawn(2, 1))[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_causal_students_update_is_the_same_and_so_are_its_videos(kind):
    update, recipe = CASES[kind]
    state = under_way() if kind in ("on", "switch") else small.causal_state(recipe)
    draw = small.drawn(*small.exits(update.terms))._replace(switch=np.bool_(kind == "switch"))
    args = (update, state, small.FROZEN, small.batch_of(1), draw)
    wanted, found = (
        run(small.distil(replace(recipe, accumulate=count)), *args)[0] for count in (1, 4)
    )
    same(found, wanted)
    if found[0].stream:
        assert int(found[0].stream.cache.end) == int(wanted[0].stream.cache.end) > 0
        assert np.any(found[0].stream.cache.k) and np.any(found[0].stream.text)


@pytest.mark.slow
def test_videos_under_way_are_the_same_on_eight_devices():
    update = Update("student", Terms(sequence="on"))
    args = (update, under_way(), small.FROZEN, small.batch_of(1), small.drawn(2, 1))
    wanted, _ = run(small.distil(small.STREAM), *args)
    stage = small.distil(replace(small.STREAM, accumulate=2))
    found, _ = run(stage, *args, sizes=(("fsdp", 4),))
    same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher_forcing", "ode_regression", "consistency"])
def test_a_stages_update_is_the_same(name):
    args = (Update("student"), small.stage_state(), small.FORCED, small.stage_batch(name))
    wanted, found = (run(small.causal_stage(name, accumulate=count), *args)[0] for count in (1, 2))
    same(found, wanted)


def test_a_teacher_in_the_making_is_the_same():
    args = (Update("student"), toys.denoising_state(), {}, toys.captioned(toys.tokens(8)))
    wanted, found = (
        run(toys.denoising("data", 0.5, accumulate=count), *args)[0] for count in (1, 4)
    )
    same(found, wanted)
