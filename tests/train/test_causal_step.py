"""Updates of a student that works chunk by chunk: what they move, one program for all draws,
streams in the loop, eight devices, full size.
"""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.rollout.draws import Terms
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Batch, Update, Weights
from salt_jax.train.loop import Run, iterate
from salt_jax.train.step import Call, compile_step, train_step
from salt_jax.types import Conditioning
from tests.helpers import (
    assert_all_moved,
    close,
    host,
    layout,
    lies,
    same_bits,
    shapes_of,
    with_networks,
)
from tests.placing import place
from tests.stages.small import (
    ALIGNED,
    CONSISTENT,
    FROZEN,
    PLAIN,
    RECIPE,
    STREAM,
    batch_of,
    causal_state,
    compiled,
    critic_stepped,
    distil,
    drawn,
    run,
    streamed,
    student_stepped,
    with_first_critic,
)


@pytest.mark.slow
@pytest.mark.parametrize("terms", [CONSISTENT, ALIGNED])
def test_a_student_step_moves_student_ema_and_step_and_nothing_else(terms):
    before, (after, metrics) = causal_state(), student_stepped(terms)
    same_bits(after.learners["critic"], before.learners["critic"])
    assert after.stream is None and int(after.iteration) == 4
    moved = after.learners["student"].params
    assert_all_moved(before.learners["student"].params, moved)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, moved))
    more = {"self_consistency"} if terms is CONSISTENT else {"alignment", "alignment_active"}
    own = {"student_grad_norm", "student_skipped", "student_skipped_in_a_row"}
    assert set(metrics) == {"dmd", "dmd_gap"} | more | own


def test_a_critic_step_moves_the_critic_and_nothing_else():
    before, (after, metrics) = causal_state(), critic_stepped()
    for name in ("iteration", "ema", "stream"):
        same_bits(getattr(after, name), getattr(before, name))
    same_bits(after.learners["student"], before.learners["student"])
    assert_all_moved(before.learners["critic"].params, after.learners["critic"].params)
    assert set(metrics) == {
        "critic",
        "critic_grad_norm",
        "critic_skipped",
        "critic_skipped_in_a_row",
    }


# One program for each choice of terms, whatever is drawn.


@pytest.mark.slow
def test_every_choice_is_one_program_that_serves_all_numbers_of_updates_and_all_exits():
    seen, critic = {}, Update("critic", PLAIN)

    def watched(update):
        def step(*args):
            draw = jax.device_get(args[-1].draw)
            seen.setdefault(update, set()).add(
                (int(np.argmax(draw.levels == 0)), int(draw.exit_step))
            )
            return programs[update](*args)

        return step

    student = {terms: Update("student", terms) for terms in (PLAIN, CONSISTENT, ALIGNED)}
    programs = {update: compiled(update) for update in (*student.values(), critic)}
    states, frozen, over_batch, everywhere = layout(causal_state(), FROZEN)
    feed = iter([place(batch_of(i % 3), over_batch) for i in range(100)])
    key = place(jax.random.key(7), everywhere)
    run = Run(distil(), place(FROZEN, frozen), watched, key, feed)
    state = place(causal_state(), states)
    for iteration in range(14):
        with jax.transfer_guard_host_to_device("disallow"):
            state, metrics = iterate(state, run, iteration)
    assert set(seen) == set(programs)
    assert seen[critic] == {(k, i) for k in (2, 4) for i in range(k)}
    for terms, longest in ((CONSISTENT, 4), (ALIGNED, 2)):
        found = seen[student[terms]]
        assert {k for k, _ in found} == {longest} and len(found) > 1
    assert {program._cache_size() for program in programs.values()} == {1}
    assert int(state.iteration) == 17 and {"dmd", "critic", "critic_fresh"} <= set(metrics)
    assert int(metrics["student_skipped"]) == int(metrics["critic_skipped"]) == 0


def test_the_loop_gives_a_stream_to_student_and_critic_in_turn():
    """14 frames are three updates, whoever makes them: student, critic, critic."""
    seen, switches = [], []

    def record(update):
        def step(state, frozen, batch, call):
            seen.append((update.moves, update.terms.sequence))
            switches.append(bool(call.draw.switch))
            return state, {"critic": jnp.zeros(())}

        return step

    stream = replace(STREAM.stream, switch=1.0)
    stage = distil(replace(STREAM, stream=stream, critic_ratio=3))
    key = jax.device_put(jax.random.key(1), jax.devices()[0])
    run = Run(stage, {}, record, key, iter(range(100)))
    for iteration in range(6):
        iterate(causal_state(), run, iteration)
    assert [who for who, _ in seen] == ["student", "critic", "critic", "critic"] * 6
    places = [place for _, place in seen]
    for start in range(0, 24, 3):
        assert places[start : start + 3] == ["new", "on", "on"]
        assert sorted(switches[start : start + 3]) == [False, False, True] and not switches[start]


# Eight devices, and full size.

ON = Update("critic", Terms(sequence="on"))


@pytest.mark.slow
@pytest.mark.parametrize("update", [Update("student", Terms(True, True, "on")), ON])
def test_eight_devices_do_what_one_does(update):
    """Each has one video of a stream, and its share of the parameters."""
    state, sizes = with_first_critic(streamed("new")), {"data": 2, "fsdp": 4}
    sharded = compile_step(distil(STREAM), update, layout(state, FROZEN, sizes))
    args = (state, batch_of(1), drawn(4, 1))
    one, one_metrics = run(compiled(update, STREAM), *args)
    eight, metrics = run(sharded, *args, sizes=sizes)
    close(metrics, one_metrics, rtol=1e-3)
    close(host(eight), host(one), rtol=1e-3, atol=1e-4)
    lies(eight, layout(state, FROZEN, sizes)[0])
    assert eight.stream.cache.k.addressable_shards[0].data.shape[1] == 1


FULL_SIZE = [
    (Update("student", ALIGNED._replace(sequence="on")), 12),
    (ON, 12),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (Update("student", PLAIN), 0),
            (Update("student", CONSISTENT), 0),
            (Update("student", ALIGNED), 0),
            (Update("critic", PLAIN), 0),
            (Update("student", CONSISTENT._replace(sequence="on")), 12),
        )
    ),
]


@pytest.mark.parametrize(("update", "window"), FULL_SIZE)
def test_full_size_rollouts_trace(update, window):
    """480p for five seconds, chunks of three frames, bfloat16 with recomputation."""
    config = PRESETS["wan2.1-t2v-1.3b"]
    policy = CachePolicy(3, 3, window, 3 if window else 0, "relative" if window else "absolute")
    recipe = replace(
        RECIPE,
        model=replace(RECIPE.model, preset="wan2.1-t2v-1.3b"),
        data=replace(RECIPE.data, clip=(21, 60, 104)),
        batch_size=1,
        memory=policy,
        align=replace(RECIPE.align, layers=18),
        stream=replace(RECIPE.stream, max_frames=240 if window else 0, overlap=3),
        teacher=replace(RECIPE.teacher, guidance=4.0),
    )
    network = wan_denoiser(config, Compute(jnp.bfloat16, "all"), 21, 3)
    stage = with_networks(make_stage(recipe), student=network, critic=network, teacher=network)
    params = shapes_of(config)
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    null = spec(1, 512, 4096)
    state = jax.eval_shape(stage.first_state, Weights(params, None, params, params, null))
    batch = Batch(Conditioning(spec(1, 512, 4096)), video=spec(1, 21, 60, 104, 16))
    frozen = {"teacher": params, "base": params, "null_text": null}
    call = jax.eval_shape(lambda: Call(jax.random.key(0), jnp.int32(0), None))
    args = (state, frozen, batch, call._replace(draw=drawn(4, 1)))
    after, metrics = jax.eval_shape(lambda *args: train_step(stage, update, *args), *args)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert all(metric.shape == () for metric in metrics.values())
    if window:
        assert after.stream.cache.k.shape == (30, 1, 9, 30 * 52, 12, 128)
        assert after.stream.cache.k.dtype == jnp.bfloat16
