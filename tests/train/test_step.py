"""One update moves what it should and nothing else, on one device or on eight.

Most tests run on toys, denoisers of two matrices; the same updates then run on Wan. Their losses
are tested in tests/stages.
"""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.errors import UserError
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.models.wan import init_wan
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Batch
from salt_jax.state import first_state
from salt_jax.train.logs import stop_if_stuck, summarize
from salt_jax.train.loop import Run, iterate
from salt_jax.train.step import Call, compile_step, train_step
from salt_jax.types import Conditioning
from tests.helpers import (
    arguments,
    assert_all_moved,
    bits,
    close,
    host,
    layout,
    lies,
    same_bits,
    shapes_of,
    traced,
    with_networks,
)
from tests.placing import place
from tests.stages.toys import (
    FROZEN,
    RECIPE,
    TEACHER,
    UPDATES,
    batch_of,
    run_toy,
    stage_of,
    toy_params,
    toy_state,
)


def test_a_student_step_moves_student_ema_and_step_and_nothing_else():
    state, before = toy_state(), host(toy_state())
    after, metrics = run_toy("student", state, batch_of(0))
    same_bits(after.learners["critic"], before.learners["critic"])
    assert int(after.iteration) == 4
    moved = after.learners["student"].params
    assert_all_moved(before.learners["student"].params, moved)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, moved))
    assert set(metrics) == {"dmd", "dmd_gap", "self_consistency"} | {
        f"student_{name}" for name in ("grad_norm", "skipped", "skipped_in_a_row")
    }
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "the state should be donated"
    same_bits(TEACHER, toy_params(2))  # the teacher is not


def test_a_critic_step_moves_the_critic_and_nothing_else():
    state, before = toy_state(), host(toy_state())
    after, metrics = run_toy("critic", state, batch_of(0))
    for name in ("iteration", "ema"):
        same_bits(getattr(after, name), getattr(before, name))
    same_bits(after.learners["student"], before.learners["student"])
    assert_all_moved(before.learners["critic"].params, after.learners["critic"].params)
    assert set(metrics) == {"critic"} | {
        f"critic_{name}" for name in ("grad_norm", "skipped", "skipped_in_a_row")
    }
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    same_bits(TEACHER, toy_params(2))


def test_what_is_drawn_is_a_function_of_the_seed_and_the_index():
    first = run_toy("student", toy_state(), batch_of(0), index=5)
    again = run_toy("student", toy_state(), batch_of(0), index=5)
    other = run_toy("student", toy_state(), batch_of(0), index=6)
    same_bits(first, again)
    assert float(first[1]["dmd"]) != float(other[1]["dmd"])


@pytest.mark.parametrize("who", UPDATES)
def test_one_bad_example_skips_the_update_bit_for_bit_and_a_good_batch_goes_on(who):
    good, before = batch_of(0), host(toy_state())
    bad = good._replace(video=good.video.at[3, 0, 1, 2, 0].set(jnp.nan))
    state, _ = run_toy(who, toy_state(), bad)
    state, metrics = run_toy(who, state, bad)
    learner, was = state.learners[who], before.learners[who]
    same_bits((learner.params, learner.opt_state), (was.params, was.opt_state))
    assert (int(metrics[f"{who}_skipped"]), int(metrics[f"{who}_skipped_in_a_row"])) == (2, 2)
    chex.assert_tree_all_finite(state)
    values = {name: float(value) for name, value in metrics.items()}
    term = "dmd" if who == "student" else "critic"
    with pytest.raises(UserError, match=rf"2 {who} updates in a row .* update 9 \({term}"):
        stop_if_stuck(values, limit=2, step=9)
    stop_if_stuck(values, limit=3, step=9)

    state, metrics = run_toy(who, state, good)
    assert (int(metrics[f"{who}_skipped"]), int(metrics[f"{who}_skipped_in_a_row"])) == (2, 0)
    assert bits(state.learners[who].params) != bits(was.params)


def test_nothing_recompiles_and_nothing_is_transferred_unasked_over_iterations():
    shardings = layout(toy_state(), FROZEN, {"fsdp": 8})
    stage = traced(stage_of(), 2)  # in the programs of student and critic
    program = functools.cache(lambda update: compile_step(stage, update, shardings))
    run = Run(
        stage,
        place(FROZEN, shardings[1]),
        program,
        jax.device_put(jax.random.key(1), shardings[3]),
        iter([place(batch_of(i), shardings[2]) for i in range(12)]),
    )
    state = place(toy_state(), shardings[0])
    for i in range(4):
        with jax.transfer_guard("disallow"):
            state, metrics = iterate(state, run, i)
    assert program.cache_info().currsize == 2
    assert int(state.iteration) == 7 and int(state.learners["critic"].opt_state[1][0].count) == 8
    assert {"dmd", "critic", "critic_fresh"} <= set(metrics)
    chex.assert_tree_all_finite(run.frozen)


def test_every_update_has_its_own_batch_and_its_own_number():
    seen = []

    def record(update):
        def step(state, frozen, batch, call):
            seen.append((update, batch, int(call.index)))
            told = call.index.astype(jnp.float32)
            return state, {"critic": told} if update.moves == "critic" else {}

        return step

    key = jax.device_put(jax.random.key(1), jax.devices()[0])
    for start in (0, 2):  # as if stopped and started again
        run = Run(stage_of(), {}, record, key, iter(range(3 * start, 100)))
        for i in (start, start + 1):
            _, metrics = iterate(toy_state(), run, i)
            # The first critic update after the student's sees what it has not seen yet; the last
            # one is reported too.
            assert (int(metrics["critic_fresh"]), int(metrics["critic"])) == (3 * i + 1, 3 * i + 2)
    updates = [UPDATES[who] for who in ("student", "critic", "critic")] * 4
    assert seen == [(update, n, n) for n, update in enumerate(updates)]


def test_a_report_has_the_mean_of_each_term_over_the_updates_that_had_it():
    recent = [
        {"dmd": 1.0, "alignment": 4.0, "student_skipped": 1, "student_skipped_in_a_row": 1},
        {"dmd": 2.0, "student_skipped": 1, "student_skipped_in_a_row": 0},
        {"dmd": 6.0, "alignment": 5.0, "student_skipped": 1, "student_skipped_in_a_row": 0},
    ]
    recent = [{name: np.float32(value) for name, value in metrics.items()} for metrics in recent]
    values = {"dmd": 3.0, "alignment": 4.5, "student_skipped": 1.0, "student_skipped_in_a_row": 0.0}
    assert summarize(recent) == values
    bad = summarize([{"dmd": np.float32(1)}, {"dmd": np.float32("nan")}])
    assert np.isnan(bad["dmd"]), "a term that is not finite is not hidden"


def on_mesh(who, stage, make, frozen, batch, sizes):
    """Two updates; state and metrics as numpy arrays, and the bytes of state that the first device
    holds.
    """
    shardings = layout(make(), frozen, sizes)
    step = compile_step(stage, UPDATES[who], shardings)
    state, frozen, batch, call = arguments(shardings, make(), frozen, batch)
    for index in range(2):
        index = place(np.int32(index), shardings[3])
        state, metrics = step(state, frozen, batch, call._replace(index=index))
    lies(state, shardings[0])
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    return host(state), host(metrics), local


@pytest.mark.parametrize("who", UPDATES)
def test_eight_devices_do_what_one_does(who):
    args = (who, stage_of(), toy_state, FROZEN, batch_of(0))
    one, one_metrics, one_bytes = on_mesh(*args, {})
    state, metrics, local = on_mesh(*args, {"data": 2, "fsdp": 4})
    close(metrics, one_metrics)
    close(state, one)
    assert local < one_bytes / 3


def with_network(recipe, network):
    """One for student, critic and teacher."""
    return with_networks(make_stage(recipe), student=network, critic=network, teacher=network)


@pytest.mark.slow
@pytest.mark.parametrize("who", UPDATES)
def test_eight_devices_do_what_one_does_with_wan(who):
    config = PRESETS["tiny"]

    def wan(seed):
        """Like a trained network: no zeros in the head, student and critic and teacher differ."""
        params = init_wan(jax.random.key(0), config)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        shaken = [
            x + 0.03 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, shaken)

    recipe = replace(RECIPE, world=replace(RECIPE.world, frames=3, size=12))
    assert recipe.teacher.guidance == 2.0
    stage = with_network(recipe, wan_denoiser(config, Compute(), 3, 3))
    student, critic, teacher = (jax.jit(wan)(seed) for seed in (1, 2, 3))
    make = lambda: first_state(recipe, {"student": student, "critic": critic})
    batch = batch_of(0, (8, 3, 12, 12, 3), (config.text_length, config.text_dim))
    null = jnp.zeros((1, config.text_length, config.text_dim))
    args = (who, stage, make, {"teacher": teacher, "null_text": null}, batch)
    one, one_metrics, one_bytes = on_mesh(*args, {})
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 4}):
        state, metrics, local = on_mesh(*args, sizes)
        close(metrics, one_metrics, rtol=1e-3, atol=1e-5)
        close(state, one, rtol=1e-3, atol=1e-4)
        assert local < one_bytes / 3


@pytest.mark.parametrize(
    "preset", ["wan2.1-t2v-1.3b", pytest.param("wan2.1-t2v-14b", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("who", UPDATES)
def test_full_size_steps_trace(who, preset):
    """480p for five seconds, bfloat16 with recomputation: shapes and types agree and masters stay
    float32.
    """
    config = PRESETS[preset]
    recipe = replace(
        RECIPE,
        model=replace(RECIPE.model, preset=preset),
        data=replace(RECIPE.data, kind="latents", clip=(21, 60, 104)),
        teacher=replace(RECIPE.teacher, guidance=4.0),
    )
    stage = with_network(recipe, wan_denoiser(config, Compute(jnp.bfloat16, "all"), 21, 3))
    params = shapes_of(config)
    make = lambda p: first_state(recipe, {"student": p, "critic": p})
    state, spec = jax.eval_shape(make, params), jax.ShapeDtypeStruct
    cond = Conditioning(spec((1, 512, 4096), jnp.float32))
    batch = Batch(cond, video=spec((1, 21, 60, 104, 16), jnp.float32))
    frozen = {"teacher": params, "null_text": spec((1, 512, 4096), jnp.float32)}
    call = jax.eval_shape(lambda: Call(jax.random.key(0), jnp.int32(0), None))
    run = lambda s, f, b, c: train_step(stage, UPDATES[who], s, f, b, c)
    after, metrics = jax.eval_shape(run, state, frozen, batch, call)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    moved = jax.tree.leaves(after.learners["student"].params)
    assert {x.dtype for x in moved} == {np.dtype(np.float32)}
    assert all(metric.shape == () for metric in metrics.values())
