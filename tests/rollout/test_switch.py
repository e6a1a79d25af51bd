"""A prompt switch reads the cached frames again.

Under the same prompt that changes nothing, whatever the memory.
"""

import chex
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.rollout.causal import commit, recache
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.types import Conditioning
from tests.helpers import randomised, shapes_of

CONFIG = WanConfig(24, 2, 2, 32, 4, 4, (1, 2, 2), 8, 4, 16, 0, 1e-6)
NETWORK = wan_denoiser(CONFIG, Compute(), 9, 3)
PARAMS = randomised(shapes_of(CONFIG), 1)
PLACE = (2, 4, 4)
COND, OTHER = (
    Conditioning(np.random.default_rng(i).normal(size=(1, 4, 8)).astype(np.float32)) for i in (2, 3)
)
commit_chunk = jax.jit(
    lambda cache, x0, cond, policy: commit(NETWORK, PARAMS, cache, x0, cond, policy),
    static_argnames="policy",
)
read_again = jax.jit(
    lambda cache, cond, policy: recache(NETWORK, PARAMS, cache, cond, policy),
    static_argnames="policy",
)


def frames_of(count):
    return np.random.default_rng(4).normal(size=(1, count, *PLACE)).astype(np.float32)


def filled(policy, sizes, slots, cond):
    cache, at, x0 = NETWORK.empty_cache(1, slots, PLACE), 0, frames_of(sum(sizes))
    for size in sizes:
        cache = commit_chunk(cache, x0[:, at : at + size], cond, policy)
        at += size
    return cache


def agree(got, expected, filled):
    for name in ("k", "v"):
        ours, theirs = (
            np.asarray(getattr(cache, name))[:, :, :filled] for cache in (got, expected)
        )
        np.testing.assert_allclose(
            ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max(initial=0.0))
        )


@st.composite
def memories(draw):
    """A policy, and how many chunks it has finished without forgetting a frame."""
    chunk = draw(st.integers(1, 3))
    first = draw(st.integers(1, chunk))
    sink = draw(st.integers(0, 4))
    window = draw(st.one_of(st.just(0), st.integers(sink + chunk, sink + chunk + 7)))
    policy = CachePolicy(
        chunk, first, window, sink, draw(st.sampled_from(["absolute", "relative"]))
    )
    room = policy.capacity(7)
    return policy, draw(st.integers(0, 1 + (room - first) // chunk if room >= first else 0))


@settings(max_examples=7, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(memories())
def test_reading_again_equals_committing_where_nothing_was_forgotten(memory):
    """Under the same text and under another one: what commits under it would have left in the
    cache.
    """
    policy, chunks = memory
    sizes = (policy.first, *(policy.chunk,) * 9)[:chunks]
    slots = policy.capacity(max(sum(sizes), 1))
    cache = filled(policy, sizes, slots, COND)
    assert int(cache.filled) == sum(sizes)
    agree(read_again(cache, COND, policy), cache, sum(sizes))
    agree(read_again(cache, OTHER, policy), filled(policy, sizes, slots, OTHER), sum(sizes))


def test_an_empty_slot_keeps_nothing_that_would_spread():
    """A slot without a frame is masked, which multiplies it by zero: it must hold numbers."""
    policy = CachePolicy(3, 3, 12, 3, "relative")
    again = read_again(filled(policy, (), 9, COND), COND, policy)
    chex.assert_tree_all_finite((again.k, again.v))


def video(policy, frames, cues):
    sampler = Sampler(2, 5.0, "cm", policy)
    chunks = generate(sampler, NETWORK, PARAMS, cues, clip_keys(0, 1), (frames, *PLACE))
    return np.concatenate(list(chunks), axis=1)


@pytest.mark.parametrize(
    ("window", "sink", "first", "at"),
    [
        (10, 3, 3, 6),
        (3, 0, 3, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 2, 3, 3), (11, 2, 1, 7))),
    ],
)
def test_a_switch_to_the_same_prompt_changes_nothing(window, sink, first, at):
    """The last memory is the smallest: a chunk sees itself alone, and there is nothing to read
    again.
    """
    policy = CachePolicy(3, first, window, sink, "absolute")
    frames = 12 + first % 3
    plain = video(policy, frames, {0: Cue(COND)})
    switched = video(policy, frames, {0: Cue(COND), at: Cue(COND)})
    np.testing.assert_allclose(switched, plain, atol=1e-5 * np.abs(plain).max())
    other = video(policy, frames, {0: Cue(COND), at: Cue(OTHER)})
    np.testing.assert_array_equal(other[:, :at], plain[:, :at])
    assert np.abs(other[:, at:] - plain[:, at:]).max() > 1e-3


def test_a_flush_of_the_smallest_memory_has_nothing_to_forget():
    policy = CachePolicy(3, 3, 3, 0, "relative")
    plain = video(policy, 9, {0: Cue(COND)})
    flushed = video(policy, 9, {0: Cue(COND), 6: Cue(COND, flush=True)})
    np.testing.assert_allclose(flushed, plain, atol=1e-5 * np.abs(plain).max())
