"""Stage teacher_forcing: its loss against the same one assembled by hand. Keys are split as the
stage splits them; the rest is written out once more.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from salt_jax.losses.flow_matching import midlevel_weight
from tests.stages.small import (
    BATCH,
    CAUSAL,
    CLIP,
    KEY,
    NULL,
    STUDENT,
    assert_follows,
    causal_stage,
    column,
    forced,
    loss_of,
)


def by_hand(batch):
    k_drop, k_sigma, k_noise = jax.random.split(KEY, 3)
    dropped = jax.random.bernoulli(k_drop, 0.5, (BATCH, 1, 1))
    assert 0 < dropped.sum() < BATCH
    cond = batch.cond._replace(text=dropped * NULL + ~dropped * batch.cond.text)
    u = jax.random.uniform(k_sigma, (BATCH * 3,)).reshape(BATCH, 3)
    sigma = jnp.clip(5 * u / (1 + 4 * u), 0.001, 1.0)[:, jnp.array([0, 0, 1, 1, 2, 2])]
    noise = jax.random.normal(k_noise, (BATCH, *CLIP))
    x = (1 - column(sigma)) * batch.video + column(sigma) * noise
    weight, target = column(midlevel_weight(sigma, 5.0)), noise - batch.video
    return lambda p: (
        weight * (forced(p, x, sigma, cond, batch.video).velocity - target) ** 2
    ).mean()


@pytest.mark.slow
def test_it_follows_the_gradient_of_its_loss_and_moves_every_parameter_and_their_average():
    assert_follows("teacher_forcing", by_hand)


def test_it_says_nothing_about_pure_noise():
    """Where all levels are 1 the weight is 0."""
    renoise = replace(CAUSAL.renoise, lowest=1.0, highest=1.0)
    stage = causal_stage("teacher_forcing", renoise=renoise)
    assert abs(jax.jit(lambda p: loss_of(stage, p))(STUDENT)) < 1e-6
