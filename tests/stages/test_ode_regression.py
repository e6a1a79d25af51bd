"""Stage ode_regression: its loss against the same one assembled by hand, and the trajectories of
the causal teacher.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.schedule import grid
from salt_jax.models.presets import Compute
from salt_jax.stages.causal import ode_levels
from tests.helpers import Straight
from tests.stages.small import (
    BATCH,
    CAUSAL,
    CLIP,
    FORCED,
    KEY,
    NULL,
    SMALL,
    assert_follows,
    batch_of,
    causal_stage,
    column,
    forced,
    guided_by_hand,
)


def by_hand(batch):
    """Keys are split as the stage splits them; the rest is written out once more."""
    level = np.asarray(jax.random.randint(KEY, (BATCH,), 0, 4))
    assert len(set(level)) > 2
    x = jnp.stack([batch.states[b, level[b]] for b in range(BATCH)])
    sigma = jnp.asarray(grid(4, 2.0)[level])
    said = lambda p: forced(p, x, sigma, batch.cond, batch.video).x0
    return lambda p: ((said(p) - batch.states[:, 4]) ** 2).mean()


@pytest.mark.slow
def test_it_follows_the_gradient_of_its_loss_and_moves_every_parameter_and_their_average():
    assert_follows("ode_regression", by_hand)


# Trajectories of the causal teacher.

LINES = Straight(SMALL, Compute())
LINES_FROZEN = {"teacher": jnp.float32(0.7), "null_text": NULL}


@pytest.mark.parametrize(("updates", "kept"), [(4, 4), (8, 4), (12, 2)])
def test_a_constant_velocity_makes_straight_lines_kept_at_the_students_levels(updates, kept):
    """Under guidance 3: state(sigma) = noise - (1 - sigma) (u + 3 (c - u)), and the last entry is
    the end.
    """
    stage = causal_stage(
        "ode_regression",
        LINES,
        ode=replace(CAUSAL.ode, num_steps=updates, guidance=3.0),
        schedule=replace(CAUSAL.schedule, train_levels=kept, shift=5.0),
    )
    batch = batch_of(0)
    states = stage.trajectory(LINES_FROZEN, batch, KEY)
    assert states.shape == (BATCH, kept + 1, *CLIP)
    noise = jax.random.normal(KEY, (BATCH, *CLIP))
    c, u = 0.7 * batch.cond.text.mean((1, 2)), 0.7 * NULL.mean()
    slope = np.asarray(u + 3.0 * (c - u)).reshape(-1, 1, 1, 1, 1)
    for i, level in enumerate(grid(kept, 5.0)):
        np.testing.assert_allclose(states[:, i], noise - (1 - level) * slope, atol=1e-5)


def test_trajectories_pass_the_levels_that_are_listed():
    """On top of the ten updates of the grid, which they need not be among."""
    schedule = replace(CAUSAL.schedule, train_levels=3, shift=8.0, levels=(1000.0, 757.0, 522.0))
    ode = replace(CAUSAL.ode, num_steps=10, guidance=1.0)
    stage = causal_stage("ode_regression", LINES, ode=ode, schedule=schedule)
    grid_levels = [8 * u / (1 + 7 * u) for u in np.arange(10, -1, -1) / 10]
    wanted = sorted([*grid_levels, 0.757, 0.522])[::-1]
    np.testing.assert_allclose(ode_levels(stage.recipe), wanted, rtol=1e-6)
    batch = batch_of(0)
    states = stage.trajectory(LINES_FROZEN, batch, KEY)
    assert states.shape == (BATCH, 4, *CLIP)
    slope = column(0.7 * batch.cond.text.mean((1, 2)))
    for i, level in enumerate((1.0, 0.757, 0.522, 0.0)):
        wanted = jax.random.normal(KEY, (BATCH, *CLIP)) - (1 - level) * slope
        np.testing.assert_allclose(states[:, i], wanted, atol=1e-5)


def test_a_trajectory_is_that_of_a_loop_over_eulers_updates():
    """Of the causal teacher with guidance, on the clean chunks of the batch."""
    batch, stage = batch_of(1), causal_stage("ode_regression")
    states = jax.jit(lambda key: stage.trajectory(FORCED, batch, key))(KEY)
    velocity = jax.jit(lambda x, sigma: guided_by_hand(x, jnp.full(BATCH, sigma), batch))
    x, levels, wanted = jax.random.normal(KEY, (BATCH, *CLIP)), grid(8, 2.0), []
    for now, after in itertools.pairwise(levels):
        wanted.append(x)
        x = x - (now - after) * velocity(x, now)
    np.testing.assert_allclose(states, jnp.stack([*wanted[::2], x], 1), atol=1e-4)
