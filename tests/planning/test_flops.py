"""Closed forms against the counts of Wan's files, against derivations by hand, and against traces
of the programs.
"""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import longlive, sc_dmd, self_forcing
from salt_jax.config.reading import read_recipe
from salt_jax.models import vae
from salt_jax.models.attention import choose_kernel, is_flash
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.presets import PRESETS, Compute, Remat
from salt_jax.models.visibility import chunk_pairs
from salt_jax.models.wan import Inputs, apply_wan
from salt_jax.planning.bench import random_batch
from salt_jax.planning.flops import (
    forward_flops,
    gradient_flops,
    image_tokens,
    params_count,
    remade,
    sweep,
    traced_flops,
    update_flops,
)
from salt_jax.planning.memory import fresh_state
from salt_jax.planning.updates import programs
from salt_jax.rollout.draws import Terms, draw_rollout
from salt_jax.stages import make_stage
from salt_jax.stages.distil_passes import mean_mix, mix_of
from salt_jax.stages.stage import Update
from salt_jax.train.step import Call, train_step
from salt_jax.types import Conditioning
from tests.helpers import shapes_of

S = jax.ShapeDtypeStruct
SMALL, LARGE, IMAGE = (PRESETS[f"wan2.1-{name}"] for name in ("t2v-1.3b", "t2v-14b", "i2v-14b"))
TOKENS = 21 * 30 * 52  # 480p, 81 frames
NEAR = 1e-3
ALL = CachePolicy(3, 3, 0, 0, "absolute")


@functools.cache
def recipe(config, variant, **changes):
    made = config.get_config(variant)
    made.update_from_flattened_dict(
        {"batch_size": 1} | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return read_recipe(made)


def mean_flops(r, learner, flash=True):
    """Of an update in the mean of a run."""
    return update_flops(r, make_stage(r).mean_passes(learner), flash)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_that_are_made(preset):
    shapes = shapes_of(PRESETS[preset])
    assert params_count(PRESETS[preset]) == sum(x.size for x in jax.tree.leaves(shapes))


def test_parameters_are_those_of_the_published_files():
    counts = [params_count(c) for c in (SMALL, LARGE, IMAGE)]
    assert counts == [1_418_996_800, 14_288_491_584, 16_394_878_784]


@pytest.mark.parametrize(
    ("config", "queries", "keys", "image", "flops"),
    [
        (SMALL, TOKENS, TOKENS, 0, 2.83e14),
        (LARGE, TOKENS, TOKENS, 0, 1.678e15),
        (IMAGE, TOKENS, TOKENS, 257, 1.686e15),
        (SMALL, 75_600, 75_600, 0, 1.25e15),
        (LARGE, 75_600, 75_600, 0, 6.52e15),
        (IMAGE, 75_600, 75_600, 257, 6.54e15),
        (SMALL, 4680, TOKENS, 0, 4.06e13),
    ],
)
def test_a_forward_costs_what_was_derived_by_hand(config, queries, keys, image, flops):
    """To the digits given: 3 or 4 (derived for this project from the layers' shapes)."""
    work = forward_flops(config, queries, keys, 512, image)
    assert work.total == pytest.approx(flops, rel=2.5e-3)


def test_a_clip_chunk_by_chunk():
    pairs = chunk_pairs(ALL, 21)
    assert pairs == [(3, 3 * i) for i in range(1, 8)]
    assert sweep(SMALL, (60, 104), pairs).total == pytest.approx(1.99e14, rel=5e-3)
    # The text once; a derivation that reads it in each of 5 x 7 calls says 9.96e14.
    again = sum(forward_flops(SMALL, 4680, 1560 * k, 512, 0).total for _, k in pairs)
    assert 5 * again == pytest.approx(9.96e14, rel=2e-3)
    half = sweep(SMALL, (60, 104), [(21, 21)]).attention - 4 * TOKENS * 512 * 1536 * 30
    causal = sweep(SMALL, (60, 104), pairs).attention - 4 * TOKENS * 512 * 1536 * 30
    assert causal / half == pytest.approx(4 / 7)


def test_windows_and_videos_under_way_bound_what_chunks_see():
    window = CachePolicy(3, 3, 12, 3, "absolute")
    assert [k for _, k in chunk_pairs(window, 21)] == [3, 6, 9, 12, 12, 12, 12]
    assert chunk_pairs(window, 6, before=9) == [(3, 12), (3, 12)]
    assert chunk_pairs(CachePolicy(4, 1, 0, 0, "absolute"), 9) == [(1, 1), (4, 5), (4, 9)]


def network_shapes(c, frames, height, width):
    cond = Conditioning(S((1, c.text_length, c.text_dim), jnp.float32))
    if c.image_dim:
        image = S((1, image_tokens(c), c.image_dim), jnp.float32)
        channels = S((1, frames, height, width, c.condition_channels), jnp.float32)
        cond = cond._replace(image=image, channels=channels)
    params = shapes_of(c)
    x = S((1, frames, height, width, c.in_channels), jnp.float32)
    return params, x, S((1,), jnp.float32), cond


def velocity(c, compute):
    """The network as a function of its arrays."""
    return lambda p, x, t, cond: apply_wan(p, Inputs(x, t, cond), c, compute)


@pytest.mark.slow
@pytest.mark.parametrize(
    "c", [SMALL, IMAGE, PRESETS["wan2.1-i2v-tiny"]], ids=["1.3b", "i2v-14b", "i2v-tiny"]
)
def test_a_forward_costs_what_its_trace_multiplies(c):
    """All that the closed form leaves out is the time MLP."""
    size, run = (21, 60, 104), velocity(c, Compute(jnp.bfloat16, kernel="plain"))
    time = 2 * (c.freq_dim * c.dim + 7 * c.dim**2)
    found = traced_flops(run, *network_shapes(c, *size)) - time
    assert found == pytest.approx(sweep(c, size[1:], [(21, 21)]).total, rel=1e-9)


@pytest.mark.slow
@pytest.mark.optimized
def test_xla_counts_the_same_products_in_one_block():
    """And a few percent of elementwise work.

    Of a scan it counts one turn, so the network has one block.
    """
    c = dataclasses.replace(
        SMALL, dim=256, num_heads=4, ffn_dim=1024, num_layers=1, text_length=32, text_dim=64
    )
    compiled = jax.jit(velocity(c, Compute())).lower(*network_shapes(c, 4, 16, 16)).compile()
    work = sweep(c, (16, 16), [(4, 4)])
    assert 1 < compiled.cost_analysis()["flops"] / work.total < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["plain", "blocks"])
@pytest.mark.parametrize("remat", get_args(Remat))
def test_a_gradient_costs_what_its_trace_multiplies(remat, kernel):
    network = velocity(SMALL, Compute(jnp.bfloat16, remat, kernel=kernel))
    run = lambda *args: network(*args).sum()
    work = sweep(SMALL, (60, 104), [(21, 21)])
    found = traced_flops(jax.grad(run), *network_shapes(SMALL, 21, 60, 104))
    again = remade(remat, work, kernel != "plain")
    assert found == pytest.approx(
        work.total + again + gradient_flops(work, kernel != "plain"), rel=2e-3
    )


def test_a_trace_counts_scans_as_often_as_they_run_loops_as_told_and_convolutions():
    a, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    scan = lambda a: jax.lax.scan(lambda x, _: (x @ w, None), a, None, length=5)[0]
    assert traced_flops(scan, a) == 5 * 2 * 3 * 4 * 4
    loop = lambda a, n: jax.lax.fori_loop(0, n, lambda i, x: x @ w, a)
    assert traced_flops(loop, a, 2, loops=7) == 7 * 2 * 3 * 4 * 4
    branch = lambda p, a: jax.lax.cond(p, lambda a: a @ w, lambda a: a, a)
    assert traced_flops(branch, True, a) == 2 * 3 * 4 * 4
    x, kernel = jnp.ones((2, 9, 5)), jnp.ones((3, 5, 7))
    conv = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert traced_flops(conv, x) == 2 * (2 * 7 * 7) * 3 * 5


@pytest.mark.slow
def test_decoding_81_frames_costs_what_was_estimated():
    config = vae.PRESETS["wan2.1"]
    params = shapes_of(config, vae.init_vae)
    decode = lambda p, z: vae.decode_video(p, z, config, jnp.bfloat16)
    assert traced_flops(decode, params, S((1, 21, 60, 104, 16), jnp.float32)) == pytest.approx(
        275e12, rel=0.02
    )


# Updates, in TFLOP, by the arithmetic of one clip of 81 frames at 480p: student and critic 1.3B,
# teacher 14B with guidance, flash attention, remat (derived by hand for this project).


def tera(parts):
    return {name: flops / 1e12 for name, flops in parts.items()}


def test_self_forcing_costs_what_was_derived_by_hand():
    r = recipe(self_forcing, "wan")
    student, critic = (tera(mean_flops(r, who)) for who in ("student", "critic"))
    near = lambda value: pytest.approx(value, rel=5e-3)
    assert student["student: rollout"] == critic["student: rollout"] == near(693)
    assert student["student: replay, backward"] + student["student: recompute"] == near(651)
    assert student["critic: score"] == near(283) and student["teacher: score"] == near(3357)
    # The derivation makes the exit step once, with gradient; a replay makes it again.
    once = sum(student.values()) - student["student: replay, forward"]
    assert once == near(4983) and student["student: replay, forward"] == near(198)
    assert critic["critic: backward"] + critic["critic: recompute"] == near(948)
    assert sum(critic.values()) == near(1924)
    assert once + 5 * sum(critic.values()) == near(14601)


def test_salt_costs_what_was_derived_by_hand():
    plain, r = (recipe(self_forcing, v, align__probability=1.0) for v in ("wan", "wan,salt,paper"))
    mix = mean_mix(r)
    parts, less = (tera(mean_flops(x, "student")) for x in (r, plain))
    assert parts["student: rollout"] - less["student: rollout"] == pytest.approx(119, rel=0.01)
    assert parts["student: reference rollout"] == pytest.approx(911, rel=0.01)
    # K = 8 in 2 of 5 updates, and 7 of its 8 levels begin a triple.
    assert mix.self_consistency == pytest.approx(0.4 * 7 / 8) and mix.alignment == pytest.approx(
        0.6
    )
    terms = (
        sum(f for name, f in parts.items() if "self-consistency" in name)
        + 0.35 * less["student: recompute"]
    )
    assert terms == pytest.approx(0.35 * (198 + 651), rel=0.01)
    # Two looks through 18 of 30 layers, in 3 of 5 updates.
    looked = sweep(dataclasses.replace(SMALL, num_layers=18), (60, 104), [(21, 21)])
    assert parts["features: forward"] == pytest.approx(2 * 0.6 * looked.total / 1e12)


def test_without_rollouts_an_update_costs_what_was_derived_by_hand():
    """Student 1,230 and scores 849: three evaluations of 1.3B without guidance of the critic."""
    r = recipe(sc_dmd, "wan,dmd8")
    parts = tera(mean_flops(r, "student"))
    scores = {name: parts.pop(name) for name in ("critic: score", "teacher: score")}
    assert sum(parts.values()) == pytest.approx(1230, rel=5e-3)
    assert sum(scores.values()) == pytest.approx(849, rel=5e-3)
    assert sum(mean_flops(r, "critic").values()) / 1e12 == pytest.approx(1513, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "variant", "context"),
    [
        (self_forcing, "wan,salt", "clean"),
        (longlive, "wan,salt", "last_step"),
        (longlive, "wan,salt", "clean"),
        (sc_dmd, "wan", "clean"),
    ],
)
def test_the_mean_is_that_of_many_draws(config, variant, context):
    """Every call counts as the student's: all of them draw alike."""
    r = recipe(config, variant)
    r = dataclasses.replace(r, memory=dataclasses.replace(r.memory, context=context))
    if r.video == "rollout":
        calls = (draw_rollout(r, r.iterations, call) for call in range(4000))
        drawn = [mix_of(r, Update("student", terms), draw) for terms, draw in calls]
    else:
        drawn = [mix_of(r, *make_stage(r).updates(r.iterations)[0])]
    found = np.mean(drawn, axis=0)
    np.testing.assert_allclose(found, np.array(mean_mix(r)), rtol=0.08, atol=1e-6)


# Whole updates against their traces. A trace shows what XLA's attention multiplies: in a rollout
# all slots of the cache, filled or not. So the count of the rollouts is replaced by that, and
# nothing else. The attention of a CPU makes its scores again for a gradient, as flash kernels do.

FLASH = is_flash(choose_kernel("cpu", jnp.bfloat16, 128))


def short(config, variant="plain", **changes):
    sizes = {
        "data__clip": (6, 60, 104),
        "teacher__preset": "",
        "teacher__weights": "",
        "batch_size": 2,
    }
    return recipe(config, variant, **(sizes | changes))


def trace(stage, update, draw, loops):
    state, frozen = jax.eval_shape(lambda: fresh_state(stage))
    batch = jax.eval_shape(lambda: random_batch(stage))
    key = jax.eval_shape(lambda: jax.random.key(0))
    run = lambda *args: train_step(stage, update, *args)
    call = Call(key, S((), jnp.int32), draw)
    return traced_flops(run, state, frozen, batch, call, loops=loops)


def dense(r, evaluations):
    """A rollout in which every evaluation works off all slots."""
    frames = r.clip_shape[0]
    work = sweep(r.wan, r.clip_shape[1:3], [(n, frames + n) for n in r.memory.sizes(frames)])
    return r.batch_size * (work.context + evaluations * (work.linear + work.attention))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "kind"),
    [
        ("student", "plain"),
        ("student", "self_consistency"),
        ("student", "alignment"),
        ("critic", "plain"),
        ("critic", "last_step"),
    ],
)
def test_updates_with_rollouts_cost_what_their_traces_multiply(who, kind):
    """Where the last step is the context, its chunk is not read once more."""
    r = short(self_forcing, "wan,salt")
    last = kind == "last_step"
    context = "last_step" if last else "clean"
    r = dataclasses.replace(r, memory=dataclasses.replace(r.memory, context=context))
    stage = make_stage(r)
    kinds = {"plain": Terms(), "self_consistency": Terms(True), "alignment": Terms(False, True)}
    update = Update(who, kinds.get(kind, Terms()))
    draw = programs(stage)[update]
    evaluations = int(draw.exit_step) + 1 + (not last)
    parts = update_flops(r, stage.passes(update, draw), FLASH)
    rollouts = sum(f for name, f in parts.items() if name.endswith("rollout"))
    # One number stands for all loops of a trace: here both rollouts go round as often as the first
    # one.
    times = 1 + update.terms.alignment
    expected = sum(parts.values()) - rollouts + times * dense(r, evaluations)
    # Of features, whose weights get no gradient, a block's last product need not be made again.
    near = 1e-2 if update.terms.alignment else NEAR
    # The rest: the time MLP, heads of features, and that text has neither a gradient nor its MLP
    # made again.
    assert trace(stage, update, draw, evaluations - 1) == pytest.approx(expected, rel=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher_forcing", "ode_regression", "consistency", "shortcut"])
def test_stages_cost_what_their_traces_multiply(name):
    r = short(sc_dmd if name == "shortcut" else self_forcing, "wan", stage=name)
    stage, update = make_stage(r), Update("student")
    assert stage.learners == ("student",) and programs(stage) == {update: None}
    expected = sum(update_flops(r, stage.passes(update, None), FLASH).values())
    assert expected == sum(mean_flops(r, "student", FLASH).values())
    assert trace(stage, update, None, 1) == pytest.approx(expected, rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["wan", "wan,dmd8"])
def test_updates_on_noised_clips_cost_what_their_traces_multiply(variant):
    r = short(sc_dmd, variant)
    stage = make_stage(r)
    updates = programs(stage)
    assert set(updates) == {Update("student", Terms(variant == "wan")), Update("critic")}
    for update, draw in updates.items():
        expected = sum(update_flops(r, stage.passes(update, draw), FLASH).values())
        assert expected == sum(mean_flops(r, update.moves, FLASH).values())
        assert trace(stage, update, draw, 1) == pytest.approx(expected, rel=NEAR)
