"""Moments and the average in the host's memory: the same update, and nothing but they moves."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from salt_jax.checkpoint import open_checkpoints, restore, save
from salt_jax.sharding import state_shardings
from salt_jax.stages.stage import Update
from salt_jax.train.step import compile_step
from tests.helpers import arguments, layout, mesh_of, same_bits, traced
from tests.stages import small, toys

HOSTED = replace(toys.RECIPE, host_state=True)


def on_host(state):
    """Paths of the arrays that lie there."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, x in found
        if x.sharding.memory_kind != "device"
    }


def hosted_layout(state, frozen, sizes=(), hosted=True):
    """As `layout`, with what waits in the host's memory."""
    _, *others = layout(state, frozen, sizes)
    return state_shardings(mesh_of(**dict(sizes)), state, hosted), *others


def run(who, recipe, updates=2):
    sizes = {"data": 2, "fsdp": 4}
    shardings = hosted_layout(toys.toy_state(), toys.FROZEN, sizes, recipe.host_state)
    step = compile_step(traced(toys.stage_of(recipe), 1), toys.UPDATES[who], shardings)
    args = arguments(shardings, toys.toy_state(), toys.FROZEN, toys.batch_of(0))
    state, frozen, batch, call = args
    for index in range(updates):
        with jax.transfer_guard("disallow"):
            put = jax.device_put(np.int32(index), shardings[3])
            state, metrics = step(state, frozen, batch, call._replace(index=put))
    return state, metrics


@pytest.mark.parametrize("who", toys.UPDATES)
def test_an_update_is_the_same_and_what_waits_goes_back(who):
    wanted, told = run(who, toys.RECIPE)
    found, same = run(who, HOSTED)
    assert not on_host(wanted)
    waiting = {path.split("/")[0] for path in on_host(found)}
    assert waiting == {"learners", "ema"}
    whose = {path.split("/")[1] for path in on_host(found) if path.startswith("learners/")}
    assert whose == {"student", "critic"}
    assert all("/nu/" in path or path.startswith("ema/") for path in on_host(found))
    chex.assert_trees_all_close((found, same), (wanted, told), rtol=1e-6, atol=1e-9)


def test_a_checkpoint_comes_back_to_where_it_was_and_to_the_devices(tmp_path):
    state, _ = run("student", HOSTED, 1)
    mesh = mesh_of(fsdp=4)
    with open_checkpoints(tmp_path, 1) as manager:
        save(manager, state, {})
        manager.wait_until_finished()
        for hosted in (True, False):
            where = state_shardings(mesh, state, hosted)
            form = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            found, _ = restore(manager, jax.tree.map(form, state, where))
            same_bits(found, state)
            assert on_host(found) == (on_host(state) if hosted else set())


def test_a_stage_whose_loss_looks_with_the_average_gets_it():
    shardings = hosted_layout(small.stage_state(), small.FORCED)
    stage = small.causal_stage("consistency", host_state=True)
    step = compile_step(stage, Update("student"), shardings)
    batch = small.stage_batch("consistency")
    lowered = step.lower(*arguments(shardings, small.stage_state(), small.FORCED, batch))
    assert "pinned_host" in lowered.as_text()
