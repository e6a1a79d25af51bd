"""Cyclic positions, the last step as context and a first chunk of its own number of steps, against
a loop over chunks that knows neither caches nor policies: for each chunk it lists who is seen and
where they stand, and holds what every frame left behind.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.flow.schedule import grid
from salt_jax.models import wan
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import Guided, GuidedParams, wan_denoiser
from salt_jax.models.kv_cache import KVCache, plan_next_chunk, trim
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.visibility import AttentionPlan, KeysValues, QueryGroup, chunk_groups
from salt_jax.rollout.causal import Origin, Steps, recache, rollout
from salt_jax.rollout.parallel import noise_at
from salt_jax.rollout.replay import replay
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate, make_chunk
from salt_jax.types import Conditioning
from tests.helpers import randomised, shapes_of

SMALL = WanConfig(48, 2, 2, 64, 4, 4, (1, 2, 2), 16, 4, 32, 0, 1e-6)
NETWORK = wan_denoiser(SMALL, Compute(), 9, 3)
PARAMS = randomised(shapes_of(SMALL), 1)
PLACE, KEYS = (4, 4, 4), clip_keys(0, 2)
CYCLIC = CachePolicy(3, 3, 9, 3, "cyclic", 9)
ALL = replace(CYCLIC, window=0, sink=0)
LAST = CachePolicy(3, 3, 6, 0, "relative", context="last_step")
PICTURE = CachePolicy(3, 1, 7, 1, "absolute", context="last_step")
BOTH = CachePolicy(2, 2, 6, 2, "cyclic", 6, "last_step")


def prompts(seed=2):
    drawn = np.random.default_rng(seed).normal(size=(2, 4, 16))
    return Conditioning(jnp.asarray(drawn, jnp.float32))


def weights(frames):
    return np.random.default_rng(11).normal(size=(2, frames, *PLACE)).astype(np.float32)


# The slow computation


@jax.jit
def noise(level, numbers):
    return noise_at(KEYS, level, numbers, PLACE)


@jax.jit
def looked(params, x, sigma, cond, memory, here, there):
    """What a chunk says that sees the frames of `memory` and itself, and its keys and values."""
    own, past = slice(0, x.shape[1]), slice(0, memory.k.shape[2])
    group = QueryGroup(own, (own,), (past,), here, jnp.concatenate([here, there]))
    plan = AttentionPlan((group,), memory, jnp.arange(x.shape[1]))
    inputs = wan.Inputs(x, jnp.full(2, 1000 * sigma), cond, plan)
    kept = wan.keys_values(params, inputs, SMALL, Compute())
    return x - sigma * wan.apply_wan(params, inputs, SMALL, Compute()), kept


@jax.jit
def slope(params, weights, *seen):
    return jax.grad(lambda p: (weights * looked(p, *seen)[0]).sum())(params)


def sees(policy, frame, start, stop):
    """The rule of docs/algorithm.md 10.1."""
    window, sink = policy.window or 10**6, policy.sink
    return frame < start and (frame >= stop - (window - sink) or frame < sink)


def stands(policy, seen, frames, start):
    """Positions of the frames that a chunk sees, and of its own; frame 0 has the number `start`."""
    if policy.positions == "relative":
        return np.arange(len(seen)), len(seen) + np.arange(len(frames))
    turn = lambda numbers: (start + np.array(numbers, int)) % (policy.period or 10**6)
    return turn(seen), turn(frames)


class Held:
    """What the frames of a video left behind, for each of its texts."""

    def __init__(self, policy, start, conds):
        self.policy, self.start, self.frames = policy, start, {id(c): [] for c in conds}

    def memory(self, at, size, cond):
        """What the chunk [at, at + size) is told: (text, keys and values, its places, theirs)."""
        seen = [n for n in range(at) if sees(self.policy, n, at, at + size)]
        there, here = stands(self.policy, seen, range(at, at + size), self.start)
        nothing = np.zeros((SMALL.num_layers, 2, 0, 4, 2, 24), np.float32)
        held = self.frames[id(cond)]
        kept = [np.concatenate([nothing, *(held[n][i] for n in seen)], 2) for i in (0, 1)]
        return cond, KeysValues(*kept), here, there

    def keep(self, kept, cond):
        for i in range(kept.k.shape[2]):
            self.frames[id(cond)].append([np.asarray(z[:, :, i : i + 1]) for z in kept])

    def all(self, cond):
        return [np.concatenate(z, 2) for z in zip(*self.frames[id(cond)], strict=True)]


def slow(policy, sizes, schedules, exits, start=0, texts=None):
    """Chunk i, of `sizes[i]` frames, runs `schedules[i]` up to `exits[i]`. What each chunk's exit
    step was given, the clean frames, and what is held. `texts`: (text, share in the velocity).
    """
    texts = texts or [(prompts(), 1.0)]
    held, at, given_, said = Held(policy, start, [c for c, _ in texts]), 0, [], []
    for size, levels, exit_step in zip(sizes, schedules, exits, strict=True):
        told = [held.memory(at, size, cond) for cond, _ in texts]
        numbers = start + at + np.arange(size)

        def look(x, sigma, told=told):
            """Of all texts together, and what each left."""
            each = [looked(PARAMS, x, sigma, *seen) for seen in told]
            shares = [w * x0 for (x0, _), (_, w) in zip(each, texts, strict=True)]
            return sum(shares), [kept for _, kept in each]

        x = noise(levels[0], numbers)
        for now, after in pairwise(levels[: exit_step + 1]):
            x = (1 - after) * look(x, now)[0] + after * noise(after, numbers)
        x0, noisy = look(x, levels[exit_step])
        kept = look(x0, 0.0)[1] if policy.context == "clean" else noisy
        for part, (cond, _) in zip(kept, texts, strict=True):
            held.keep(part, cond)
        given_.append((x, levels[exit_step], *told[0]))
        said.append(x0)
        at += size
    return given_, np.concatenate(said, 1), held


def steps(num_steps, exit_step, first=None):
    levels = np.pad(grid(num_steps, 5.0), (0, 8 - num_steps))
    return Steps(jnp.asarray(levels), jnp.int32(exit_step), "cm", first and steps(*first))


@partial(jax.jit, static_argnames=("policy", "frames"))
def student(params, steps, start, policy, frames):
    """Rollout, replay and its gradient, as an update of a student has them."""
    origin = Origin(prompts(), start=start)
    made = rollout(NETWORK, params, origin, steps, KEYS, (frames, *PLACE), policy)

    def loss(p):
        x0 = replay(NETWORK, p, made, prompts(), policy).x0
        return (weights(frames) * x0).sum(), x0

    slopes, x0 = jax.grad(loss, has_aux=True)(params)
    return made, x0, slopes


def close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize(
    ("policy", "frames", "start", "steps_of", "first"),
    [
        pytest.param(CYCLIC, 12, 6, (2, 1), None, marks=pytest.mark.slow),
        (BOTH, 8, 4, (2, 1), (4, 2)),
        pytest.param(
            replace(CYCLIC, window=0, sink=0), 12, 3, (4, 2), None, marks=pytest.mark.slow
        ),
        pytest.param(LAST, 9, 0, (4, 3), None, marks=pytest.mark.slow),
        pytest.param(LAST, 9, 0, (4, 0), None, marks=pytest.mark.slow),
        pytest.param(PICTURE, 10, 0, (2, 1), (4, 3), marks=pytest.mark.slow),
        pytest.param(replace(LAST, context="clean"), 9, 0, (1, 0), (4, 3), marks=pytest.mark.slow),
    ],
)
def test_rollout_replay_and_gradient_are_those_of_the_loop(policy, frames, start, steps_of, first):
    made, again, slopes = student(PARAMS, steps(*steps_of, first), start, policy, frames)
    sizes = policy.sizes(frames)
    each = [first or steps_of, *[steps_of] * (len(sizes) - 1)]
    schedules, exits = [grid(k, 5.0) for k, _ in each], [e for _, e in each]
    exit_given, x0, held = slow(policy, sizes, schedules, exits, start)
    close((made.x, made.x0, again), (np.concatenate([x for x, *_ in exit_given], 1), x0, x0))
    close((made.cache.k, made.cache.v), held.all(exit_given[0][2]))
    parts = np.split(weights(frames), np.cumsum(sizes)[:-1], axis=1)
    each = [slope(PARAMS, part, *told) for part, told in zip(parts, exit_given, strict=True)]
    close(slopes, jax.tree.map(lambda *z: sum(z), *each), 1e-4)
    np.testing.assert_array_equal(made.cache.frames, start + np.arange(frames))


def streamed(policy, frames, num_steps, first=0, cues=None, given=None, network=None, params=None):
    sampler = Sampler(num_steps, 5.0, "cm", policy, first)
    told = (cues or {0: Cue(prompts())}, KEYS, (frames, *PLACE), given)
    chunks = generate(sampler, network or NETWORK, params or PARAMS, *told)
    return np.concatenate(list(chunks), axis=1)


@pytest.mark.parametrize("policy", [BOTH, pytest.param(PICTURE, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("first", "num_steps"), [(4, 2), (4, 1)])
def test_a_stream_is_the_loop(policy, first, num_steps):
    frames = 10
    sizes = policy.sizes(frames)
    schedules = [grid(k, 5.0) for k in (first, *(num_steps,) * (len(sizes) - 1))]
    _, x0, _ = slow(policy, sizes, schedules, [len(levels) - 2 for levels in schedules])
    close(streamed(policy, frames, num_steps, first), x0)


def test_under_guidance_each_text_has_the_last_steps_of_its_own_history():
    policy, null, w = LAST, prompts(5), 2.5
    params = GuidedParams(PARAMS, null.text[:1])
    null = null._replace(text=null.text[:1].repeat(2, 0))
    made = streamed(policy, 9, 2, network=Guided(NETWORK, w), params=params)
    texts = [(prompts(), w), (null, 1 - w)]
    _, x0, _ = slow(policy, [3] * 3, [grid(2, 5.0)] * 3, [1] * 3, texts=texts)
    close(made, x0)


@partial(jax.jit, static_argnames="policy")
def two_parts(params, steps, start, policy):
    """Two rollouts of two chunks, the second on what is needed of the first; its replay too."""
    shape = (2 * policy.chunk, *PLACE)
    one = rollout(NETWORK, params, Origin(prompts(), start=start), steps, KEYS, shape, policy)
    origin = Origin(prompts(), trim(one.cache, policy))
    two = rollout(NETWORK, params, origin, steps, KEYS, shape, policy)
    return one.x0, two.x0, replay(NETWORK, params, two, prompts(), policy).x0


def test_a_video_that_goes_on_keeps_its_place_in_the_period():
    one, two, again = two_parts(PARAMS, steps(2, 1), 4, BOTH)
    _, x0, _ = slow(BOTH, [2] * 4, [grid(2, 5.0)] * 4, [1] * 4, start=4)
    close((one, two, again), (x0[:, :4], x0[:, 4:], x0[:, 4:]))


@pytest.mark.slow
def test_at_a_switch_all_frames_are_read_clean_where_they_stand():
    """Where nothing was dropped: what chunks leave that are read one by one under the new text."""
    policy = replace(BOTH, window=0, sink=0)
    made, *_ = student(PARAMS, steps(2, 1), 4, policy, 8)
    switch = jax.jit(lambda cache: recache(NETWORK, PARAMS, cache, prompts(9), policy))
    cond = prompts(9)
    held = Held(policy, 4, [cond])
    for at in range(0, 8, 2):
        told = held.memory(at, 2, cond)
        held.keep(looked(PARAMS, made.x0[:, at : at + 2], 0.0, *told)[1], cond)
    got = switch(made.cache)
    close((got.k, got.v), held.all(cond))


@pytest.mark.slow
def test_given_frames_have_no_step_and_are_read_clean():
    policy = LAST
    first = streamed(policy, 3, 2)
    going = streamed(policy, 9, 2, given=first)
    clean = replace(policy, context="clean")
    np.testing.assert_allclose(going[:, :6], streamed(clean, 6, 2), atol=1e-5)
    assert np.abs(going[:, 3:] - streamed(policy, 9, 2)[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("policy", [replace(BOTH, positions="cyclic", period=4)])
def test_a_long_video_runs_one_program(policy):
    """Longer than there are absolute positions, on as many as a period has."""
    before = streamed(policy, 8, 1, first=2)
    programs = make_chunk.jitted._cache_size()
    longer = streamed(policy, 1032, 1, first=2)
    assert make_chunk.jitted._cache_size() == programs and np.isfinite(longer).all()
    np.testing.assert_array_equal(longer[:, :8], before)


# Who stands where, without a network


@st.composite
def cyclic(draw):
    """A policy with cyclic positions, how many chunks are finished, and the first one's place."""
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    window = draw(st.one_of(st.just(0), st.integers(sink + chunk, sink + chunk + 7)))
    period = chunk * draw(st.integers(1, 4))
    policy = CachePolicy(chunk, chunk, window, sink, "cyclic", period)
    return policy, draw(st.integers(0, 6)), chunk * draw(st.integers(0, 5))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cyclic())
def test_every_frame_stands_at_its_number_modulo_the_period(case):
    """In the plan of all chunks at once, and of the next chunk on a cache that was filled."""
    policy, chunks, start = case
    total = policy.chunk * (chunks + 1)
    numbers, sizes = start + np.arange(total), policy.sizes(total)
    for i, group in enumerate(chunk_groups(policy, sizes, numbers, 0, clean="memory")):
        at, stop = i * policy.chunk, (i + 1) * policy.chunk
        seen = [n for n in range(at) if sees(policy, n, at, stop)]
        there, here = stands(policy, seen, range(at, stop), start)
        np.testing.assert_array_equal(group.query_positions, here)
        np.testing.assert_array_equal(group.key_positions, [*here, *there])
    assert len({*np.asarray(group.query_positions)}) == policy.chunk  # the last one is not torn
    whole = jnp.zeros((1, 1, at, 1, 1, 1))
    frames = jnp.asarray(numbers[:at], jnp.int32)
    cache = KVCache(whole, whole, jnp.zeros((1, at, 1, 1, 1)), frames, at, jnp.int32(start + at))
    cache = trim(cache, policy)
    (next_,) = plan_next_chunk(cache, policy, policy.chunk).groups
    np.testing.assert_array_equal(next_.query_positions, here)
    np.testing.assert_array_equal(next_.key_positions[: int(next_.length)], [*here, *there])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"positions": "cyclic"}, "cyclic positions need a period, such as 21"),
        ({"period": 21}, "others have period=0"),
        ({"positions": "cyclic", "period": 20}, "period=20 must be a multiple of chunk=3"),
        ({"positions": "cyclic", "period": 1026}, "up to 1024"),
        ({"positions": "cyclic", "period": 21, "first": 1}, "first=1 equal to chunk"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(values, told):
    with pytest.raises(ValueError, match=told):
        CachePolicy(**values)


def test_a_cut_is_of_relative_positions_alone():
    with pytest.raises(ValueError, match="set positions to relative"):
        streamed(CYCLIC, 9, 1, cues={0: Cue(prompts()), 3: Cue(prompts(), cut=True)})
