"""An update in several portions is the update at once: on the toy, on causal students, on streams,
on eight devices.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.rollout.draws import Choice
from salt_jax.train import stages
from salt_jax.train.accumulate import mean_gradient
from salt_jax.train.step import compile_step, critic_step, student_step
from tests.placing import place
from tests.train import test_causal_step as causal
from tests.train import test_stages
from tests.train import test_step as toys
from tests.train.test_step import host, layout

STEPS = [student_step, critic_step]


def run(which, nets, recipe, state, frozen, batch, draw=None, sizes=(), **static):
    """State and metrics of one update, and its program's text."""
    shardings = layout(state, frozen, dict(sizes))
    step = compile_step(which, nets, recipe, shardings, **static)
    given = zip((state, frozen, batch), shardings, strict=False)
    everywhere = [place(x, shardings[3]) for x in (jax.random.key(7), np.int32(0))]
    args = [place(*pair) for pair in given] + everywhere
    args.append(jax.tree.map(lambda z: place(z, shardings[3]), draw))
    text = step.lower(*args).compile().as_text() if sizes else ""
    return host(step(*args)), text


def same(found, wanted):
    """To 1e-5, of the size of each array: what is added in another order is rounded otherwise."""

    def agree(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max(initial=0) <= 1e-5 * max(np.abs(b).max(initial=0), 1e-3)

    jax.tree.map(agree, found, wanted)


@functools.cache
def toy(which, count, size=8, sizes=()):
    recipe = replace(toys.RECIPE, accumulate=count)
    batch = toys.batch_of(0, (size, *toys.CLIPS[1:]))
    args = (toys.TOY, recipe, toys.toy_state(), toys.FROZEN, batch)
    return run(which, *args, sizes=sizes, choice=toys.choice_of(which))


@pytest.mark.parametrize("which", STEPS)
@pytest.mark.parametrize("count", [2, 8])
def test_a_whole_clips_update_is_the_same(which, count):
    same(toy(which, count)[0], toy(which, 1)[0])


def test_what_was_drawn_is_the_same():
    """Bit for bit: the examples of all micro-batches, put together."""
    seen = lambda p, batch, noise, stream: (p * batch.sum(), ({"mean": noise.mean()}, None))
    batch, noise = jnp.arange(8.0), jax.random.normal(jax.random.key(0), (8, 3))
    (_, (metrics, _)), slope = mean_gradient(seen, jnp.ones(()), batch, noise, None, 4)
    assert float(slope) == 28 / 4  # a mean over four portions, each a sum of two
    np.testing.assert_allclose(metrics["mean"], noise.mean(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("which", STEPS)
def test_on_eight_devices_every_micro_batch_is_spread_and_nothing_moves(which):
    """64 clips in 8 portions, one clip a device at a time; what crosses devices are gradients and
    parameters.
    """
    sizes = (("data", 2), ("fsdp", 4))
    (found, text), (wanted, _) = toy(which, 8, 64, sizes), toy(which, 1, 64)
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
    "consistent": (student_step, causal.RECIPE, causal.CONSISTENT),
    "aligned": (student_step, causal.RECIPE, causal.ALIGNED),
    "on": (student_step, causal.STREAM, Choice(sequence="on")),
    "switch": (critic_step, causal.STREAM, Choice(sequence="on")),
}


@functools.cache
def under_way():
    """A state with videos under way, made in four portions."""
    recipe = replace(causal.STREAM, accumulate=4)
    args = (causal.NETS, recipe, causal.causal_state(recipe), causal.FROZEN, causal.batch_of(0))
    return run(student_step, *args, causal.drawn(2, 1), choice=Choice(sequence="new"))[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_causal_students_update_is_the_same_and_so_are_its_videos(kind):
    which, recipe, choice = CASES[kind]
    state = under_way() if kind in ("on", "switch") else causal.causal_state(recipe)
    draw = causal.drawn(*causal.exits(choice))._replace(switch=np.bool_(kind == "switch"))
    args = (state, causal.FROZEN, causal.batch_of(1), draw)
    wanted, found = (
        run(which, causal.NETS, replace(recipe, accumulate=count), *args, choice=choice)[0]
        for count in (1, 4)
    )
    same(found, wanted)
    if found[0].stream:
        assert int(found[0].stream.cache.end) == int(wanted[0].stream.cache.end) > 0
        assert np.any(found[0].stream.cache.k) and np.any(found[0].stream.text)


@pytest.mark.slow
def test_videos_under_way_are_the_same_on_eight_devices():
    state = under_way()
    args = (state, causal.FROZEN, causal.batch_of(1), causal.drawn(2, 1))
    how = dict(choice=Choice(sequence="on"))
    wanted, _ = run(student_step, causal.NETS, causal.STREAM, *args, **how)
    recipe = replace(causal.STREAM, accumulate=2)
    found, _ = run(student_step, causal.NETS, recipe, *args, sizes=(("fsdp", 4),), **how)
    same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", test_stages.STAGES)
def test_a_stages_update_is_the_same(stage):
    args = (test_stages.stage_state(), test_stages.FROZEN, test_stages.stage_batch())
    wanted, found = (
        run(
            stages.stage_step,
            causal.NETS,
            replace(test_stages.CAUSAL, stage=stage, accumulate=count),
            *args,
        )[0]
        for count in (1, 2)
    )
    same(found, wanted)


def test_a_teacher_in_the_making_is_the_same():
    recipe = test_stages.denoising("data", 0.5)
    batch = toys.batch_of(0) | {"text": test_stages.tokens(8)}
    make = lambda: toys.learners(recipe, test_stages.denoising_params(), None)
    nets = toys.networks(toys.toy)
    wanted, found = (
        run(stages.stage_step, nets, replace(recipe, accumulate=count), make(), {}, batch)[0]
        for count in (1, 4)
    )
    same(found, wanted)
