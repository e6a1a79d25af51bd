"""Chunk by chunk: a rollout and its replay against the slow sequential computation, streaming, and
what may carry a gradient."""

from dataclasses import replace
from functools import cache as once
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.schedule import grid
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.kv_cache import append, by_age, plan_next_chunk, take_slots, trim
from salt_jax.models.position_channels import POSITION_CHANNELS
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.visibility import AttentionPlan, QueryGroup
from salt_jax.rollout.causal import Origin, Steps, commit, generate_chunk, recache, rollout
from salt_jax.rollout.parallel import noise_at
from salt_jax.rollout.replay import read_clip, replay
from salt_jax.types import Conditioning
from tests.helpers import randomised, shapes_of

SMALL = WanConfig(48, 2, 2, 64, 4, 4, (1, 2, 2), 16, 4, 32, 0, 1e-6)
NETWORK = wan_denoiser(SMALL, Compute(), 9, 3)
PARAMS = randomised(shapes_of(SMALL), 1)
PLACE = (4, 4, 4)  # rows, columns, channels of a frame
KEYS = jax.random.split(jax.random.key(5), 2)
LONGEST = 8  # updates; shorter schedules are padded to it
SLOTS = 9  # of the memory in the slow computation, whatever the policy keeps

CASES = {  # policy, frames of a clip; each window is short enough to forget something
    "all": (CachePolicy(3, 3, 0, 0, "absolute"), 9),
    "all, relative, picture first": (CachePolicy(3, 1, 0, 0, "relative"), 7),
    "window": (CachePolicy(3, 3, 6, 0, "absolute"), 9),
    "window, relative, frame by frame": (CachePolicy(1, 1, 3, 0, "relative"), 5),
    "sink, picture first": (CachePolicy(3, 1, 7, 1, "absolute"), 10),
    "sink, relative": (CachePolicy(3, 3, 7, 1, "relative"), 12),
}
QUICK = ("window", "sink, picture first")
each_case = pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


def prompts(seed=2):
    drawn = np.random.default_rng(seed).normal(size=(2, 4, 16))
    return Conditioning(jnp.asarray(drawn, jnp.float32))


def levels(num_steps):
    return jnp.asarray(np.pad(grid(num_steps, 5.0), (0, LONGEST - num_steps)))


def steps(num_steps, exit_step, solver="cm"):
    return Steps(levels(num_steps), jnp.int32(exit_step), solver)


def clip(frames, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, frames, *PLACE)), jnp.float32)


def empty(slots):
    return NETWORK.empty_cache(2, slots, PLACE)


def assert_close_to_scale(got, expected, tolerance):
    """Every leaf within `tolerance` of its largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


@partial(jax.jit, static_argnames=("policy", "frames"))
def student(params, cond, steps, keys, weights, policy, frames):
    """The student's side of an update: rollout, replay, gradients of a weighted sum to parameters
    and states.
    """
    made = rollout(NETWORK, params, Origin(cond), steps, keys, (frames, *PLACE), policy)

    def loss(params, x):
        x0 = replay(NETWORK, params, made._replace(x=x), cond, policy).x0
        return (weights * x0).sum(), x0

    slopes, x0 = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, made.x)
    return made, x0, *slopes


def run(case, exit_step, num_steps=4, weights=None, student=student):
    policy, frames = CASES[case]
    weights = clip(frames, seed=11) if weights is None else weights
    given = steps(num_steps, exit_step)
    return student(PARAMS, prompts(), given, KEYS, weights, policy, frames)


run_once = once(run)


# The slow computation. Its memory has the same size under all policies: three programs serve all
# tests.


@partial(jax.jit, static_argnames=("size", "policy"))
def seen(cache, size, policy):
    """What `plan_next_chunk` gives, as arrays, with more empty slots behind."""
    plan = plan_next_chunk(cache, policy, size)
    (group,), more = plan.groups, SLOTS - plan.memory.k.shape[2]
    room = lambda z: jnp.pad(z, [(0, more if axis == 2 else 0) for axis in range(z.ndim)])
    return (
        jax.tree.map(room, plan.memory),
        group.query_positions,
        jnp.pad(group.key_positions, (0, more)),
        group.length,
        plan.frames,
    )


def to_plan(memory, here, there, length, frames):
    own = slice(0, len(here))
    return AttentionPlan(
        (QueryGroup(own, (own,), (slice(0, SLOTS),), here, there, length),), memory, frames
    )


def estimate(params, x, sigma, cond, given):
    return NETWORK.denoise(params, x, jnp.full(2, sigma), cond, to_plan(*given)).x0


clean_estimate = jax.jit(estimate)


@jax.jit
def slope(params, x, sigma, cond, given, weights):
    return jax.grad(lambda params: (weights * estimate(params, x, sigma, cond, given)).sum())(
        params
    )


@jax.jit
def read(params, x0, cond, given):
    return NETWORK.keys_values(params, x0, cond, to_plan(*given))


remember = jax.jit(append, static_argnames="policy")
noise = jax.jit(lambda sigma, frames: noise_at(KEYS, sigma, frames, PLACE))


def slow_chunk(cache, cond, sigmas, exit_step, size, policy, solver="cm"):
    """The next chunk in a loop over its updates: its state before the exit step, what that said,
    what it saw.
    """
    given, numbers = seen(cache, size, policy), int(cache.end) + jnp.arange(size)
    x = noise(sigmas[0], numbers)
    for i in range(exit_step):
        now, after = float(sigmas[i]), float(sigmas[i + 1])
        x0 = clean_estimate(PARAMS, x, now, cond, given)
        fresh = noise(sigmas[i + 1], numbers)
        x = (
            x - (now - after) * (x - x0) / now
            if solver == "euler"
            else (1 - after) * x0 + after * fresh
        )
    return x, clean_estimate(PARAMS, x, float(sigmas[exit_step]), cond, given), given


def slow_commit(cache, x0, cond, policy):
    return remember(
        cache, read(PARAMS, x0, cond, seen(cache, x0.shape[1], policy)), x0, policy=policy
    )


def slow_video(case, exit_step, weights):
    """All chunks on a cache that keeps only what the policy needs; the gradient is summed over
    chunks, each reading the cache as a constant."""
    policy, frames = CASES[case]
    cache, start, parts, total = empty(policy.capacity(frames)), 0, [], None
    for size in policy.sizes(frames):
        x, x0, given = slow_chunk(cache, prompts(), grid(4, 5.0), exit_step, size, policy)
        part = slope(
            PARAMS, x, grid(4, 5.0)[exit_step], prompts(), given, weights[:, start : start + size]
        )
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        cache, start = slow_commit(cache, x0, prompts(), policy), start + size
        parts.append((x, x0))
    x, x0 = (jnp.concatenate(z, axis=1) for z in zip(*parts, strict=True))
    return x, x0, total


def slow_fill(policy, x0, cond, slots):
    cache, start = empty(slots), 0
    for size in policy.sizes(x0.shape[1]):
        cache, start = slow_commit(cache, x0[:, start : start + size], cond, policy), start + size
    return cache


@each_case
@pytest.mark.parametrize("exit_step", [0, 2])
def test_replay_says_what_the_rollout_said(case, exit_step):
    frames = CASES[case][1]
    made, again, *_ = run_once(case, exit_step)
    np.testing.assert_allclose(again, made.x0, atol=1e-5)
    np.testing.assert_array_equal(made.sigma, np.full((2, frames), grid(4, 5.0)[exit_step]))
    np.testing.assert_array_equal(made.cache.x0, made.x0)
    np.testing.assert_array_equal(made.cache.frames, np.arange(frames))
    assert made.cache.filled == made.cache.end == frames
    assert np.std(made.x0) > 0.1


@each_case
@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradients_are_those_of_the_sequential_computation(case, exit_step):
    """So are the videos."""
    made, _, got, _ = run_once(case, exit_step)
    x, x0, expected = slow_video(case, exit_step, clip(CASES[case][1], seed=11))
    np.testing.assert_allclose(made.x, x, atol=1e-5)
    np.testing.assert_allclose(made.x0, x0, atol=1e-5)
    assert_close_to_scale(got, expected, 1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


def test_a_traced_exit_update_gives_what_a_static_one_gives():
    policy, frames = CASES["window"]
    origin, given, shape = Origin(prompts()), Steps(levels(4), 2, "cm"), (frames, *PLACE)
    static = jax.jit(lambda params: rollout(NETWORK, params, origin, given, KEYS, shape, policy).x0)
    np.testing.assert_allclose(static(PARAMS), run_once("window", 2)[0].x0, atol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param("all", marks=pytest.mark.slow), "sink, picture first"]
)
def test_no_gradient_crosses_from_chunk_to_chunk(case):
    """What a chunk says depends on its own noisy state alone, exactly."""
    policy, frames = CASES[case]
    stops = np.cumsum(policy.sizes(frames))
    for size, stop in zip(policy.sizes(frames), stops, strict=True):
        chosen = (np.arange(frames) >= stop - size) & (np.arange(frames) < stop)
        weights = clip(frames, seed=11) * chosen[:, None, None, None][None]
        to_states = run(case, 2, weights=weights)[3]
        np.testing.assert_array_equal(np.abs(to_states).max(axis=(0, 2, 3, 4)) > 0, chosen)


def test_a_trajectory_carries_no_gradient():
    """To nothing that it was made of.

    A traced exit step, which has no reverse mode, is no obstacle.
    """
    policy, frames = CASES["sink, picture first"]

    def total(params, cond, sigmas, exit_step):
        given, shape = Steps(sigmas, exit_step, "cm"), (frames, *PLACE)
        made = rollout(NETWORK, params, Origin(cond), given, KEYS, shape, policy)
        floats = (made.x, made.sigma, made.x0, made.cache.k, made.cache.v, made.cache.x0)
        return sum((z**2).sum() for z in floats)

    slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(PARAMS, prompts(), levels(4), 2)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_the_first_chunk_may_have_a_schedule_of_its_own():
    policy, shape = CASES["all"][0], (9, *PLACE)

    @jax.jit
    def both(params, exit_step, first_exit):
        given = Steps(levels(2), exit_step, "cm", Steps(levels(8), first_exit, "cm"))
        made = rollout(NETWORK, params, Origin(prompts()), given, KEYS, shape, policy)
        return made, replay(NETWORK, params, made, prompts(), policy).x0

    made, again = both(PARAMS, 1, 3)
    cache = empty(9)
    for num_steps, exit_step in ((8, 3), (2, 1), (2, 1)):
        part = slice(int(cache.end), int(cache.end) + 3)
        x, x0, _ = slow_chunk(cache, prompts(), grid(num_steps, 5.0), exit_step, 3, policy)
        np.testing.assert_allclose(made.x[:, part], x, atol=1e-5)
        np.testing.assert_allclose(again[:, part], x0, atol=1e-5)
        np.testing.assert_array_equal(
            made.sigma[:, part], np.full((2, 3), grid(num_steps, 5.0)[exit_step])
        )
        cache = slow_commit(cache, x0, prompts(), policy)
    np.testing.assert_allclose(again, made.x0, atol=1e-5)


@pytest.mark.slow
def test_replay_says_what_the_rollout_said_with_position_channels():
    """Both tell each frame its own number, also those past the clip that the network was made
    for.
    """
    config = WanConfig(**{**SMALL.__dict__, "in_channels": 4 + POSITION_CHANNELS})
    network = wan_denoiser(config, Compute(), 6, 3)
    params = randomised(shapes_of(config), 1)
    policy = CachePolicy(3, 3, 6, 0, "relative")

    @jax.jit
    def both(params):
        origin, given = Origin(prompts()), Steps(levels(2), 1, "cm")
        made = rollout(network, params, origin, given, KEYS, (12, *PLACE), policy)
        return made.x0, replay(network, params, made, prompts(), policy).x0

    said, again = both(params)
    np.testing.assert_allclose(again, said, atol=1e-5)


@partial(jax.jit, static_argnames=("size", "policy"))
def streamed(params, cache, cond, steps, keys, size, policy):
    """The next chunk: its state before the exit step, what that said, and the cache with it."""
    plan = plan_next_chunk(cache, policy, size)
    x, x0, _ = generate_chunk(NETWORK, params, plan, cond, steps, keys, PLACE)
    return x, x0, commit(NETWORK, params, cache, x0, cond, policy)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("window, relative, frame by frame", marks=pytest.mark.slow),
        "sink, picture first",
        pytest.param("sink, relative", marks=pytest.mark.slow),
    ],
)
def test_streaming_on_a_cache_that_forgets_gives_the_rollouts_chunks(case):
    policy, frames = CASES[case]
    made = run_once(case, 3)[0]
    cache, parts = empty(policy.capacity(frames)), []
    assert cache.slots < frames
    for size in policy.sizes(frames):
        _, x0, cache = streamed(PARAMS, cache, prompts(), steps(4, 3), KEYS, size, policy)
        parts.append(x0)
    np.testing.assert_allclose(np.concatenate(parts, 1), made.x0, atol=1e-5)
    cache = take_slots(cache, by_age(cache))
    slots = np.r_[: policy.sink, frames - cache.slots + policy.sink : frames]
    np.testing.assert_array_equal(cache.frames, slots)
    assert_close_to_scale(
        (cache.k, cache.v), (made.cache.k[:, :, slots], made.cache.v[:, :, slots]), 1e-5
    )


@partial(jax.jit, static_argnames=("policy", "first", "more", "cut"))
def in_two_parts(params, cond, steps, keys, policy, first, more, cut):
    """Two rollouts, the second on the cache of the first, or on what of it is needed (`cut`); its
    replay too.
    """
    one = rollout(NETWORK, params, Origin(cond), steps, keys, (first, *PLACE), policy)
    cache = trim(one.cache, policy) if cut else one.cache
    two = rollout(NETWORK, params, Origin(cond, cache), steps, keys, (more, *PLACE), policy)
    return one.x0, two, replay(NETWORK, params, two, cond, policy).x0


@pytest.mark.parametrize(
    ("case", "more", "cut"),
    [
        ("window", 3, True),
        ("sink, picture first", 6, False),
        pytest.param("sink, relative", 6, True, marks=pytest.mark.slow),
    ],
)
def test_a_rollout_that_goes_on_equals_one_long_rollout(case, more, cut):
    policy, frames = CASES[case]
    long, first = run_once(case, 2)[0], frames - more
    one, two, again = in_two_parts(PARAMS, prompts(), steps(4, 2), KEYS, policy, first, more, cut)
    np.testing.assert_allclose(one, long.x0[:, :first], atol=1e-5)
    np.testing.assert_allclose(two.x0, long.x0[:, first:], atol=1e-5)
    np.testing.assert_allclose(again, two.x0, atol=1e-5)
    np.testing.assert_array_equal(two.cache.frames[-more:], np.arange(first, frames))
    assert two.before == (policy.capacity(first) if cut else first) and two.cache.end == frames


def test_frames_that_do_not_split_into_chunks_are_named():
    policy = CASES["all, relative, picture first"][0]
    roll = lambda frames, cache: jax.eval_shape(
        lambda: rollout(
            NETWORK, PARAMS, Origin(prompts(), cache), steps(4, 0), KEYS, (frames, *PLACE), policy
        )
    )
    with pytest.raises(
        ValueError, match="6 latent frames do not split into a chunk of 1 and chunks of 3"
    ):
        roll(6, None)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        roll(4, empty(4))


@each_case
def test_reading_a_clip_equals_committing_its_chunks(case):
    policy, frames = CASES[case]
    frames = min(frames, 7 if policy.first == 1 else SLOTS)
    x0 = clip(frames)
    cache = slow_fill(policy, x0, prompts(), policy.capacity(frames))
    k, v = jax.jit(partial(read_clip, NETWORK, policy=policy))(PARAMS, x0, prompts())
    kept = np.asarray(cache.frames)
    assert_close_to_scale((k[:, :, kept], v[:, :, kept]), (cache.k, cache.v), 1e-5)
    np.testing.assert_array_equal(cache.x0, x0[:, kept])


read_again = jax.jit(
    lambda cache, cond, policy: recache(NETWORK, PARAMS, cache, cond, policy),
    static_argnames="policy",
)


@pytest.mark.parametrize(
    "policy",
    [
        CachePolicy(3, 3, 0, 0, "absolute"),
        CachePolicy(3, 1, 0, 0, "relative"),
        CachePolicy(3, 3, 12, 3, "relative"),
        CachePolicy(1, 1, 5, 1, "absolute"),
    ],
    ids=lambda p: f"chunk {p.chunk} first {p.first} window {p.window} sink {p.sink} {p.positions}",
)
def test_recache_reads_what_commits_under_the_new_text_would_have_read(policy):
    """As long as nothing was forgotten. Under the old text it changes nothing."""
    slots = policy.capacity(9 if policy.first == 3 else 7)
    x0 = clip(slots)
    cache = slow_fill(policy, x0, prompts(), slots)
    assert_close_to_scale(read_again(cache, prompts(), policy), cache, 1e-5)
    switched = read_again(cache, prompts(9), policy)
    assert_close_to_scale(switched, slow_fill(policy, x0, prompts(9), slots), 1e-5)
    assert np.abs(switched.k[1] - cache.k[1]).max() > 1e-2  # keys of the first layer know no text


def test_recache_reads_the_sink_too_and_is_causal():
    """After frames were forgotten: slots hold the sink, then the last chunks."""
    policy, x0 = CachePolicy(3, 3, 12, 3, "relative"), clip(15)
    cache = slow_fill(policy, x0, prompts(), 9)
    np.testing.assert_array_equal(cache.frames, [0, 1, 2, 9, 10, 11, 12, 13, 14])
    switched = read_again(cache, prompts(9), policy)
    fresh = slow_fill(policy, x0[:, :3], prompts(9), 9)
    for ours, theirs, old in ((switched.k, fresh.k, cache.k), (switched.v, fresh.v, cache.v)):
        np.testing.assert_allclose(ours[:, :, :3], theirs[:, :, :3], atol=1e-5)
        assert np.abs(ours[1, :, :3] - old[1, :, :3]).max() > 1e-2
        assert np.abs(ours).max(axis=(0, 1, 3, 4, 5)).min() > 0.1
    other = read_again(replace(cache, x0=cache.x0.at[:, -1].add(1.0)), prompts(9), policy)
    moved = np.abs(other.v - switched.v).max(axis=(0, 1, 3, 4, 5))
    np.testing.assert_array_equal(moved > 0, np.arange(9) >= 6)  # its own chunk sees it


def test_recache_never_sees_an_empty_slot():
    """A cache that is still filling, whose slots are not those of whole chunks from its end."""
    policy, x0 = CachePolicy(3, 1, 9, 1, "relative"), clip(4)
    cache = slow_fill(policy, x0, prompts(), policy.capacity(4))
    assert cache.slots == 6 and cache.filled == 4
    said = [
        read_again(replace(cache, x0=cache.x0.at[:, 4:].set(z)), prompts(9), policy)
        for z in (0.0, 5.0)
    ]
    for name in ("k", "v"):
        ours, theirs = (getattr(z, name)[:, :, :4] for z in said)
        np.testing.assert_array_equal(ours, theirs)


def test_one_program_serves_all_exit_updates_and_schedules():
    """Levels are padded, the exit step is traced.

    What stands behind the exit step is not looked at.
    """
    policy, frames = CASES["window"]
    traced_once = chex.assert_max_traces(student.__wrapped__, n=1)
    one = jax.jit(traced_once, static_argnames=("policy", "frames"))
    said = {(1, 0): run("window", 0, 1, student=one)[1]}
    for num_steps in (2, 4, 8):
        for exit_step in (0, num_steps // 2, num_steps - 1):
            said[num_steps, exit_step] = run("window", exit_step, num_steps, student=one)[1]
    for num_steps in (2, 4, 8):  # all start at noise level 1
        np.testing.assert_array_equal(said[num_steps, 0], said[1, 0])
    assert len({np.asarray(x0).tobytes() for x0 in said.values()}) == len(said) - 3
    behind = levels(4).at[3:].set(0.123)
    weights = clip(frames, seed=11)
    given = Steps(behind, jnp.int32(2), "cm")
    again = one(PARAMS, prompts(), given, KEYS, weights, policy, frames)[1]
    np.testing.assert_array_equal(again, said[4, 2])


def test_noise_does_not_know_chunks():
    """The noise of a frame is that of its number, alone or beside others."""
    together = noise(0.9375, jnp.arange(9))
    for chunk in (1, 3):
        parts = [noise(0.9375, jnp.arange(i, i + chunk)) for i in range(0, 9, chunk)]
        np.testing.assert_array_equal(np.concatenate(parts, 1), together)
    assert len(np.unique(np.asarray(together)[..., 0, 0, 0])) == 18


@each_case
def test_rollouts_of_all_policies_start_on_the_noise_of_their_frames(case):
    made = run_once(case, 0)[0]
    np.testing.assert_allclose(made.x, noise(1.0, jnp.arange(CASES[case][1])), atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_updates_on_a_cache_are_those_of_a_slow_loop(solver):
    """The second chunk, in 1, 2 and 8 updates; each reads the first as it was committed."""
    policy = CASES["window"][0]
    cache = slow_commit(empty(3), clip(3), prompts(), policy)
    for num_steps in (1, 2, 8):
        x, x0, _ = slow_chunk(
            cache, prompts(), grid(num_steps, 5.0), num_steps - 1, 3, policy, solver
        )
        given = steps(num_steps, num_steps - 1, solver)
        got_x, got_x0, after = streamed(PARAMS, cache, prompts(), given, KEYS, 3, policy)
        np.testing.assert_allclose(got_x, x, atol=1e-5)
        np.testing.assert_allclose(got_x0, x0, atol=1e-5)
        np.testing.assert_array_equal(after.frames, [3, 4, 5])
