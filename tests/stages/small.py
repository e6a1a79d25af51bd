"""A causal student small enough to take its losses apart: a Wan of two layers, clips of three
chunks of two frames. Teacher and critic of its distillation judge whole clips and are smaller
still.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.flow.prediction import from_velocity
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.rollout.draws import Terms, draw_rollout
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Batch, Inputs, Update, Weights
from salt_jax.state import first_state
from salt_jax.train.step import compile_step
from salt_jax.types import Conditioning
from tests.helpers import (
    arguments,
    assert_all_moved,
    close,
    host,
    layout,
    randomised,
    shapes_of,
    with_networks,
)
from tests.stages import toys
from tests.stages.toys import Toy, toy_params

OPTIMIZER = replace(toys.OPTIMIZER, b1=1e-30)  # as good as 0, and keeps the first moment
SMALL = WanConfig(48, 2, 2, 64, 3, 3, (1, 2, 2), 8, 4, 32, 0, 1e-6)
CLIP = (6, 4, 4, 3)  # F H W C
BATCH = 8
RECIPE = read_recipe(base.get_config())
RECIPE = replace(
    RECIPE,
    video="rollout",
    batch_size=BATCH,
    data=replace(RECIPE.data, kind="latents", clip=CLIP[:3]),
    memory=CachePolicy(2, 2, 0, 0, "absolute"),
    schedule=replace(RECIPE.schedule, train_levels=4, anchor_levels=2, shift=2.0),
    rollout=replace(RECIPE.rollout, num_steps=(2, 4), probabilities=(0.5, 0.5)),
    align=replace(RECIPE.align, weight=20.0, margin=0.01, layers=1),
    loss=replace(RECIPE.loss, self_consistency=20.0),  # the terms weigh about the same
    student_optimizer=OPTIMIZER,
    critic_optimizer=OPTIMIZER,
    ema=replace(RECIPE.ema, decay=0.9, start=0),
    critic_ratio=2,
)
UNALIGNED = replace(RECIPE, align=replace(RECIPE.align, weight=0.0))  # for videos without rollouts
# a cache of four frames: two of the sink and two before the chunk
ROLLING = CachePolicy(2, 2, 6, 2, "relative")
STREAM = replace(RECIPE, memory=ROLLING, stream=replace(RECIPE.stream, max_frames=14, overlap=2))
PLAIN, CONSISTENT, ALIGNED = Terms(), Terms(self_consistency=True), Terms(alignment=True)
KEY = jax.random.fold_in(jax.random.key(7), 0)  # of the first update of a run

NETWORK = WanDenoiser(SMALL, Compute())


@dataclass(frozen=True)
class Judge(Toy):
    """A denoiser of whole clips: each frame's velocity depends on the frame before it too."""

    def denoise(self, params, x, sigma, cond, plan=None):
        both = x + jnp.roll(x, 1, axis=1)
        return from_velocity(x, super().denoise(params, both, sigma, cond).velocity, sigma)


@functools.cache
def wan(seed):
    return randomised(shapes_of(SMALL), seed)


STUDENT, BASE, EMA = wan(1), wan(2), wan(3)
CRITIC, TEACHER = toy_params(1, SMALL.text_dim), toy_params(2, SMALL.text_dim)
NULL = jax.random.normal(jax.random.key(9), (1, SMALL.text_length, SMALL.text_dim))
FROZEN = {"teacher": TEACHER, "base": BASE, "null_text": NULL}


def batch_of(seed):
    k_video, k_text = jax.random.split(jax.random.key(seed))
    text = jax.random.normal(k_text, (BATCH, SMALL.text_length, SMALL.text_dim))
    video = jax.random.uniform(k_video, (BATCH, *CLIP), minval=-1.0)
    return Batch(Conditioning(text), video=video)


def distil(recipe=RECIPE, critic=Judge()):
    return with_networks(make_stage(recipe), student=NETWORK, critic=critic, teacher=Judge())


def causal_state(recipe=RECIPE):
    """As in the middle of a run: no two networks are equal."""
    state = distil(recipe).first_state(Weights(CRITIC, None, STUDENT, TEACHER, NULL))
    return replace(state, iteration=jnp.int32(3), ema=EMA)


@functools.cache
def drawn(updates, exit_step, recipe=RECIPE):
    """What is drawn in the first call that has so many updates and exits there."""
    draws = (draw_rollout(recipe, 0, call)[1] for call in range(1000))
    return next(
        d for d in draws if np.argmax(d.levels == 0) == updates and d.exit_step == exit_step
    )


def exits(terms):
    """(K, exit step): self-consistency is trained at the longest rollout, alignment at the
    others.
    """
    return (4, 1) if terms.self_consistency else (2, 1)


@functools.cache
def compiled(update, recipe=RECIPE, paired=False):
    """An update on one device, compiled once for all tests."""
    state = paired_state() if paired else causal_state(recipe)
    return compile_step(distil(recipe), update, layout(state, FROZEN))


def run(step, state, batch, draw, frozen=FROZEN, sizes=(), index=0):
    """One call of a compiled update as the loop makes it; `state` is copied."""
    return step(*arguments(layout(state, frozen, sizes), state, frozen, batch, draw, index))


@functools.cache
def student_stepped(terms):
    step = compiled(Update("student", terms))
    return run(step, causal_state(), batch_of(0), drawn(*exits(terms)))


@functools.cache
def critic_stepped():
    return run(compiled(Update("critic")), causal_state(), batch_of(0), drawn(2, 1))


# Streaming: an update goes on where the last one stopped.


def at_place(where, draw):
    """The update of the critic at a place of a sequence, "new", "on" or "switch", and its draw."""
    update = Update("critic", Terms(sequence="new" if where == "new" else "on"))
    return update, draw._replace(switch=np.bool_(where == "switch"))


@functools.cache
def streamed(*places, paired=False):
    """The state after critic updates at these places of a sequence, each with a batch and a key of
    its own.
    """
    state = paired_state() if paired else causal_state(STREAM)
    for i, where in enumerate(places):
        update, draw = at_place(where, drawn(4, 3))
        batch = batch_of(i)._replace(switch=switch_of(i)) if paired else batch_of(i)
        state, _ = run(compiled(update, STREAM, paired), state, batch, draw, index=i)
    return state


def paired_state():
    """Of videos whose prompts have switch prompts."""
    state = causal_state(STREAM)
    stream = replace(state.stream, switch=jnp.zeros_like(state.stream.text))
    return replace(state, stream=stream)


def switch_of(seed):
    """The prompts that are paired with those of `batch_of`."""
    return jnp.flip(batch_of(seed).cond.text, axis=1)


def with_first_critic(state):
    """The same with the critic of the start, whose moments are zero."""
    return replace(state, learners=state.learners | {"critic": causal_state().learners["critic"]})


def gradient(learner):
    """Read off the first moment after one update, which is the clipped gradient."""
    assert int(learner.opt_state[1][0].count) == 1
    return learner.opt_state[1][0].mu


def clipped(slope):
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(slope)))
    return jax.tree.map(lambda leaf: leaf * min(1.0, OPTIMIZER.clip / norm), slope), norm


# The stages that make a student causal.

FORCED = {"teacher": wan(7), "null_text": NULL}
CAUSAL = replace(
    UNALIGNED,
    caption_dropout=0.5,
    ode=replace(RECIPE.ode, num_steps=8, guidance=2.0),
    renoise=replace(RECIPE.renoise, lowest=0.001, highest=1.0),
)


def causal_stage(name, student=NETWORK, **changes):
    return with_networks(make_stage(replace(CAUSAL, stage=name, **changes)), student=student)


def stage_batch(name):
    """Of ODE regression with states of trajectories at the student's four levels and at the end."""
    if name != "ode_regression":
        return batch_of(0)
    return batch_of(0)._replace(states=jax.random.normal(jax.random.key(3), (BATCH, 5, *CLIP)))


def stage_state():
    """As in the middle of a run."""
    state = first_state(CAUSAL, {"student": STUDENT})
    return replace(state, iteration=jnp.int32(3), ema=EMA)


def column(level):
    return level.reshape(*level.shape, *(1,) * (5 - level.ndim))


def forced(params, x, sigma, cond, x0):
    """What a network says of noisy chunks, each given the clean ones before it."""
    plan = plan_teacher_forcing(NETWORK, params, x0, cond, CAUSAL.memory)
    return NETWORK.denoise(params, x, sigma, cond, plan)


def guided_by_hand(x, sigma, batch):
    """The causal teacher's velocity, u + 2 (c - u)."""
    null = Conditioning(NULL.repeat(BATCH, 0))
    c, u = (
        forced(FORCED["teacher"], x, sigma, cond, batch.video).velocity
        for cond in (batch.cond, null)
    )
    return u + 2.0 * (c - u)


def loss_of(stage, params, ema=EMA):
    """Of an update, with what is drawn from its key."""
    state, batch = replace(stage_state(), ema=ema), stage_batch(stage.recipe.stage)
    inputs = Inputs(state, FORCED, batch, stage.noise(KEY, batch), None)
    return stage.loss(params, inputs, Update("student"))[0]


def assert_follows(name, by_hand):
    """One update follows the gradient of a loss that is assembled by hand, and moves every
    parameter and their average.

    Keys are those of the update; average, teacher and states are constants.
    """
    batch, before = stage_batch(name), host(stage_state())
    shardings = layout(before, FORCED)
    step = compile_step(causal_stage(name), Update("student"), shardings)
    after, metrics = step(*arguments(shardings, stage_state(), FORCED, batch))
    value, slope = jax.jit(jax.value_and_grad(by_hand(batch)))(STUDENT)
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
    own = {"student_grad_norm", "student_skipped", "student_skipped_in_a_row"}
    assert set(metrics) == {name} | own
    slope, _ = clipped(slope)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    moved = after.learners["student"]
    close(gradient(moved), slope, rtol=1e-3, atol=1e-4 * largest)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope)), "a parameter gets no gradient"
    assert int(after.iteration) == 4 and set(after.learners) == {"student"}
    assert after.stream is None
    assert_all_moved(before.learners["student"].params, moved.params)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, moved.params))
