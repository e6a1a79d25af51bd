"""Losses of a student that works chunk by chunk, assembled by hand, and streams."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from salt_jax.config.sections import Lora
from salt_jax.flow.prediction import guide
from salt_jax.flow.schedule import grid, triples
from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.kv_cache import trim
from salt_jax.models.lora import init_lora, merge
from salt_jax.rollout.causal import Origin, Steps, recache, rollout
from salt_jax.rollout.draws import Terms, draw_chunk_triples, draw_rollout
from salt_jax.rollout.replay import plan_diffusion_forcing, plan_replay, replay
from salt_jax.stages.stage import Update
from salt_jax.stages.start import as_steps, self_rollout
from salt_jax.state import first_state
from salt_jax.train.step import Call, train_step
from salt_jax.types import Conditioning
from tests.helpers import assert_all_moved, close, randomised, same_bits
from tests.stages.small import (
    ALIGNED,
    BASE,
    BATCH,
    CLIP,
    CONSISTENT,
    CRITIC,
    EMA,
    FROZEN,
    KEY,
    NETWORK,
    NULL,
    PLAIN,
    RECIPE,
    ROLLING,
    STREAM,
    STUDENT,
    TEACHER,
    UNALIGNED,
    Judge,
    batch_of,
    causal_state,
    clipped,
    compiled,
    critic_stepped,
    distil,
    drawn,
    exits,
    gradient,
    run,
    streamed,
    student_stepped,
    switch_of,
    with_first_critic,
)

# The losses once more, by hand. What is differentiated is `p`; all else is a constant and needs no
# stopping.

judge = Judge().denoise


def view_of(x0, key):
    """Levels and noise of the view, and the noised copy."""
    k_sigma, k_noise = jax.random.split(key)
    u = jax.random.uniform(k_sigma, (BATCH,))
    sigma, noise = (
        jnp.clip(5.0 * u / (1 + 4.0 * u), 0.02, 0.98),
        jax.random.normal(k_noise, x0.shape),
    )
    level = sigma.reshape(-1, 1, 1, 1, 1)
    return (1 - level) * x0 + level * noise, sigma, noise


def judged(p, video, plan, start, before, cond, k_renoise):
    """DMD and self-consistency of a video whose update began at `start` = (x, sigma, sigma_m,
    sigma_e), [B, F].
    """
    x, s, m, e = start
    view, sigma, _ = view_of(
        jnp.concatenate([before, jax.lax.stop_gradient(video.x0)], 1), k_renoise
    )
    null = cond._replace(text=NULL.repeat(BATCH, 0))
    teacher = guide(*(judge(TEACHER, view, sigma, told) for told in (cond, null)), 2.0)
    x0_teacher, x0_critic = (
        said.x0[:, before.shape[1] :] for said in (teacher, judge(CRITIC, view, sigma, cond))
    )
    x_m = x - (s - m)[..., None, None, None] * video.velocity
    v_m = NETWORK.denoise(p, x_m, m, cond, plan).velocity
    consistency = self_consistency_loss(video.velocity, v_m, s, m, e, "none", "one")
    return dmd_loss(video.x0, x0_critic, x0_teacher).mean(), consistency.mean()


def made_by(params, cond, key, steps, cache, recipe):
    """The student's rollout in an update with this key, and the frames before it that the teacher
    sees.
    """
    overlap = 0 if cache is None else recipe.stream.overlap
    keys, shape = jax.random.split(jax.random.split(key)[0], BATCH), (CLIP[0] - overlap, *CLIP[1:])
    made = rollout(NETWORK, params, Origin(cond, cache), steps, keys, shape, recipe.memory)
    return made, (made.x[:, :0] if cache is None else cache.x0[:, -overlap:])


@functools.partial(jax.jit, static_argnames="recipe")
def student_by_hand(params, cond, draw, cache, weights, recipe):
    """Value, terms and gradient of the loss of a student's update."""
    _, k_renoise = jax.random.split(KEY)
    own = recipe.rollout.first_steps  # of the first chunk, whose reference runs all of them
    first, last = (
        Steps(draw.first_levels, at, "cm") if own else None for at in (draw.first_exit, own - 1)
    )
    steps = Steps(draw.levels, draw.exit_step, "cm", first)
    longer = Steps(draw.reference_levels, draw.reference_exit, "cm", last)
    made, before = made_by(params, cond, KEY, steps, cache, recipe)
    better, _ = made_by(params, cond, KEY, longer, cache, recipe)
    level = lambda value: jnp.full(made.x.shape[:2], value)
    levels = level(draw.levels[draw.exit_step])
    levels = levels.at[:, :2].set(draw.first_levels[draw.first_exit]) if own else levels
    start = (made.x, levels, level(draw.sigma_m), level(draw.sigma_e))
    looks = BASE if recipe.align.network == "base" else params

    def look(x0):
        view, sigma, _ = view_of(jnp.concatenate([before, x0], 1), k_renoise)
        seen = NETWORK.features(looks, view, sigma, cond, recipe.align.layers)
        return seen[:, before.shape[1] :]

    def loss(p):
        video = replay(NETWORK, p, made, cond, recipe.memory)
        plan = plan_replay(made, recipe.memory)
        terms = judged(p, video, plan, start, before, cond, k_renoise)
        alignment, _ = cache_alignment_loss(look(video.x0), look(better.x0), recipe.align.margin)
        terms = dict(
            zip(("dmd", "self_consistency", "alignment"), (*terms, alignment.mean()), strict=True)
        )
        return sum(weights[name] * term for name, term in terms.items()), terms

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_by_hand(after, metrics, by_hand, weights):
    """A student's update had these terms and this gradient."""
    (_, terms), slope = by_hand
    for name, weight in weights.items():
        if weight:
            np.testing.assert_allclose(metrics[name], terms[name], rtol=1e-4, err_msg=name)
            assert name == "dmd" or weight * terms[name] > 0.02 * terms["dmd"], (
                f"too little {name} to be tested"
            )
        else:
            assert name not in metrics
    slope, norm = clipped(slope)
    np.testing.assert_allclose(metrics["student_grad_norm"], norm, rtol=1e-3)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    close(gradient(after.learners["student"]), slope, rtol=1e-3, atol=2e-4 * largest)


def weights_of(terms):
    return {
        "dmd": 1.0,
        "self_consistency": 20.0 * terms.self_consistency,
        "alignment": 20.0 * terms.alignment,
    }


@pytest.mark.parametrize("terms", [CONSISTENT, pytest.param(ALIGNED, marks=pytest.mark.slow)])
def test_a_student_step_follows_the_gradient_of_the_terms_assembled_by_hand(terms):
    """The rollout, the alignment's reference and the network that judges it are constants of that
    gradient.
    """
    weights = weights_of(terms)
    cond, draw = batch_of(0).cond, drawn(*exits(terms))
    by_hand = student_by_hand(STUDENT, cond, draw, None, weights, RECIPE)
    assert_by_hand(*student_stepped(terms), by_hand, weights)


def test_a_new_video_begins_where_it_was_drawn():
    """With cyclic positions, and so do all that go on from it. Nobody is asked for the numbers."""
    memory = replace(ROLLING, positions="cyclic", period=6, context="last_step")
    recipe = replace(STREAM, memory=memory)
    draw = drawn(2, 1, recipe)._replace(start=np.int32(4))

    @jax.jit
    def numbers(params, draw):
        keys, steps = jax.random.split(KEY, BATCH), as_steps(draw, recipe)
        begins = Origin(batch_of(0).cond, start=draw.start)
        made = self_rollout(NETWORK, params, begins, steps, keys, recipe)
        goes_on = Origin(begins.cond, trim(made.cache, memory))
        more = self_rollout(NETWORK, params, goes_on, steps, keys, recipe)
        return made.cache.frames, more.cache.frames, plan_replay(more, memory).frames

    first, then, new = numbers(STUDENT, draw)
    np.testing.assert_array_equal(first, 4 + np.arange(6))
    np.testing.assert_array_equal(then, [4, 5, 8, 9, 10, 11, 12, 13])
    np.testing.assert_array_equal(new, [10, 11, 12, 13])


@pytest.mark.slow
def test_a_student_that_judges_its_own_features_is_not_moved_by_them():
    recipe = replace(RECIPE, align=replace(RECIPE.align, network="student"))
    step, weights = compiled(Update("student", ALIGNED), recipe), weights_of(ALIGNED)
    stepped = run(step, causal_state(), batch_of(0), drawn(2, 1))
    by_hand = student_by_hand(STUDENT, batch_of(0).cond, drawn(2, 1), None, weights, recipe)
    assert_by_hand(*stepped, by_hand, weights)


@pytest.mark.slow
def test_a_first_chunk_with_updates_of_its_own_exits_at_a_level_of_its_own():
    """Causal Forcing's: four at the first chunk, fewer after it; its reference takes all of
    them.
    """
    recipe = replace(
        RECIPE,
        rollout=replace(RECIPE.rollout, first_steps=3),
        loss=replace(RECIPE.loss, self_consistency=0.0),
    )
    draw, weights = drawn(2, 1, recipe), weights_of(ALIGNED)
    assert draw.first_levels[draw.first_exit] != draw.levels[draw.exit_step]
    step = compiled(Update("student", ALIGNED), recipe)
    stepped = run(step, causal_state(), batch_of(0), draw)
    by_hand = student_by_hand(STUDENT, batch_of(0).cond, draw, None, weights, recipe)
    assert_by_hand(*stepped, by_hand, weights)


def test_without_its_weight_a_term_is_not_drawn():
    off = replace(
        RECIPE,
        loss=replace(RECIPE.loss, self_consistency=0.0),
        align=replace(RECIPE.align, weight=0.0),
    )
    late = replace(RECIPE, align=replace(RECIPE.align, start=50))
    chosen = lambda recipe, iteration: {
        draw_rollout(recipe, iteration, call)[0] for call in range(60)
    }
    assert chosen(RECIPE, 0) == {PLAIN, CONSISTENT, ALIGNED}
    assert chosen(off, 0) == {PLAIN}
    assert chosen(late, 49) == {PLAIN, CONSISTENT} and chosen(late, 50) == {
        PLAIN,
        CONSISTENT,
        ALIGNED,
    }


@pytest.mark.slow
def test_a_consistency_of_weight_zero_has_no_effect():
    """Also where the program computes it."""
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, self_consistency=0.0))
    args = (causal_state(), batch_of(0), drawn(4, 1))
    with_it, metrics = run(compiled(Update("student", CONSISTENT), recipe), *args)
    without, _ = run(compiled(Update("student", PLAIN)), *args)
    assert metrics["self_consistency"] > 0
    found, wanted = (gradient(state.learners["student"]) for state in (with_it, without))
    close(found, wanted, atol=1e-5)


@functools.partial(jax.jit, static_argnames="recipe")
def critic_by_hand(params, cond, draw, cache, recipe):
    """Value and gradient of flow matching on what the student's rollout ends in."""
    steps = Steps(draw.levels, draw.exit_step, "cm")
    made, before = made_by(STUDENT, cond, KEY, steps, cache, recipe)
    view, sigma, noise = view_of(jnp.concatenate([before, made.x0], 1), jax.random.split(KEY)[1])
    new = slice(before.shape[1], None)

    def loss(p):
        velocity = judge(p, view, sigma, cond).velocity
        return ((velocity[:, new] - (noise[:, new] - made.x0)) ** 2).mean()

    return jax.value_and_grad(loss)(params)


def test_a_critic_step_follows_the_gradient_of_flow_matching_on_the_students_rollout():
    after, metrics = critic_stepped()
    value, slope = critic_by_hand(CRITIC, batch_of(0).cond, drawn(2, 1), None, RECIPE)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.learners["critic"]), clipped(slope)[0], rtol=1e-3)


# Streaming: an update goes on where the last one stopped.


@jax.jit
def next_frames(text, key, draw, cache):
    """The four frames that an update of a sequence makes."""
    steps = Steps(draw.levels, draw.exit_step, "cm")
    return made_by(STUDENT, Conditioning(text), key, steps, cache, STREAM)[0].x0


@pytest.mark.slow
def test_frames_go_on_and_the_cache_keeps_its_size_the_sink_and_the_end():
    """Clips of six frames, of which two were there before: each update makes four."""
    for places, numbers in (
        (("new",), [0, 1, 4, 5]),
        (("new", "on"), [0, 1, 8, 9]),
        (("new", "on", "switch"), [0, 1, 12, 13]),
        (("new", "on", "new"), [0, 1, 4, 5]),
    ):
        cache = streamed(*places).stream.cache
        np.testing.assert_array_equal(cache.frames, numbers)
        assert (int(cache.end), int(cache.filled)) == (numbers[-1] + 1, 4)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        streamed("new", "on", "switch").stream, causal_state(STREAM).stream
    )
    first, later = (streamed(*places).stream.cache for places in (("new",), ("new", "on")))
    for name in ("k", "v"):
        np.testing.assert_array_equal(
            getattr(first, name)[:, :, :2], getattr(later, name)[:, :, :2]
        )
        assert not np.any(getattr(first, name)[:, :, 2:] == getattr(later, name)[:, :, 2:])


@pytest.mark.slow
def test_a_prompt_is_carried_on_and_replaced_by_a_switch():
    """Batch i belongs to update i: one that goes on does not look at its captions."""
    for places, number in (
        (("new",), 0),
        (("new", "on"), 0),
        (("new", "on", "switch"), 2),
        (("new", "on", "new"), 2),
    ):
        np.testing.assert_array_equal(streamed(*places).stream.text, batch_of(number).cond.text)


@pytest.mark.slow
def test_a_switch_takes_the_prompt_that_is_paired_with_the_videos_own():
    """Of the batch with which the video began, whatever batches came since; frames follow it."""
    for places, text in (
        (("new", "on"), batch_of(0).cond.text),
        (("new", "on", "switch"), switch_of(0)),
        (("new", "switch", "new"), batch_of(2).cond.text),
        (("new", "switch", "new", "switch"), switch_of(2)),
    ):
        stream = streamed(*places, paired=True).stream
        np.testing.assert_array_equal(stream.text, text)
        np.testing.assert_array_equal(stream.switch, switch_of(2 * places[2:].count("new")))
    before, after = (streamed(*p, paired=True).stream for p in (("new",), ("new", "switch")))
    cond = Conditioning(switch_of(0))
    cache = jax.jit(lambda cache: recache(NETWORK, STUDENT, cache, cond, ROLLING))(before.cache)
    key, draw = jax.random.fold_in(jax.random.key(7), 1), drawn(4, 3)
    made = next_frames(cond.text, key, draw, cache)
    np.testing.assert_allclose(after.cache.x0[:, 2:], made[:, 2:], atol=1e-4)


@pytest.mark.slow
def test_a_sequence_goes_on_on_its_own_cache():
    """The frames of the second update are those of a rollout on the cache and the prompt of the
    first.
    """
    before, after = streamed("new").stream, streamed("new", "on").stream
    key, draw = jax.random.fold_in(jax.random.key(7), 1), drawn(4, 3)
    again = lambda text: next_frames(text, key, draw, before.cache)
    np.testing.assert_allclose(after.cache.x0[:, 2:], again(before.text)[:, 2:], atol=1e-4)
    np.testing.assert_array_equal(after.cache.x0[:, :2], before.cache.x0[:, :2])
    assert np.abs(after.cache.x0[:, 2:] - again(batch_of(1).cond.text)[:, 2:]).max() > 1e-3


@pytest.mark.slow
def test_a_new_sequence_looks_at_nothing_that_was_and_others_do():
    step = lambda place, state: run(
        compiled(Update("critic", Terms(sequence=place)), STREAM), state, batch_of(1), drawn(4, 3)
    )
    state = streamed("new", "on")
    other = replace(state, stream=jax.tree.map(lambda x: x + jnp.ones_like(x), state.stream))
    same_bits(step("new", state), step("new", other))
    cache = state.stream.cache
    for name in ("k", "v", "x0"):
        changed = cache.replace(**{name: getattr(cache, name) + 1.0})
        changed = replace(state, stream=replace(state.stream, cache=changed))
        assert step("on", changed)[1]["critic"] != step("on", state)[1]["critic"], (
            f"{name} is not read"
        )


@pytest.mark.slow
def test_a_switch_reads_the_cached_frames_again_under_the_new_prompt():
    before, after = streamed("new", "on").stream, streamed("new", "on", "switch").stream
    cond = batch_of(2).cond
    cache = jax.jit(lambda cache: recache(NETWORK, STUDENT, cache, cond, ROLLING))(before.cache)
    for name in ("k", "v"):
        sink = np.asarray(getattr(after.cache, name)[:, :, :2])
        np.testing.assert_allclose(sink, getattr(cache, name)[:, :, :2], atol=1e-4)
        assert np.all(np.abs(sink).max(axis=(3, 4, 5)) > 0.1), "the sink is kept, not zeroed"
        assert (
            np.abs(sink[1] - getattr(before.cache, name)[1, :, :2]).max() > 1e-2
        )  # the first layer knows no text
    np.testing.assert_array_equal(after.cache.x0[:, :2], before.cache.x0[:, :2])
    key, draw = jax.random.fold_in(jax.random.key(7), 2), drawn(4, 3)
    made = next_frames(cond.text, key, draw, cache)
    np.testing.assert_allclose(after.cache.x0[:, 2:], made[:, 2:], atol=1e-4)


@pytest.mark.slow
def test_teacher_and_critic_see_the_overlap_and_judge_what_is_new():
    """Of a student's update and of a critic's, assembled by hand as above."""
    terms, state = Terms(True, True, "on"), with_first_critic(streamed("new"))
    stream, batch, draw = state.stream, batch_of(1), drawn(4, 1)
    after, metrics = run(compiled(Update("student", terms), STREAM), state, batch, draw)
    args = (Conditioning(stream.text), draw, stream.cache)
    weights = weights_of(terms)
    assert_by_hand(after, metrics, student_by_hand(STUDENT, *args, weights, STREAM), weights)
    np.testing.assert_array_equal(after.stream.text, stream.text)
    np.testing.assert_array_equal(after.stream.cache.frames, [0, 1, 8, 9])
    after, metrics = run(
        compiled(Update("critic", Terms(sequence="on")), STREAM), state, batch, draw
    )
    value, slope = critic_by_hand(CRITIC, *args, STREAM)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.learners["critic"]), clipped(slope)[0], rtol=1e-3)
    frames = (args[-1].replace(x0=stream.cache.x0.at[:, -2:].add(1.0)), STREAM)
    assert abs(critic_by_hand(CRITIC, *args[:2], *frames)[0] - value) > 1e-3, (
        "the overlap makes no difference"
    )


# A level for each chunk, as CausVid trains.

CHUNKS = replace(UNALIGNED, video="noised_chunks")


@jax.jit
def chunks_by_hand(params, batch):
    """((DMD, self-consistency), gradient), and (value, gradient) of the critic."""
    cond, x0 = batch.cond, batch.video
    k_video, k_renoise = jax.random.split(KEY)
    k_triple, k_noise = jax.random.split(k_video)
    triple = draw_chunk_triples(k_triple, BATCH, (2, 2, 2), grid(4, 2.0), triples(4, 2))
    plan = plan_diffusion_forcing(6, CHUNKS.memory)
    level = triple.sigma_s[..., None, None, None]
    x = (1 - level) * x0 + level * jax.random.normal(k_noise, x0.shape)

    def loss(p):
        video = NETWORK.denoise(p, x, triple.sigma_s, cond, plan)
        terms = judged(p, video, plan, (x, *triple[:3]), x[:, :0], cond, k_renoise)
        return terms[0] + 20 * terms[1], dict(zip(("dmd", "self_consistency"), terms, strict=True))

    def critic_loss(p):
        x0 = NETWORK.denoise(params, x, triple.sigma_s, cond, plan).x0
        view, sigma, noise = view_of(x0, k_renoise)
        return ((judge(p, view, sigma, cond).velocity - (noise - x0)) ** 2).mean()

    return jax.value_and_grad(loss, has_aux=True)(params), jax.value_and_grad(critic_loss)(CRITIC)


@pytest.mark.slow
def test_noised_chunks_are_trained_at_levels_of_their_own_seeing_earlier_ones_as_they_are():
    moves_student = Update("student", CONSISTENT)
    assert distil(CHUNKS).updates(0)[0] == (moves_student, None)
    student, (value, slope) = chunks_by_hand(STUDENT, batch_of(0))
    after, metrics = run(compiled(moves_student, CHUNKS), causal_state(), batch_of(0), None)
    assert_by_hand(after, metrics, student, {"dmd": 1.0, "self_consistency": 20.0})
    after, metrics = run(compiled(Update("critic"), CHUNKS), causal_state(), batch_of(0), None)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.learners["critic"]), clipped(slope)[0], rtol=1e-3)


# Adapters: the networks stand still, their products move.

ADAPTED = replace(UNALIGNED, video="noised", lora=Lora(rank=4, alpha=8.0))


def adapted_state():
    """As in the middle of a run: no product is zero, and the two are not the same."""
    like = jax.eval_shape(lambda: init_lora(jax.random.key(0), STUDENT, 4))
    learners = {"student": randomised(like, 11), "critic": randomised(like, 12)}
    state = first_state(ADAPTED, learners)
    return replace(state, iteration=jnp.int32(3), ema=randomised(like, 13))


@pytest.mark.slow
def test_adapters_move_what_they_are_and_stand_on_the_networks_that_they_were_made_for():
    """The student's on the student's start, the critic's on the base: values are those of the
    merged networks.
    """
    before, frozen = adapted_state(), FROZEN | {"student": EMA}
    bases = {"student": EMA, "critic": BASE}
    plain = replace(ADAPTED, lora=Lora(rank=0, alpha=0.0))
    merged = first_state(
        plain,
        {
            who: merge(base, before.learners[who].params, ADAPTED.lora)
            for who, base in bases.items()
        },
    )
    call = Call(jax.random.key(7), jnp.int32(0), None)
    for who, other, term in (("student", "critic", "dmd"), ("critic", "student", "critic")):
        step = lambda recipe, s, f, who=who: train_step(
            distil(recipe, critic=NETWORK), Update(who), s, f, batch_of(0), call
        )
        after, metrics = jax.jit(step, static_argnums=0)(ADAPTED, before, frozen)
        # The unadapted step's metrics alone: what is not asked for is not computed.
        unadapted = lambda s, f, step=step, term=term: step(plain, s, f)[1][term]
        value = jax.jit(unadapted)(merged, frozen)
        np.testing.assert_allclose(metrics[term], value, rtol=1e-4)
        chex.assert_trees_all_equal_structs(after, before)
        moved = after.learners[who].params
        assert {path[-1] for path in flatten_dict(moved)} == {"lora_a", "lora_b"}
        assert_all_moved(before.learners[who].params, moved)
        same_bits(after.learners[other], before.learners[other])
