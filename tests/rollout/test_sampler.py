"""Videos of any length: chunk by chunk they are what training's rollout makes, with one program and
constant memory.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.schedule import grid
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.position_channels import POSITION_CHANNELS
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.wan import init_wan
from salt_jax.rollout.causal import Origin, Steps, rollout
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate, make_chunk
from salt_jax.types import Conditioning

CONFIG = WanConfig(24, 2, 2, 48, 3 + POSITION_CHANNELS, 3, (1, 2, 2), 8, 6, 16, 0, 1e-6)
NETWORK = wan_denoiser(CONFIG, Compute(), 9, 3)
PICTURE, SHIFT, UPDATES = (4, 4, 3), 5.0, 2
WINDOW = CachePolicy(3, 3, 6, 1, "relative")
SINK = CachePolicy(3, 3, 9, 3, "absolute")


@pytest.fixture(scope="module")
def params():
    """Like a trained network: no zeros in the head."""
    leaves, tree = jax.tree.flatten(jax.jit(init_wan, static_argnums=1)(jax.random.key(0), CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def prompts(seed, clips=2):
    drawn = np.random.default_rng(seed).normal(size=(clips, 4, 8))
    return Conditioning(drawn.astype(np.float32))


def video(params, frames, policy, cues=None, given=None, updates=UPDATES, first=0):
    sampler = Sampler(updates, SHIFT, "cm", policy, first)
    told = (cues or {0: Cue(prompts(0))}, clip_keys(0, 2), (frames, *PICTURE), given)
    return np.concatenate(list(generate(sampler, NETWORK, params, *told)), axis=1)


@pytest.mark.parametrize(
    "policy",
    [
        SINK,
        pytest.param(WINDOW, marks=pytest.mark.slow),
        pytest.param(CachePolicy(3, 1, 0, 0, "absolute"), marks=pytest.mark.slow),
        pytest.param(CachePolicy(1, 1, 0, 0, "absolute"), marks=pytest.mark.slow),
    ],
)
def test_chunk_by_chunk_is_the_rollout_of_training(params, policy):
    frames = 12 + policy.first % 3
    steps = Steps(jnp.asarray(grid(UPDATES, SHIFT)), UPDATES - 1, "cm")
    keys, shape = clip_keys(0, 2), (frames, *PICTURE)
    make = lambda p, cond: rollout(NETWORK, p, Origin(cond), steps, keys, shape, policy).x0
    whole = jax.jit(make)(params, prompts(0))
    np.testing.assert_allclose(video(params, frames, policy), whole, atol=1e-5)


@pytest.mark.parametrize("policy", [WINDOW, SINK])
def test_a_long_video_runs_one_program_on_a_cache_of_fixed_size(params, policy):
    """120 latent frames, as many as 30 seconds of Wan have: no more programs and no larger cache
    than for 12.
    """
    before = video(params, 12, policy)
    programs = make_chunk.jitted._cache_size()
    longer = video(params, 120, policy)
    assert make_chunk.jitted._cache_size() == programs
    assert longer.shape == (2, 120, *PICTURE)
    chex.assert_tree_all_finite(longer)
    np.testing.assert_array_equal(longer[:, :12], before)
    assert policy.capacity(120) == policy.capacity(12) == policy.window - policy.chunk


@pytest.mark.parametrize("flush", [False, True])
def test_a_prompt_switch_changes_what_follows_and_nothing_before(params, flush):
    first, second = prompts(0), prompts(1)
    plain = video(params, 18, SINK)
    switched = video(params, 18, SINK, {0: Cue(first), 9: Cue(second, flush=flush)})
    np.testing.assert_array_equal(switched[:, :9], plain[:, :9])
    assert np.abs(switched[:, 9:] - plain[:, 9:]).max() > 1e-3
    again = video(params, 18, SINK, {0: Cue(first), 9: Cue(first)})
    if not flush:  # the same text read again: only what was forgotten before the switch is missing
        assert np.abs(again - plain).max() < np.abs(switched - plain).max()


def test_a_cut_moves_one_chunk_only(params):
    """The frames before the cut stay as they are; the next chunk after it stands where it would
    stand anyway.
    """
    plain = video(params, 12, WINDOW)
    cut = video(params, 12, WINDOW, {0: Cue(prompts(0)), 6: Cue(prompts(0), flush=True, cut=True)})
    flushed = video(params, 12, WINDOW, {0: Cue(prompts(0)), 6: Cue(prompts(0), flush=True)})
    np.testing.assert_array_equal(cut[:, :6], plain[:, :6])
    assert np.abs(cut[:, 6:9] - flushed[:, 6:9]).max() > 1e-4


def test_the_first_chunk_may_take_more_updates(params):
    few, more = video(params, 9, SINK), video(params, 9, SINK, first=4)
    assert np.abs(few - more).max() > 1e-3
    alone = video(params, 3, SINK, updates=4)
    np.testing.assert_allclose(more[:, :3], alone, atol=1e-6)


@pytest.mark.slow
def test_a_given_picture_is_continued(params):
    """Image to video: the first frame of a video, given, leads to the same video; another one to
    another.
    """
    policy = CachePolicy(3, 1, 0, 0, "absolute")
    made = video(params, 7, policy)
    np.testing.assert_allclose(video(params, 7, policy, given=made[:, :1]), made, atol=1e-5)
    other = video(params, 7, policy, given=-made[:, :1])
    np.testing.assert_array_equal(other[:, :1], -made[:, :1])
    assert np.abs(other[:, 1:] - made[:, 1:]).max() > 1e-3
    with pytest.raises(ValueError, match="goes on from whole chunks"):
        video(params, 7, policy, given=made[:, :3])


def test_a_given_clip_is_continued(params):
    """Its chunks are committed one by one: the beginning of a video, given, leads to the same
    video.
    """
    made = video(params, 15, SINK)
    np.testing.assert_allclose(video(params, 15, SINK, given=made[:, :12]), made, atol=1e-5)
    switched = {0: Cue(prompts(0)), 12: Cue(prompts(1))}
    other = video(params, 15, SINK, switched, given=made[:, :12])
    np.testing.assert_allclose(other, video(params, 15, SINK, switched), atol=1e-5)
    for frames in (4, 15):
        with pytest.raises(ValueError, match="goes on from whole chunks"):
            video(params, 15, SINK, given=made[:, :frames])


@pytest.mark.parametrize(
    ("frames", "policy", "cues", "told"),
    [
        (10, SINK, None, "do not split into a chunk of 3 and chunks of 3"),
        (12, SINK, {0: Cue(prompts(0)), 4: Cue(prompts(1))}, "must be starts of chunks"),
        (12, SINK, {3: Cue(prompts(0))}, "must be starts of chunks"),
        (12, SINK, {0: Cue(prompts(0)), 6: Cue(prompts(1), cut=True)}, "set positions to relative"),
        (1026, SINK, None, "set positions to relative"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(params, frames, policy, cues, told):
    with pytest.raises(ValueError, match=told):
        video(params, frames, policy, cues)
