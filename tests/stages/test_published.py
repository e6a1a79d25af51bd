"""The approximations of the published trainers, switched on: an update equals theirs, computed the
way they compute it, chunk after chunk, with a cache that is overwritten in place.

Three things are theirs (docs/algorithm.md 9, rows 9, 26, 27). A cache slot first holds the keys of
the exit step, in the graph, then the values of clean ones are written over it: later chunks read
the clean values and send gradient to the noisy keys. What is committed has half a per cent of
noise, and is told to be clean. Teacher and critic look their noise level up in a table of another
shift than the one that noised the video.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models import wan
from salt_jax.models.kv_cache import append, plan_next_chunk
from salt_jax.models.visibility import KeysValues
from salt_jax.rollout.draws import Terms
from salt_jax.rollout.parallel import noise_at
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Update, Weights
from salt_jax.train.step import compile_step
from tests.helpers import layout, with_networks
from tests.stages import small
from tests.stages.small import BATCH, CLIP, CRITIC, KEY, NETWORK, NULL, STUDENT, TEACHER, Judge

PEERS = replace(
    small.UNALIGNED,
    rollout=replace(small.RECIPE.rollout, context_noise=0.00498, live_cache=True),
    renoise=replace(small.RECIPE.renoise, score_shift=8.0),
    loss=replace(small.RECIPE.loss, self_consistency=0.0),
)
FRAMES, *PICTURE = CLIP
held = jax.lax.stop_gradient


@cache
def stage(recipe):
    return with_networks(make_stage(recipe), student=NETWORK, critic=Judge(), teacher=Judge())


def keys_values(params, x, level, cond, plan):
    """Those that an evaluation at this level makes."""
    inputs = NETWORK._inputs(x, jnp.full(BATCH, 1000 * level), cond, plan)
    return wan.keys_values(params, inputs, NETWORK.config, NETWORK.compute)


def published_video(params, cond, keys, draw, context_noise):
    """x0 of all chunks at their exit step, with the gradient that an in-place cache lets through.

    The frames are made one chunk after the other; nothing is replayed.
    """
    others = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    store = NETWORK.empty_cache(BATCH, FRAMES, tuple(PICTURE))
    videos, constant, exit_step = [], held(params), int(draw.exit_step)
    for first in range(0, FRAMES, 2):
        plan, numbers = plan_next_chunk(store, PEERS.memory, 2), np.arange(first, first + 2)
        fixed = plan._replace(memory=held(plan.memory))
        x = noise_at(keys, draw.levels[0], numbers, tuple(PICTURE))
        for i in range(exit_step):
            x0 = NETWORK.denoise(constant, x, jnp.full(BATCH, draw.levels[i]), cond, fixed).x0
            level = draw.levels[i + 1]
            x = (1 - level) * x0 + level * noise_at(keys, level, numbers, tuple(PICTURE))
        level = draw.levels[exit_step]
        x = held(x)
        x0 = NETWORK.denoise(params, x, jnp.full(BATCH, level), cond, plan).x0
        noisy = keys_values(params, x, level, cond, plan)
        noise = noise_at(others, jnp.float32(0), numbers, tuple(PICTURE))
        seen = (1 - context_noise) * held(x0) + context_noise * noise
        clean = keys_values(constant, seen, 0.0, cond, fixed)
        written = KeysValues(*(c + (n - held(n)) for c, n in zip(held(clean), noisy, strict=True)))
        store = append(store, written, held(x0), PEERS.memory)
        videos.append(x0)
    return jnp.concatenate(videos, axis=1)


def table(shift):
    u = 1 - np.arange(1000) / 1000
    return shift * u / (1 + (shift - 1) * u)


def looked_up(timesteps, shift):
    levels = table(shift)
    return np.float32(levels[np.abs(levels - np.float64(timesteps)[:, None]).argmin(1)])


def published_scores(x0, cond, renoised):
    """Clean estimates of teacher and critic, and the critic's velocity."""
    told = renoised.sigma
    wide = lambda level: jnp.asarray(level).reshape(-1, 1, 1, 1, 1)
    at, taken = (looked_up(np.asarray(told), shift) for shift in (5.0, 8.0))
    x = (1 - wide(at)) * x0 + wide(at) * renoised.noise
    null = cond._replace(text=NULL.repeat(BATCH, 0))
    judge = Judge().denoise
    velocities = [
        judge(p, x, told, c).velocity for p, c in ((TEACHER, cond), (TEACHER, null), (CRITIC, cond))
    ]
    given, nothing, critic = (x - wide(taken) * v for v in velocities)
    return nothing + 2.0 * (given - nothing), critic, (x - critic) / wide(at)


@pytest.mark.slow
def test_an_update_of_the_student_is_the_published_one():
    s, draw, batch = stage(PEERS), small.drawn(4, 1, PEERS), small.batch_of(0)
    noise, on_device = s.noise(KEY, batch), jax.tree.map(jnp.asarray, draw)
    video = lambda p: published_video(p, batch.cond, noise.keys, on_device, 0.00498)
    x0, back = jax.vjp(jax.jit(video), STUDENT)
    teacher, critic, _ = published_scores(x0, batch.cond, noise.renoised)
    gap = (critic - teacher) / jnp.abs(x0 - teacher).mean((1, 2, 3, 4), keepdims=True)
    (slope,) = back(gap / gap.size)
    state = s.first_state(Weights(CRITIC, None, STUDENT, TEACHER, NULL))
    found = {}
    for recipe in (PEERS, replace(PEERS, rollout=replace(PEERS.rollout, live_cache=False))):
        step = compile_step(stage(recipe), Update("student", Terms()), layout(state, small.FROZEN))
        after, metrics = small.run(step, state, batch, draw)
        found[recipe.rollout.live_cache] = small.gradient(after.learners["student"])
    slope, _ = small.clipped(slope)
    np.testing.assert_allclose(metrics["dmd"], 0.5 * jnp.square(gap).mean(), rtol=1e-4)
    size = lambda tree: np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))
    off = {
        live: size(jax.tree.map(np.subtract, g, slope)) / size(slope) for live, g in found.items()
    }
    assert off[True] < 1e-4
    assert off[False] > 0.02, "the cache has no gradient to speak of"


@pytest.mark.slow
def test_an_update_of_the_critic_is_the_published_one():
    s, draw, batch = stage(PEERS), small.drawn(4, 1, PEERS), small.batch_of(0)
    noise, on_device = s.noise(KEY, batch), jax.tree.map(jnp.asarray, draw)
    x0 = jax.jit(lambda p: published_video(p, batch.cond, noise.keys, on_device, 0.00498))(STUDENT)
    velocity = published_scores(x0, batch.cond, noise.renoised)[2]
    state = s.first_state(Weights(CRITIC, None, STUDENT, TEACHER, NULL))
    step = compile_step(s, Update("critic"), layout(state, small.FROZEN))
    _, metrics = small.run(step, state, batch, draw)
    wanted = jnp.square(velocity - (noise.renoised.noise - x0)).mean()
    np.testing.assert_allclose(metrics["critic"], wanted, rtol=1e-4)
