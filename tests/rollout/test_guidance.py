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
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.models.position_channels import POSITION_CHANNELS
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.rollout.parallel import noise_at
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.stages.causal import forced_velocity
from salt_jax.types import Conditioning
from tests.helpers import randomised, shapes_of

WAN = WanConfig(24, 2, 2, 32, 4, 4, (1, 2, 2), 8, 4, 16, 0, 1e-6)
SHAPES = WanConfig(24, 2, 2, 32, 3 + POSITION_CHANNELS, 3, (1, 2, 2), 8, 4, 16, 0, 1e-6)
W, UPDATES, SHIFT, FRAMES = 3.0, 4, 5.0, 9
COND, NULL, OTHER = (
    Conditioning(np.random.default_rng(i).normal(size=(n, 4, 8)).astype(np.float32))
    for i, n in ((1, 2), (2, 1), (3, 2))
)


def make(config, policy, w, cues=None, given=None):
    network = wan_denoiser(config, Compute(), FRAMES, 3)
    params = randomised(shapes_of(config), 1)
    sampler = Sampler(UPDATES, SHIFT, "euler", policy)
    shape = (FRAMES, 2, 4, config.out_channels)
    told = (cues or {0: Cue(COND)}, clip_keys(0, 2), shape, given)
    denoiser, weights = guided(network, params, jnp.asarray(NULL.text), w)
    video = np.concatenate(list(generate(sampler, denoiser, weights, *told)), 1)
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
    cond = Conditioning(jnp.asarray(COND.text))

    @jax.jit
    def teacher(x0, x):
        velocity = forced_velocity(network, params, x0, cond, jnp.asarray(NULL.text), recipe)
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
        make(WAN, policy, W, {0: Cue(COND), 6: Cue(COND)})[-1], plain, atol=close
    )
    np.testing.assert_allclose(make(WAN, policy, W, given=plain[:, :6])[-1], plain, atol=close)
    switched = make(WAN, policy, W, {0: Cue(COND), 6: Cue(OTHER)})[-1]
    np.testing.assert_array_equal(switched[:, :6], plain[:, :6])
    assert np.abs(switched[:, 6:] - plain[:, 6:]).max() > 1e-2
