"""Stage consistency: its loss against the same one assembled by hand, and what it targets."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.schedule import grid
from tests.stages.small import (
    BATCH,
    CAUSAL,
    CLIP,
    EMA,
    FORCED,
    KEY,
    STUDENT,
    assert_follows,
    causal_stage,
    column,
    forced,
    guided_by_hand,
    loss_of,
    wan,
)


def by_hand(batch):
    """Keys are split as the stage splits them; the rest is written out once more."""
    k_level, k_noise = jax.random.split(KEY)
    n = np.asarray(jax.random.randint(k_level, (BATCH,), 0, 8))
    assert len(set(n)) > 3
    sigma, after = (jnp.asarray(grid(8, 2.0)[m]) for m in (n, n + 1))
    noise = jax.random.normal(k_noise, (BATCH, *CLIP))
    x = (1 - column(sigma)) * batch.video + column(sigma) * noise
    says = lambda p, x, sigma: forced(p, x, sigma, batch.cond, batch.video).x0

    def loss(p):
        further = x - column(sigma - after) * guided_by_hand(x, sigma, batch)
        return ((says(p, x, sigma) - says(EMA, further, after)) ** 2).mean()

    return loss


@pytest.mark.slow
def test_it_follows_the_gradient_of_its_loss_and_moves_every_parameter_and_their_average():
    assert_follows("consistency", by_hand)


@pytest.mark.slow
def test_at_the_last_level_it_targets_the_state_itself():
    """With a single update of the teacher, from noise to the end, where a network's clean estimate
    is the state itself: whatever the average says; and a student that is the unguided teacher is
    there already.
    """

    def consistency(params, ema, guidance):
        ode = replace(CAUSAL.ode, num_steps=1, guidance=guidance)
        schedule = replace(CAUSAL.schedule, train_levels=1)
        return loss_of(causal_stage("consistency", ode=ode, schedule=schedule), params, ema)

    run = jax.jit(consistency, static_argnums=2)
    assert run(STUDENT, EMA, 2.0) == run(STUDENT, wan(8), 2.0) > 1e-3
    assert run(FORCED["teacher"], EMA, 1.0) < 1e-9
    assert run(FORCED["teacher"], EMA, 2.0) > 1e-6, "guidance makes no difference"
