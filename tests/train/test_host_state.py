"""Moments and the average in the host's memory: the same update, and nothing but they moves."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from salt_jax.checkpoint import open_checkpoints, restore, save
from salt_jax.sharding import make_mesh, state_shardings
from salt_jax.train import stages
from salt_jax.train.step import compile_step, critic_step, student_step
from tests.placing import place
from tests.train import test_step as toys
from tests.train.test_step import bits, host, layout

HOSTED = replace(toys.RECIPE, host_state=True)


def on_host(state):
    """Paths of the arrays that lie there."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, x in found
        if x.sharding.memory_kind != "device"
    }


def run(which, recipe, updates=2):
    shardings = layout(toys.toy_state(), toys.FROZEN, {"data": 2, "fsdp": 4})
    mesh = shardings[3].mesh
    states = state_shardings(mesh, toys.toy_state(), recipe.host_state)
    step = compile_step(
        which, toys.TOY, recipe, (states, *shardings[1:]), choice=toys.choice_of(which)
    )
    state = place(toys.toy_state(), states)
    frozen, batch = place(toys.FROZEN, shardings[1]), place(toys.batch_of(0), shardings[2])
    key = place(jax.random.key(7), shardings[3])
    for index in range(updates):
        with jax.transfer_guard("disallow"):
            put = jax.device_put(np.int32(index), shardings[3])
            state, metrics = step(state, frozen, batch, key, put, None)
    assert step._cache_size() == 1
    return state, metrics


@pytest.mark.parametrize("which", [student_step, critic_step])
def test_an_update_is_the_same_and_what_waits_goes_back(which):
    wanted, told = run(which, toys.RECIPE)
    found, same = run(which, HOSTED)
    assert not on_host(wanted)
    assert {path.split("/")[0] for path in on_host(found)} == {"student", "critic", "ema"}
    assert all("/nu/" in path or path.startswith("ema/") for path in on_host(found))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    jax.tree.map(close, host((found, same)), host((wanted, told)))


def test_a_checkpoint_comes_back_to_where_it_was_and_to_the_devices(tmp_path):
    state, _ = run(student_step, HOSTED, 1)
    mesh = make_mesh({"data": 1, "fsdp": 4, "context": 1, "tensor": 1}, jax.devices()[:4])
    with open_checkpoints(tmp_path, 1) as manager:
        save(manager, state, {})
        manager.wait_until_finished()
        for hosted in (True, False):
            where = state_shardings(mesh, state, hosted)
            form = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            found, _ = restore(manager, jax.tree.map(form, state, where))
            assert bits(host(found)) == bits(host(state))
            assert on_host(found) == (on_host(state) if hosted else set())


def test_a_stage_whose_loss_looks_with_the_average_gets_it():
    from tests.train import test_stages

    recipe = replace(test_stages.CAUSAL, stage="consistency", host_state=True)
    shardings = layout(test_stages.stage_state(), test_stages.FROZEN, {})
    states = state_shardings(shardings[3].mesh, test_stages.stage_state(), True)
    step = compile_step(stages.stage_step, test_stages.NETS, recipe, (states, *shardings[1:]))
    state = place(test_stages.stage_state(), states)
    lowered = step.lower(
        state, test_stages.FROZEN, test_stages.stage_batch(), jax.random.key(7), np.int32(0), None
    )
    assert "pinned_host" in lowered.as_text()
