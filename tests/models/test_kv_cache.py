"""The cache against a plain list, and chunks that read it against diffusers' network under a dense
mask.
"""

from dataclasses import replace
from functools import cache as once
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.attention import attention
from salt_jax.models.cache_policy import MAX_FRAMES, CachePolicy, refuse_overflow
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.kv_cache import (
    KVCache,
    append,
    by_age,
    flush,
    grow,
    plan_next_chunk,
    take_slots,
    trim,
)
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.rope import rope_angles
from salt_jax.models.visibility import AttentionPlan, KeysValues, QueryGroup, chunk_groups
from salt_jax.rollout.causal import Trajectory, commit
from salt_jax.rollout.replay import plan_diffusion_forcing, plan_teacher_forcing, replay
from salt_jax.types import Conditioning
from tests.helpers import close, diffusers_sizes, randomised, shapes_of, to_diffusers

SMALL = WanConfig(48, 2, 2, 64, 4, 4, (1, 2, 2), 16, 4, 32, 0, 1e-6)
NETWORK = wan_denoiser(SMALL, Compute(), 9, 3)
PARAMS = randomised(shapes_of(SMALL), 1)
PLACE = (4, 6, 4)  # rows, columns, channels of a frame
TOKENS = 6  # of a frame


def sees(policy, frame, end):
    """The peers' rule: may a chunk that ends at frame `end` see that frame?"""
    return frame < end and (
        not policy.window or frame >= end - (policy.window - policy.sink) or frame < policy.sink
    )


def policies(longest):
    """All valid ones with chunks and windows up to a length."""
    for chunk, first, sink, window in product(range(1, 5), range(1, 5), range(4), range(longest)):
        if first <= chunk and (not window or window >= sink + chunk):
            yield CachePolicy(chunk, first, window, sink, "absolute")


# The policy.


def test_visible_is_the_peers_rule():
    for policy in policies(10):
        start = 0
        for stop in np.cumsum(policy.sizes(policy.first + 7 * policy.chunk)).tolist():
            given = [frame for part in policy.visible(start, stop) for frame in range(stop)[part]]
            assert given == [f for f in range(start) if sees(policy, f, stop)], (policy, start)
            start = stop


def test_sizes_are_a_first_chunk_and_equal_ones():
    policy = lambda chunk, first: CachePolicy(chunk, first, 0, 0, "absolute")
    assert policy(3, 3).sizes(9) == (3, 3, 3)
    assert policy(3, 1).sizes(7) == (1, 3, 3)
    assert policy(1, 1).sizes(3) == (1, 1, 1)
    assert policy(3, 1).sizes(1) == (1,)
    assert policy(3, 1).sizes(6, before=7) == (3, 3)
    with pytest.raises(
        ValueError, match="8 latent frames do not split into a chunk of 1 and chunks of 3"
    ):
        policy(3, 1).sizes(8)
    with pytest.raises(ValueError, match="2 latent frames do not split into a chunk of 3"):
        policy(3, 3).sizes(2)
    with pytest.raises(ValueError, match="4 latent frames do not split"):
        policy(3, 1).sizes(4, before=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, 4, 0, 0), "first=4 must be between 1 and chunk=3"),
        ((3, -1, 0, 0), "first=-1 must be between 1 and chunk=3"),
        ((0, 0, 0, 0), "first=0 must be between 1 and chunk=0"),
        ((3, 3, 0, -1), "sink=-1"),
        ((3, 3, 5, 3), "window=5 must be 0 .* or hold sink=3 and chunk=3"),
        ((3, 3, 2, 0), "window=2"),
    ],
)
def test_policies_that_cannot_work_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        CachePolicy(*values, "absolute")


def test_capacity_is_what_the_next_chunk_may_see():
    assert CachePolicy(3, 3, 0, 0, "absolute").capacity(21) == 21
    assert CachePolicy(3, 3, 12, 3, "absolute").capacity(240) == 9
    assert CachePolicy(3, 3, 6, 1, "absolute").capacity(240) == 3


def test_a_video_too_long_for_its_cache_or_its_positions_is_refused():
    everything, window = CachePolicy(3, 3, 0, 0, "relative"), CachePolicy(3, 3, 6, 0, "absolute")
    refuse_overflow(everything, 9, 9)
    refuse_overflow(window, 3, MAX_FRAMES)
    refuse_overflow(replace(window, positions="relative"), 3, 10 * MAX_FRAMES)
    with pytest.raises(
        ValueError,
        match="12 latent frames do not fit a cache of 9 that forgets nothing; set a window",
    ):
        refuse_overflow(everything, 9, 12)
    with pytest.raises(
        ValueError, match=f"{MAX_FRAMES + 2} .* {MAX_FRAMES} absolute positions; set positions"
    ):
        refuse_overflow(window, 3, MAX_FRAMES + 2)


# The cache.


def blank(slots, garbage=-7.0):
    return KVCache(
        k=jnp.full((1, 1, slots, 1, 1, 1), garbage),
        v=jnp.full((1, 1, slots, 1, 1, 1), garbage),
        x0=jnp.full((1, slots, 1, 1, 1), garbage),
        frames=jnp.full(slots, int(garbage), jnp.int32),
        filled=jnp.int32(0),
        end=jnp.int32(0),
    )


def content(frames):
    """Keys and values, and x0, that tell which frame they are of."""
    n = jnp.asarray(frames, jnp.float32)
    k, v = ((n + more).reshape(1, 1, -1, 1, 1, 1) for more in (0.25, 0.5))
    return KeysValues(k, v), (n + 0.75).reshape(1, -1, 1, 1, 1)


remember = jax.jit(append, static_argnames="policy")


def assert_holds(cache, frames, end):
    """The filled slots hold these frames, with what belongs to them; oldest first by `by_age`."""
    filled, cache = len(frames), take_slots(cache, by_age(cache))
    (k, v), x0 = content(frames)
    assert cache.filled == filled and cache.end == end
    np.testing.assert_array_equal(cache.frames[:filled], frames)
    np.testing.assert_array_equal(cache.k[:, :, :filled], k)
    np.testing.assert_array_equal(cache.v[:, :, :filled], v)
    np.testing.assert_array_equal(cache.x0[:, :filled], x0)


def listed(memory, new, slots, sink):
    """A cache as a list: the oldest frame after the sink goes first."""
    memory = [*memory, *new]
    while len(memory) > slots:
        del memory[sink]
    return memory


@pytest.mark.parametrize(
    ("policy", "slots", "chunks"),
    [
        (CachePolicy(3, 3, 12, 3, "absolute"), 9, 40),  # LongLive
        (CachePolicy(3, 3, 6, 1, "absolute"), 3, 8),  # Infinity-RoPE
        (CachePolicy(3, 3, 5, 1, "absolute"), 2, 8),  # holds less than a chunk
        (CachePolicy(3, 3, 4, 1, "absolute"), 1, 5),  # the sink alone
        (CachePolicy(3, 3, 3, 0, "absolute"), 0, 3),  # nothing
        (CachePolicy(3, 1, 7, 0, "absolute"), 4, 8),
        (CachePolicy(3, 1, 6, 3, "absolute"), 3, 5),  # the sink fills in the second chunk
        (CachePolicy(1, 1, 4, 2, "absolute"), 3, 9),
        (CachePolicy(3, 3, 6, 1, "absolute"), 7, 8),  # more room than it needs
        (CachePolicy(3, 1, 0, 0, "absolute"), 13, 5),  # forgets nothing
        (CachePolicy(2, 2, 0, 1, "absolute"), 12, 6),
    ],
)
def test_appending_is_that_of_a_list(policy, slots, chunks):
    cache, memory, start = blank(slots), [], 0
    for size in policy.sizes(policy.first + (chunks - 1) * policy.chunk):
        new = range(start, start + size)
        cache = remember(cache, *content(new), policy=policy)
        memory, start = listed(memory, new, slots, policy.sink), start + size
        assert_holds(cache, memory, start)


def test_a_full_cache_writes_over_its_oldest_frames_and_moves_nothing():
    policy = CachePolicy(3, 3, 12, 3, "absolute")
    cache = blank(9)
    for start in range(0, 24, 3):
        cache = remember(cache, *content(range(start, start + 3)), policy=policy)
    np.testing.assert_array_equal(cache.frames, [0, 1, 2, 21, 22, 23, 18, 19, 20])
    compiled = remember.lower(cache, *content(range(24, 27)), policy=policy).compile().as_text()
    assert "dynamic-update-slice" in compiled and " gather(" not in compiled


@pytest.mark.parametrize("more_slots", [0, 4])
def test_looking_back_gives_the_frames_of_the_rule(more_slots):
    """On caches that just suffice and on larger ones.

    The chunk comes first, empty slots last and uncounted.
    """
    for values, positions in product([(3, 1, 7, 1), (1, 1, 3, 0)], ("absolute", "relative")):
        policy = CachePolicy(*values, positions)
        cache, start = blank(policy.capacity(0) + more_slots), 0
        for size in policy.sizes(policy.first + 5 * policy.chunk):
            plan = plan_next_chunk(cache, policy, size)
            (group,) = plan.groups
            seen = [f for f in range(start) if sees(policy, f, start + size)]
            counted = int(group.length) - size
            assert counted == len(seen)
            age = np.argsort(plan.memory.k.ravel()[:counted])  # slots stand in any order
            for read, kept in zip(plan.memory, content(seen)[0], strict=True):
                np.testing.assert_array_equal(read.ravel()[:counted][age], kept.ravel())
            np.testing.assert_array_equal(plan.frames, np.arange(start, start + size))
            here = np.arange(size) + (start if positions == "absolute" else counted)
            there = seen if positions == "absolute" else np.arange(counted)
            np.testing.assert_array_equal(group.query_positions, here)
            found = group.key_positions[: int(group.length)]
            np.testing.assert_array_equal([*found[:size], *found[size:][age]], [*here, *there])
            cache = remember(cache, *content(range(start, start + size)), policy=policy)
            start += size


def full_cache(policy, frames):
    """One that has seen so many frames and kept all."""
    everything, cache = replace(policy, window=0), blank(frames)
    return remember(cache, *content(range(frames)), policy=everything)


@pytest.mark.parametrize(
    ("window", "sink", "frames"),
    [(12, 3, 21), (6, 1, 9), (6, 0, 6), (3, 0, 6), (0, 0, 9), (0, 2, 9)],
)
def test_forgetting_keeps_the_sink_and_the_end(window, sink, frames):
    policy = CachePolicy(3, 3, window, sink, "absolute")
    cut = trim(full_cache(policy, frames), policy)
    assert cut.slots == policy.capacity(frames)
    assert_holds(cut, listed([], range(frames), cut.slots, sink), frames)


@pytest.mark.parametrize(
    ("window", "sink", "frames"), [(12, 3, 6), (12, 0, 3), (9, 5, 3), (9, 3, 6)]
)
def test_forgetting_leaves_a_short_cache_as_it_is(window, sink, frames):
    """One with no more frames than the next chunk may see."""
    policy = CachePolicy(3, 3, window, sink, "absolute")
    assert_holds(trim(full_cache(policy, frames), policy), range(frames), frames)


@pytest.mark.parametrize("sink", [0, 1])
def test_flushing_keeps_the_sink_and_the_last_frames(sink):
    """What is left goes on as a cache that never held the rest."""
    policy, cache = CachePolicy(3, 3, 9 + sink, sink, "absolute"), blank(6 + sink)
    for start in range(0, 12, 3):
        cache = remember(cache, *content(range(start, start + 3)), policy=policy)
    cache = jax.jit(lambda cache: flush(cache, policy, 2))(cache)
    memory = [*range(sink), 10, 11]
    assert_holds(cache, memory, 12)
    for start in (12, 15):
        new = range(start, start + 3)
        cache, memory = (
            remember(cache, *content(new), policy=policy),
            listed(memory, new, 6 + sink, sink),
        )
        assert_holds(cache, memory, start + 3)


@pytest.mark.parametrize(("sink", "frames"), [(0, 1), (1, 1), (1, 2), (2, 3), (1, 3)])
def test_flushing_a_cache_with_little_in_it_keeps_that(sink, frames):
    policy, cache = CachePolicy(1, 1, 6, sink, "absolute"), blank(5)
    for frame in range(frames):
        cache = remember(cache, *content([frame]), policy=policy)
    assert_holds(flush(cache, policy, 2), range(frames), frames)


def test_more_room_is_behind():
    policy = CachePolicy(3, 3, 0, 0, "absolute")
    cache = grow(full_cache(policy, 6), blank(9))
    assert cache.slots == 9
    assert_holds(cache, range(6), 6)
    assert_holds(remember(cache, *content(range(6, 9)), policy=policy), range(9), 9)


def test_views_of_a_clip_that_goes_on_are_those_of_the_long_clip():
    """After `forget`, slots are not frame numbers; what is seen is the same frames at the same
    positions.
    """
    for positions in ("absolute", "relative"):
        policy = CachePolicy(3, 3, 7, 1, positions)
        long = chunk_groups(policy, policy.sizes(15), np.arange(15), 0, clean="memory")[3:]
        slots = np.array([0, 6, 7, 8, *range(9, 15)])
        for ours, theirs in zip(
            chunk_groups(policy, (3, 3), slots, 4, clean="memory"), long, strict=True
        ):
            seen = lambda group, numbers: np.concatenate([numbers[part] for part in group.past])
            np.testing.assert_array_equal(seen(ours, slots), seen(theirs, np.arange(15)))
            np.testing.assert_array_equal(ours.key_positions, theirs.key_positions)
            np.testing.assert_array_equal(ours.query_positions, theirs.query_positions)


# Attention and positions.


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_attention_to_a_length_is_attention_to_the_keys_in_front():
    """Whatever stands behind, bit for bit."""
    q, k, v = normal(2, 5, 2, 8, seed=1), normal(2, 7, 2, 8, seed=2), normal(2, 7, 2, 8, seed=3)
    masked = jax.jit(attention)
    for length in (1, 4, 7):
        behind = (jnp.arange(7) >= length)[None, :, None, None]
        got = masked(q, k, v, jnp.int32(length))
        np.testing.assert_allclose(got, attention(q, k[:, :length], v[:, :length]), atol=1e-6)
        for garbage in (1e4, -1e4):
            other = masked(
                q, jnp.where(behind, garbage, k), jnp.where(behind, garbage, v), jnp.int32(length)
            )
            np.testing.assert_array_equal(other, got)


def test_angles_of_traced_frames_are_those_of_static_ones():
    frames = np.array([0, 3, 17, MAX_FRAMES - 1])
    traced = jax.jit(lambda frames: rope_angles(frames, 2, 3, 24))(jnp.asarray(frames))
    for axis, expected in zip(traced, rope_angles(frames, 2, 3, 24), strict=True):
        np.testing.assert_array_equal(axis, expected)


def empty(slots, network=NETWORK):
    return network.empty_cache(2, slots, PLACE)


def clip(frames, seed=3):
    return normal(2, frames, *PLACE, seed=seed)


COND, SIGMA = Conditioning(normal(2, 4, 16, seed=2)), jnp.array([0.9, 0.3])
# of the memory that programs read, whatever the policy keeps: one program then serves all
# policies
SLOTS = 12


@partial(jax.jit, static_argnames=("size", "policy"))
def seen(cache, size, policy, jump):
    """What `plan_next_chunk` gives, as arrays, with more empty slots behind."""
    plan = plan_next_chunk(cache, policy, size, jump)
    (group,), more = plan.groups, SLOTS - plan.memory.k.shape[2]
    room = lambda z: jnp.pad(z, [(0, more if axis == 2 else 0) for axis in range(z.ndim)])
    positions = (group.query_positions, jnp.pad(group.key_positions, (0, more)))
    return jax.tree.map(room, plan.memory), positions, group.length, plan.frames


def to_plan(memory, positions, length, frames):
    own = slice(0, len(frames))
    return AttentionPlan(
        (QueryGroup(own, (own,), (slice(0, SLOTS),), *positions, length),), memory, frames
    )


@jax.jit
def predicted(params, x, sigma, cond, given):
    return NETWORK.denoise(params, x, sigma, cond, to_plan(*given))


@jax.jit
def read(params, x0, cond, given):
    return NETWORK.keys_values(params, x0, cond, to_plan(*given))


def denoise(x, sigma, cond, cache, policy, jump=0):
    """What the network says of the next chunk."""
    return predicted(PARAMS, x, sigma, cond, seen(cache, x.shape[1], policy, jump))


def committed(cache, x0, cond, policy):
    return remember(
        cache, read(PARAMS, x0, cond, seen(cache, x0.shape[1], policy, 0)), x0, policy=policy
    )


def fill(policy, x0, slots):
    """A cache made chunk by chunk."""
    cache, start = empty(slots), 0
    for size in policy.sizes(x0.shape[1]):
        cache, start = committed(cache, x0[:, start : start + size], COND, policy), start + size
    return cache


def test_commit_is_reading_and_appending():
    policy = CachePolicy(3, 3, 7, 1, "relative")
    cache, x0 = fill(policy, clip(6), 4), clip(3, seed=4)
    whole = jax.jit(lambda params, cache: commit(NETWORK, params, cache, x0, COND, policy))(
        PARAMS, cache
    )
    close(whole, committed(cache, x0, COND, policy), atol=1e-5)


def test_what_stands_in_empty_slots_never_matters():
    policy, x, kept = CachePolicy(3, 3, 0, 0, "absolute"), clip(3, seed=4), np.arange(9) < 3
    cache = fill(policy, clip(3), 9)

    def spoilt(garbage, number):
        put = lambda z, axis, with_: jnp.where(
            kept.reshape(-1, *(1,) * (z.ndim - axis - 1)), z, with_
        )
        return replace(
            cache,
            k=put(cache.k, 2, garbage),
            v=put(cache.v, 2, garbage),
            x0=put(cache.x0, 1, garbage),
            frames=put(cache.frames, 0, number),
        )

    said, after = denoise(x, SIGMA, COND, cache, policy).x0, committed(cache, x, COND, policy)
    for garbage, number in ((1e4, 5), (-3.0, 999)):
        other = spoilt(garbage, number)
        np.testing.assert_array_equal(denoise(x, SIGMA, COND, other, policy).x0, said)
        other = committed(other, x, COND, policy)
        np.testing.assert_array_equal(other.k[:, :, :6], after.k[:, :, :6])
        np.testing.assert_array_equal(other.v[:, :, :6], after.v[:, :, :6])


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_only_distances_in_time_matter(positions):
    """Moving the whole video changes nothing: not a bit of relative positions, rounding of absolute
    ones.
    """
    policy, x = CachePolicy(3, 3, 7, 1, positions), clip(3, seed=4)
    cache = fill(policy, clip(9), 4)
    moved = replace(cache, frames=cache.frames + 100, end=cache.end + 100)
    plain, other = (denoise(x, SIGMA, COND, z, policy).x0 for z in (cache, moved))
    np.testing.assert_allclose(other, plain, atol=1e-4 if positions == "absolute" else 0, rtol=0)
    apart = denoise(x, SIGMA, COND, replace(cache, end=cache.end + 100), policy).x0
    assert (np.abs(apart - plain).max() > 1e-3) == (positions == "absolute")


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_jump_moves_the_chunk_away_from_what_it_sees(positions):
    policy, x = CachePolicy(3, 3, 7, 1, positions), clip(3, seed=4)
    cache = fill(policy, clip(9), 4)
    plain, cut = (denoise(x, SIGMA, COND, cache, policy, jump).x0 for jump in (0, 39))
    assert np.abs(cut - plain).max() > 1e-3
    if positions == "absolute":
        later = denoise(x, SIGMA, COND, replace(cache, end=cache.end + 39), policy).x0
        np.testing.assert_array_equal(cut, later)
    alone = [denoise(x, SIGMA, COND, empty(4), policy, jump).x0 for jump in (0, 39)]
    np.testing.assert_allclose(*alone, atol=1e-4)  # nothing to be away from


def test_a_cached_text_gives_what_the_text_gives():
    policy, x = CachePolicy(3, 3, 7, 1, "absolute"), clip(3, seed=4)
    cache = fill(policy, clip(3), 4)
    told = jax.jit(NETWORK.read)(PARAMS, COND)
    close(*(denoise(x, SIGMA, z, cache, policy) for z in (told, COND)))
    ours, theirs = (committed(cache, x, z, policy) for z in (told, COND))
    np.testing.assert_allclose(ours.k, theirs.k, atol=1e-5)


def test_a_bfloat16_cache_gives_nearly_what_a_float32_one_gives():
    policy, x = CachePolicy(3, 3, 7, 1, "relative"), clip(3, seed=4)
    network = wan_denoiser(SMALL, Compute(jnp.bfloat16), 9, 3)

    @jax.jit
    def half(params):
        cache, x0 = empty(4, network), clip(9)
        for start in (0, 3, 6):
            cache = commit(network, params, cache, x0[:, start : start + 3], COND, policy)
        return cache, network.denoise(params, x, SIGMA, COND, plan_next_chunk(cache, policy, 3))

    cache, prediction = half(PARAMS)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16 and cache.x0.dtype == jnp.float32
    assert prediction.velocity.dtype == prediction.x0.dtype == jnp.float32
    expected = denoise(x, SIGMA, COND, fill(policy, clip(9), 4), policy).velocity
    assert 1e-5 < np.abs(prediction.velocity - expected).mean() / np.abs(expected).mean() < 0.03


# Parity with diffusers. Its network sees everything at once; a mask says who sees whom.


CASES = {  # policy, frames of a clip; each window is short enough to forget something
    "all": (CachePolicy(3, 3, 0, 0, "absolute"), 9),
    "all, picture first": (CachePolicy(3, 1, 0, 0, "absolute"), 7),
    "window": (CachePolicy(3, 3, 6, 0, "absolute"), 9),
    "window, frame by frame": (CachePolicy(1, 1, 3, 0, "absolute"), 5),
    "sink": (CachePolicy(3, 3, 7, 1, "absolute"), 12),
    "sink, frame by frame": (CachePolicy(1, 1, 4, 2, "absolute"), 7),
    "sink, picture first": (CachePolicy(3, 1, 7, 1, "absolute"), 10),
    "sink, relative": (CachePolicy(3, 3, 7, 1, "relative"), 12),
    "window, relative, frame by frame": (CachePolicy(1, 1, 3, 0, "relative"), 5),
    "all, cyclic": (CachePolicy(3, 3, 0, 0, "cyclic", 6), 9),
    "sink, cyclic": (CachePolicy(3, 3, 9, 3, "cyclic", 9), 12),
}
SIZES = diffusers_sizes(SMALL)


@once
def oracle():
    """diffusers' network with our parameters."""
    pytest.importorskip("torch")
    model = pytest.importorskip("diffusers").WanTransformer3DModel(**SIZES).eval()
    model.load_state_dict(to_diffusers(PARAMS, SMALL), strict=True)
    return model


def looks(policy, sizes, halves=False):
    """How the frames of [clip], or of the halves [clean clip | noisy clip], look around.

    A list of (which frames look, bool [L, L] who sees whom, int [L] positions in time). One item
    where positions are not relative, which differ from chunk to chunk.
    """
    frames = sum(sizes)
    ends = np.repeat(np.cumsum(sizes), sizes)
    rule = np.array([[sees(policy, k, end) for k in range(frames)] for end in ends])
    own = ends[:, None] == ends[None, :]
    mask = np.block([[rule, False & own], [rule & ~own, own]]) if halves else rule
    if policy.positions != "relative":
        numbers = np.arange(frames) % (policy.period or frames)
        return [(np.ones(len(mask), bool), mask, np.tile(numbers, 1 + halves))]
    items = []
    for end in np.unique(ends):
        rank = np.cumsum(rule[end - 1]) - 1  # invisible frames get one too; nobody asks
        for half in range(1 + halves):
            rows = np.zeros(len(mask), bool)
            rows[half * frames : half * frames + frames] = ends == end
            seen = np.broadcast_to(mask[rows][:1], mask.shape)
            items.append((rows, seen, np.tile(np.maximum(rank, 0), 1 + halves)))
    return items


def masked_oracle(x, sigma, text, items, constant=0):
    """Velocity of diffusers' network, torch [B, L, H, W, C], at one sigma for each frame, under
    dense masks.

    Keys and values of the first `constant` frames carry no gradient.
    """
    import torch
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model = oracle()
    per_token = lambda z, axis=0: torch.tensor(np.repeat(z, TOKENS, axis))
    table = model.rope(torch.zeros(1, 1, 64, *x.shape[2:4]))
    rotary = lambda p: [
        z.reshape(64, TOKENS, -1)[torch.tensor(p)].reshape(1, len(p) * TOKENS, 1, -1) for z in table
    ]
    ready = [
        (
            per_token(rows)[None, :, None],
            per_token(np.repeat(mask, TOKENS, 0), 1)[None, None],
            rotary(positions),
        )
        for rows, mask, positions in items
    ]

    class Masked(WanAttnProcessor):
        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states=None,
            attention_mask=None,
            rotary_emb=None,
        ):
            call = lambda *more: super(Masked, self).__call__(
                attn, hidden_states, encoder_hidden_states, *more
            )
            if encoder_hidden_states is not None:
                return call(None, None)
            return sum(rows * call(mask, rotary) for rows, mask, rotary in ready)

    cut = lambda module, args, out: torch.cat(
        [out[:, : constant * TOKENS].detach(), out[:, constant * TOKENS :]], 1
    )
    hooks = [
        module.register_forward_hook(cut)
        for b in model.blocks
        for module in (b.attn1.norm_k, b.attn1.to_v)
    ]
    for block in model.blocks:
        block.attn1.set_processor(Masked())
        block.attn2.set_processor(WanAttnProcessor())
    timestep = torch.tensor(1000 * np.repeat(sigma, TOKENS, 1), dtype=torch.float32)
    out = model(x.permute(0, 4, 1, 2, 3), timestep, torch.tensor(np.array(text))).sample
    for hook in hooks:
        hook.remove()
    return out.permute(0, 2, 3, 4, 1)


def to_torch(z):
    import torch

    return torch.tensor(np.array(z))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "room"),
    [
        (case, room)
        for case, (policy, _) in CASES.items()
        for room in ("rolling", "all")
        if policy.window or room == "all"
    ],
)
def test_chunks_on_a_cache_equal_the_dense_mask(case, room):
    """Each chunk has noisy passes at several levels before its clean one; clean frames so far | the
    noisy chunk.
    """
    torch = pytest.importorskip("torch")
    policy, frames = CASES[case]
    cache = empty(policy.capacity(frames) if room == "rolling" else frames)
    x0, sizes, start = clip(frames), policy.sizes(frames), 0
    for i, size in enumerate(sizes):
        for seed, level in ((20, 1.0), (21, 0.625)):
            noisy, sigma = clip(size, seed=seed + 10 * i), jnp.array([level, 0.4 * level])
            got = denoise(noisy, sigma, COND, cache, policy)
            levels = np.zeros((2, start + size))
            levels[:, start:] = sigma[:, None]
            sequence = to_torch(jnp.concatenate([x0[:, :start], noisy], 1))
            with torch.no_grad():
                expected = masked_oracle(
                    sequence, levels, COND.text, looks(policy, sizes[: i + 1])
                )[:, start:]
            np.testing.assert_allclose(got.velocity, expected, atol=2e-5)
        assert np.std(got.velocity) > 0.05
        cache = committed(cache, x0[:, start : start + size], COND, policy)
        start += size


def assert_same_gradients(got, model, tolerance):
    """Every tensor within `tolerance` of its largest entry; and not zero."""
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, ours in to_diffusers(got, SMALL).items():
        theirs = expected.pop(name)
        assert theirs.abs().max() > 0, name
        gap = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert gap < tolerance, f"{name}: {gap}"
    assert not expected


@pytest.mark.parity
@pytest.mark.parametrize("case", ["sink, picture first", "window, relative, frame by frame"])
def test_replay_has_the_gradients_of_the_dense_mask(case):
    """Sequence [clean | noisy]: a noisy chunk sees itself and the clean frames before it, whose
    keys and values are constants, as are the entries of our cache. Gradients to all parameters and
    to the noisy frames, and the values.
    """
    pytest.importorskip("torch")
    policy, frames = CASES[case]
    x0, noisy, weights = clip(frames), clip(frames, seed=6), clip(frames, seed=7)
    levels = np.linspace(1.0, 0.2, 2 * frames).reshape(2, frames).astype(np.float32)
    cache = fill(policy, x0, frames)

    @jax.jit
    def slopes(params, noisy, cache):
        def loss(params, noisy):
            made = Trajectory(noisy, jnp.asarray(levels), x0, cache)
            velocity = replay(NETWORK, params, made, COND, policy).velocity
            return (weights * velocity).sum(), velocity

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, noisy)

    (to_params, to_noisy), velocity = slopes(PARAMS, noisy, cache)
    expected, noisy = backward(policy, x0, noisy, levels, weights, constant=frames)
    np.testing.assert_allclose(velocity, expected, atol=2e-5)
    np.testing.assert_allclose(to_noisy, noisy.grad, atol=1e-4 * noisy.grad.abs().max())
    assert_same_gradients(to_params, oracle(), 1e-4)


def backward(policy, x0, noisy, levels, weights, constant):
    """The oracle on [clean | noisy]; leaves gradients of the weighted noisy half in its parameters
    and in `noisy`.
    """
    model, frames = oracle(), x0.shape[1]
    model.zero_grad()
    import torch

    noisy = to_torch(noisy).requires_grad_()
    both = np.concatenate([np.zeros((2, frames)), levels], 1)
    out = masked_oracle(
        torch.cat([to_torch(x0), noisy], 1),
        both,
        COND.text,
        looks(policy, policy.sizes(frames), halves=True),
        constant,
    )[:, frames:]
    (to_torch(weights) * out).sum().backward()
    return out.detach(), noisy


@pytest.mark.parity
@pytest.mark.parametrize("case", ["all, picture first", "sink, relative", "sink, cyclic"])
def test_teacher_forcing_equals_the_dense_mask(case):
    """As above, with gradient through the clean half too."""
    pytest.importorskip("torch")
    policy, frames = CASES[case]
    x0, noisy, weights = clip(frames), clip(frames, seed=6), clip(frames, seed=7)
    levels = np.linspace(1.0, 0.2, 2 * frames).reshape(2, frames).astype(np.float32)

    @jax.jit
    def slopes(params):
        def loss(params):
            plan = plan_teacher_forcing(NETWORK, params, x0, COND, policy)
            velocity = NETWORK.denoise(params, noisy, jnp.asarray(levels), COND, plan).velocity
            return (weights * velocity).sum(), velocity

        return jax.grad(loss, has_aux=True)(params)

    to_params, velocity = slopes(PARAMS)
    expected, _ = backward(policy, x0, noisy, levels, weights, constant=0)
    np.testing.assert_allclose(velocity, expected, atol=2e-5)
    assert_same_gradients(to_params, oracle(), 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [2, 3])
def test_diffusion_forcing_equals_skyreels(chunk):
    """Its block-causal forward, which loads Wan's parameters as they are; a level for each
    frame.
    """
    torch = pytest.importorskip("torch")
    model = (
        pytest.importorskip("diffusers")
        .SkyReelsV2Transformer3DModel(**SIZES, num_frame_per_block=chunk)
        .eval()
    )
    model.load_state_dict(to_diffusers(PARAMS, SMALL), strict=True)
    policy, x = CachePolicy(chunk, chunk, 0, 0, "absolute"), clip(6)
    levels = np.linspace(1.0, 0.2, 12).reshape(2, 6).astype(np.float32)
    plan = plan_diffusion_forcing(6, policy)
    got = jax.jit(
        lambda params: NETWORK.denoise(params, x, jnp.asarray(levels), COND, plan).velocity
    )(PARAMS)
    with torch.no_grad():
        expected = model(
            to_torch(x).permute(0, 4, 1, 2, 3),
            torch.tensor(1000 * levels),
            to_torch(COND.text),
            enable_diffusion_forcing=True,
        ).sample.permute(0, 2, 3, 4, 1)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["sink, picture first", "sink, relative"])
def test_diffusion_forcing_equals_the_dense_mask(case):
    """With windows, sinks and first pictures, which SkyReels has not."""
    torch = pytest.importorskip("torch")
    policy, frames = CASES[case]
    x, levels = (
        clip(frames),
        np.linspace(1.0, 0.2, 2 * frames).reshape(2, frames).astype(np.float32),
    )
    plan = plan_diffusion_forcing(frames, policy)
    got = jax.jit(
        lambda params: NETWORK.denoise(params, x, jnp.asarray(levels), COND, plan).velocity
    )(PARAMS)
    with torch.no_grad():
        expected = masked_oracle(
            to_torch(x), levels, COND.text, looks(policy, policy.sizes(frames))
        )
    np.testing.assert_allclose(got, expected, atol=2e-5)
