"""Stage shortcut: its loss written out once more, and a run of a few updates, on toys."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.errors import UserError
from salt_jax.flow.schedule import grid
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Inputs, Update, Weights
from salt_jax.train.step import Call, compile_step
from tests.helpers import layout, with_networks
from tests.placing import place
from tests.stages.toys import FROZEN, RECIPE, TEACHER, Toy, batch_of, toy_params

KEY, GUIDANCE = jax.random.key(11), 2.5
RECIPE = replace(RECIPE, stage="shortcut", teacher=replace(RECIPE.teacher, guidance=GUIDANCE))
STAGE = with_networks(make_stage(RECIPE), student=Toy(), teacher=Toy())


def first_state():
    null = FROZEN["null_text"]
    return STAGE.first_state(Weights(toy_params(0), None, toy_params(0), TEACHER, null))


def test_its_loss_by_hand():
    batch, params = batch_of(1), toy_params(4)
    noise = STAGE.noise(KEY, batch)
    s, m, e, exists = (np.asarray(a) for a in noise.triple)
    levels = grid(8, RECIPE.schedule.shift)  # inference visits every second
    for a, b, c, there in zip(*map(list, (s, m, e, exists)), strict=True):
        i = list(levels).index(a)
        assert (b, c, there) == (levels[i + 1 - i % 2], levels[i + 2 - i % 2], i % 2 == 0)
    assert 0 < exists.sum() < len(exists)
    column = lambda level: level.reshape(-1, 1, 1, 1, 1)
    velocity = lambda p, x, sigma, cond: Toy().denoise(p, x, jnp.asarray(sigma), cond).velocity
    x = (1 - column(s)) * batch.video + column(s) * noise.clip
    v_s = velocity(params, x, s, batch.cond)
    x_m = x - column(s - m) * v_s
    x_e = x_m - column(m - e) * velocity(params, x_m, m, batch.cond)
    null = batch.cond._replace(text=jnp.broadcast_to(FROZEN["null_text"], batch.cond.text.shape))
    given, none = (velocity(TEACHER, x, s, cond) for cond in (batch.cond, null))
    teacher = none + GUIDANCE * (given - none)
    target = jnp.where(
        column(exists), (x - x_e) / np.where(column(exists), column(s - e), 1), teacher
    )
    inputs = Inputs(first_state(), FROZEN, batch, noise, None)
    value, aux = STAGE.loss(params, inputs, Update("student"))
    np.testing.assert_allclose(value, ((v_s - target) ** 2).mean(), rtol=1e-4)
    assert set(aux.metrics) == {"shortcut"}


def test_it_learns():
    shardings = layout(first_state(), FROZEN)
    step = compile_step(STAGE, Update("student"), shardings)
    state, losses = place(first_state(), shardings[0]), []
    for _ in range(30):
        state, metrics = step(state, FROZEN, batch_of(1), Call(KEY, jnp.int32(0), None))
        losses.append(float(metrics["shortcut"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert set(state.learners) == {"student"}


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"teacher": replace(RECIPE.teacher, kind="data")}, "set it to network or closed_form"),
        ({"schedule": replace(RECIPE.schedule, anchor_levels=8)}, "lower anchor_levels"),
        ({"lora": replace(RECIPE.lora, rank=4)}, r"lora\.rank=4 is for config\.stage=distil"),
    ],
)
def test_what_it_refuses(changes, remedy):
    with pytest.raises(UserError, match=remedy):
        make_stage(replace(RECIPE, **changes))
