"""Guidance chunk by chunk: each branch has read the video under its own text, as training's causal
teacher has.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.flow.schedule import grid
from salt_jax.flow.transition import euler
from salt_jax.models.denoiser import POSITION_CHANNELS, guided_network, wan_network
from salt_jax.models.memory import CachePolicy
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.wan import init_wan
from salt_jax.rollout.parallel import noise_at
from salt_jax.sample import Cue, Sampler, clip_keys, stream_chunks
from salt_jax.train.stages import forced_velocity
from tests.models.test_wan import randomised

WAN = WanConfig(24, 2, 2, 32, 4, 4, (1, 2, 2), 8, 4, 16, 0, 1e-6)
SHAPES = WanConfig(24, 2, 2, 32, 3 + POSITION_CHANNELS, 3, (1, 2, 2), 8, 4, 16, 0, 1e-6)
W, UPDATES, SHIFT, FRAMES = 3.0, 4, 5.0, 9
TEXT, NULL, OTHER = (
    np.random.default_rng(i).normal(size=(n, 4, 8)).astype(np.float32)
    for i, n in ((1, 2), (2, 1), (3, 2))
)


def make(config, policy, w, cues=None, given=None):
    network = wan_network(config, Compute(), FRAMES, 3)
    params = randomised(init_wan(jax.random.key(0), config), 1)
    sampler = Sampler(grid(UPDATES, SHIFT), "euler", policy)
    shape = (FRAMES, 2, 4, config.out_channels)
    told = (cues or {0: Cue(TEXT)}, clip_keys(0, 2), sampler, shape, given)
    video = np.concatenate(
        list(stream_chunks(guided_network(network, jnp.asarray(NULL), w), params, *told)), 1
    )
    return network, params, shape, video


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (WAN, CachePolicy(3, 3, 0, 0, "absolute")),
        pytest.param(SHAPES, CachePolicy(3, 3, 6, 0, "absolute"), marks=pytest.mark.slow),
        pytest.param(WAN, CachePolicy(2, 1, 5, 1, "relative"), marks=pytest.mark.slow),
    ],
    ids=["wan", "shapes, window", "wan, window, sink"],
)
def test_guided_chunks_are_those_of_the_causal_teacher_of_training(config, policy):
    """All chunks at once by `forced_velocity`, each given the clean ones before it, along the same
    Euler path.
    """
    network, params, shape, video = make(config, policy, W)
    recipe = read_recipe(base.get_config())
    recipe = replace(recipe, memory=policy, ode=replace(recipe.ode, guidance=W))

    @jax.jit
    def teacher(x0, x):
        velocity = forced_velocity(
            network, params, x0, jnp.asarray(TEXT), jnp.asarray(NULL), recipe
        )
        for now, after in zip(grid(UPDATES, SHIFT)[:-1], grid(UPDATES, SHIFT)[1:], strict=True):
            x = euler(x, velocity(x, jnp.full(2, now)), jnp.full(2, now), jnp.full(2, after))
        return x

    noise = noise_at(clip_keys(0, 2), jnp.float32(1.0), np.arange(FRAMES), shape[1:])
    np.testing.assert_allclose(video, teacher(video, noise), atol=1e-5 * np.abs(video).max())
    assert np.abs(video - make(config, policy, 1.0)[-1]).max() > 1e-2


@pytest.mark.slow
def test_a_switch_and_a_given_beginning_keep_both_histories():
    """To the same prompt nothing changes; what is given is read by both branches."""
    policy = CachePolicy(3, 3, 9, 3, "absolute")
    plain = make(WAN, policy, W)[-1]
    close = 1e-5 * np.abs(plain).max()
    np.testing.assert_allclose(
        make(WAN, policy, W, {0: Cue(TEXT), 6: Cue(TEXT)})[-1], plain, atol=close
    )
    np.testing.assert_allclose(make(WAN, policy, W, given=plain[:, :6])[-1], plain, atol=close)
    switched = make(WAN, policy, W, {0: Cue(TEXT), 6: Cue(OTHER)})[-1]
    np.testing.assert_array_equal(switched[:, :6], plain[:, :6])
    assert np.abs(switched[:, 6:] - plain[:, 6:]).max() > 1e-2
