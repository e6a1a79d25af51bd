"""Steps of a student that works chunk by chunk: the losses assembled by hand, one program for all
draws, and streams.

The student is a Wan of two layers, clips are three chunks of two frames; teacher and critic judge
whole clips and may be smaller.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.config.sections import Lora
from salt_jax.flow.prediction import from_velocity
from salt_jax.flow.schedule import grid
from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.denoiser import guided, wan_network
from salt_jax.models.kv_cache import CachePolicy
from salt_jax.models.lora import init_lora, merge
from salt_jax.models.presets import PRESETS, Compute, WanConfig
from salt_jax.models.wan import init_wan
from salt_jax.rollout.causal import diffusion_forcing, recache, replay, rollout, sight_of
from salt_jax.rollout.draws import Choice, draw_chunk_plan, draw_rollout
from salt_jax.train.loop import Run, decide, iterate
from salt_jax.train.setup import empty_stream
from salt_jax.train.step import Networks, compile_step, critic_step, student_step
from tests.models.test_wan import randomised
from tests.placing import place
from tests.train import test_step
from tests.train.test_step import bits, close, host, layout, learners, toy, toy_params

OPTIMIZER = replace(test_step.OPTIMIZER, b1=1e-30)  # as good as 0, and keeps the first moment
SMALL = WanConfig(48, 2, 2, 64, 3, 3, (1, 2, 2), 8, 4, 32, 0, 1e-6)
CLIP = (6, 4, 4, 3)  # F H W C
BATCH = 8
RECIPE = read_recipe(base.get_config())
RECIPE = replace(
    RECIPE,
    video="rollout",
    batch_size=BATCH,
    data=replace(RECIPE.data, kind="latents", clip=CLIP[:3]),
    memory=CachePolicy(2, 2, 0, 0, "absolute"),
    schedule=replace(RECIPE.schedule, train_levels=4, anchor_levels=2, shift=2.0),
    rollout=replace(RECIPE.rollout, num_steps=(2, 4), probabilities=(0.5, 0.5)),
    align=replace(RECIPE.align, weight=20.0, margin=0.01, layers=1),
    loss=replace(RECIPE.loss, self_consistency=20.0),  # the terms weigh about the same
    student_optimizer=OPTIMIZER,
    critic_optimizer=OPTIMIZER,
    ema=replace(RECIPE.ema, decay=0.9, start=0),
    critic_ratio=2,
)
ROLLING = CachePolicy(
    2, 2, 6, 2, "relative"
)  # a cache of four frames: two of the sink and two before the chunk
STREAM = replace(RECIPE, memory=ROLLING, stream=replace(RECIPE.stream, max_frames=14, overlap=2))
PLAIN, CONSISTENT, ALIGNED = Choice(), Choice(self_consistency=True), Choice(alignment=True)

NETWORK = wan_network(SMALL, Compute(), CLIP[0], 2)


def judge(params, x, sigma, text):
    """A denoiser of whole clips: each frame's velocity depends on the frame before it too."""
    return from_velocity(x, toy(params, x + jnp.roll(x, 1, axis=1), sigma, text).velocity, sigma)


NETS = Networks(NETWORK, judge, judge)
NULL = jnp.zeros((1, SMALL.text_length, SMALL.text_dim))


@functools.cache
def wan(seed):
    return randomised(jax.eval_shape(lambda: init_wan(jax.random.key(0), SMALL)), seed)


STUDENT, BASE, EMA = wan(1), wan(2), wan(3)
CRITIC, TEACHER = toy_params(1, SMALL.text_dim), toy_params(2, SMALL.text_dim)
FROZEN = {"teacher": TEACHER, "base": BASE}


def causal_state(recipe=RECIPE, critic=CRITIC):
    """As in the middle of a run: no two networks are equal."""
    state = learners(recipe, STUDENT, critic)
    return replace(state, step=jnp.int32(3), ema=EMA, stream=empty_stream(recipe, NETWORK, NULL))


def batch_of(seed):
    k_video, k_text = jax.random.split(jax.random.key(seed))
    return {
        "video": jax.random.uniform(k_video, (BATCH, *CLIP), minval=-1.0),
        "text": jax.random.normal(k_text, (BATCH, SMALL.text_length, SMALL.text_dim)),
    }


@functools.cache
def drawn(updates, exit_step, recipe=RECIPE):
    """What is drawn in the first call that has so many updates and exits there."""
    r, s = recipe.rollout, recipe.schedule
    args = (r.num_steps, r.probabilities, r.first_steps, s.anchor_levels, recipe.levels, True, 0.5)
    draws = (draw_rollout(0, call, *args)[1] for call in range(1000))
    return next(
        d for d in draws if np.argmax(d.levels == 0) == updates and d.exit_step == exit_step
    )


@functools.cache
def compiled(which, choice, recipe=RECIPE):
    """A step on one device, compiled once for all tests."""
    return compile_step(
        which, NETS, recipe, layout(causal_state(recipe), FROZEN, {}), choice=choice
    )


def run(step, state, batch, draw, sizes=(), index=0):
    """One call of a compiled step as the loop makes it; `state` is copied."""
    states, frozen, over_batch, everywhere = layout(state, FROZEN, dict(sizes))
    draw = jax.tree.map(lambda z: place(z, everywhere), draw)
    return step(
        place(state, states),
        place(FROZEN, frozen),
        place(batch, over_batch),
        place(jax.random.key(7), everywhere),
        place(np.int32(index), everywhere),
        draw,
    )


KEY = jax.random.fold_in(jax.random.key(7), 0)  # of the update that `run` makes


@functools.cache
def student_stepped(choice):
    return run(compiled(student_step, choice), causal_state(), batch_of(0), drawn(*exits(choice)))


def exits(choice):
    """(K, exit step): self-consistency is trained at the longest rollout, alignment at the
    others.
    """
    return (4, 1) if choice.self_consistency else (2, 1)


@functools.cache
def critic_stepped():
    return run(compiled(critic_step, PLAIN), causal_state(), batch_of(0), drawn(2, 1))


def gradient(learner):
    """Read off the first moment after one update, which is the clipped gradient."""
    assert int(learner.opt_state[1][0].count) == 1
    return learner.opt_state[1][0].mu


def clipped(slope):
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(slope)))
    return jax.tree.map(lambda leaf: leaf * min(1.0, OPTIMIZER.clip / norm), slope), norm


# What an update moves.


def assert_all_moved(before, after):
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [CONSISTENT, ALIGNED])
def test_a_student_step_moves_student_ema_and_step_and_nothing_else(choice):
    before, (after, metrics) = causal_state(), student_stepped(choice)
    assert bits(after.critic) == bits(before.critic) and after.stream is None
    assert int(after.step) == 4
    assert_all_moved(before.student.params, after.student.params)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.student.params))
    more = {"self_consistency"} if choice is CONSISTENT else {"alignment", "alignment_active"}
    own = {"student_grad_norm", "student_skipped", "student_skipped_in_a_row"}
    assert set(metrics) == {"dmd", "dmd_gap"} | more | own


def test_a_critic_step_moves_the_critic_and_nothing_else():
    before, (after, metrics) = causal_state(), critic_stepped()
    for name in ("step", "student", "ema", "stream"):
        assert bits(getattr(after, name)) == bits(getattr(before, name)), name
    assert_all_moved(before.critic.params, after.critic.params)
    assert set(metrics) == {
        "critic",
        "critic_grad_norm",
        "critic_skipped",
        "critic_skipped_in_a_row",
    }


# Adapters: the networks stand still, their products move.

ADAPTED = replace(RECIPE, video="noised", lora=Lora(rank=4, alpha=8.0))
TWO_WANS = Networks(NETWORK, NETWORK.denoise, judge)


def adapted_state():
    """As in the middle of a run: no product is zero, and the two are not the same."""
    like = jax.eval_shape(lambda: init_lora(jax.random.key(0), STUDENT, 4))
    state = learners(ADAPTED, randomised(like, 11), randomised(like, 12))
    return replace(state, step=jnp.int32(3), ema=randomised(like, 13))


@pytest.mark.slow
def test_adapters_move_what_they_are_and_stand_on_the_networks_that_they_were_made_for():
    """The student's on the student's start, the critic's on the base: values are those of the
    merged networks.
    """
    before, frozen = adapted_state(), {"teacher": TEACHER, "base": BASE, "student": EMA}
    whole = lambda base, learner: merge(base, learner.params, ADAPTED.lora)
    plain = replace(ADAPTED, lora=Lora(rank=0, alpha=0.0))
    merged = learners(plain, whole(EMA, before.student), whole(BASE, before.critic))
    for which, who, term in ((student_step, "student", "dmd"), (critic_step, "critic", "critic")):
        step = lambda s, f, recipe: which(  # noqa: B023
            s, f, batch_of(0), KEY, None, TWO_WANS, recipe, PLAIN
        )
        after, metrics = jax.jit(step, static_argnums=2)(before, frozen, ADAPTED)
        # The unadapted step's metrics alone: what is not asked for is not computed.
        value = jax.jit(lambda s, f: step(s, f, plain)[1][term])(merged, frozen)  # noqa: B023
        np.testing.assert_allclose(metrics[term], value, rtol=1e-4)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        assert {path[-1] for path in flatten_dict(getattr(after, who).params)} == {
            "lora_a",
            "lora_b",
        }
        assert_all_moved(getattr(before, who).params, getattr(after, who).params)
        other = "critic" if who == "student" else "student"
        assert bits(getattr(after, other)) == bits(getattr(before, other))


# The losses once more, by hand. What is differentiated is `p`; all else is a constant and needs no
# stopping.


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


def judged(p, video, sight, start, before, text, k_renoise, critic):
    """DMD and self-consistency of a video whose update began at `start` = (x, sigma, sigma_m,
    sigma_e), [B, F].
    """
    x, s, m, e = start
    view, sigma, _ = view_of(
        jnp.concatenate([before, jax.lax.stop_gradient(video.x0)], 1), k_renoise
    )
    x0_teacher, x0_critic = (
        judge(q, view, sigma, text).x0[:, before.shape[1] :] for q in (TEACHER, critic)
    )
    x_m = x - (s - m)[..., None, None, None] * video.velocity
    v_m = NETWORK.denoise(p, x_m, m, text, sight).velocity
    consistency = self_consistency_loss(video.velocity, v_m, s, m, e, "none")
    return dmd_loss(video.x0, x0_critic, x0_teacher).mean(), consistency.mean()


def made_by(params, batch, key, levels, exit_step, cache, recipe, first=None):
    """The student's rollout in an update with this key, and the frames before it that the teacher
    sees.
    """
    overlap = 0 if cache is None else recipe.stream.overlap
    keys, shape = jax.random.split(jax.random.split(key)[0], BATCH), (CLIP[0] - overlap, *CLIP[1:])
    args = (
        params,
        batch["text"],
        levels,
        exit_step,
        "cm",
        keys,
        shape,
        recipe.memory,
        cache,
        first,
    )
    made = rollout(NETWORK, *args)
    return made, (made.x[:, :0] if cache is None else cache.x0[:, -overlap:])


@functools.partial(jax.jit, static_argnames="recipe")
def student_by_hand(params, batch, draw, cache, weights, recipe):
    """Value, terms and gradient of the loss of a student's update."""
    _, k_renoise = jax.random.split(KEY)
    own = recipe.rollout.first_steps  # of the first chunk, whose reference runs all of them
    first, last = ((draw.first_levels, at) if own else None for at in (draw.first_exit, own - 1))
    made, before = made_by(params, batch, KEY, draw.levels, draw.exit_step, cache, recipe, first)
    better, _ = made_by(
        params, batch, KEY, draw.reference_levels, draw.reference_exit, cache, recipe, last
    )
    level = lambda value: jnp.full(made.x.shape[:2], value)
    levels = level(draw.levels[draw.exit_step])
    levels = levels.at[:, :2].set(draw.first_levels[draw.first_exit]) if own else levels
    start = (made.x, levels, level(draw.sigma_m), level(draw.sigma_e))
    looks = BASE if recipe.align.network == "base" else params

    def look(x0):
        view, sigma, _ = view_of(jnp.concatenate([before, x0], 1), k_renoise)
        return NETWORK.features(looks, view, sigma, batch["text"], recipe.align.layers)[
            :, before.shape[1] :
        ]

    def loss(p):
        video = replay(NETWORK, p, made, batch["text"], recipe.memory)
        terms = judged(
            p, video, sight_of(made, recipe.memory), start, before, batch["text"], k_renoise, CRITIC
        )
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
    close(gradient(after.student), slope, rtol=1e-3, atol=2e-4 * largest)


def weights_of(choice):
    return {
        "dmd": 1.0,
        "self_consistency": 20.0 * choice.self_consistency,
        "alignment": 20.0 * choice.alignment,
    }


@pytest.mark.parametrize("choice", [CONSISTENT, pytest.param(ALIGNED, marks=pytest.mark.slow)])
def test_a_student_step_follows_the_gradient_of_the_terms_assembled_by_hand(choice):
    """The rollout, the alignment's reference and the network that judges it are constants of that
    gradient.
    """
    weights = weights_of(choice)
    by_hand = student_by_hand(STUDENT, batch_of(0), drawn(*exits(choice)), None, weights, RECIPE)
    assert_by_hand(*student_stepped(choice), by_hand, weights)


@pytest.mark.slow
def test_a_student_that_judges_its_own_features_is_not_moved_by_them():
    recipe, weights = (
        replace(RECIPE, align=replace(RECIPE.align, network="student")),
        weights_of(ALIGNED),
    )
    stepped = run(compiled(student_step, ALIGNED, recipe), causal_state(), batch_of(0), drawn(2, 1))
    by_hand = student_by_hand(STUDENT, batch_of(0), drawn(2, 1), None, weights, recipe)
    assert_by_hand(*stepped, by_hand, weights)


@pytest.mark.slow
def test_a_first_chunk_with_updates_of_its_own_exits_at_a_level_of_its_own():
    """Causal Forcing's: four at the first chunk, fewer after it; its reference takes all of
    them.
    """
    recipe = replace(RECIPE, rollout=replace(RECIPE.rollout, first_steps=3))
    draw, weights = drawn(2, 1, recipe), weights_of(ALIGNED)
    assert draw.first_levels[draw.first_exit] != draw.levels[draw.exit_step]
    stepped = run(compiled(student_step, ALIGNED, recipe), causal_state(), batch_of(0), draw)
    by_hand = student_by_hand(STUDENT, batch_of(0), draw, None, weights, recipe)
    assert_by_hand(*stepped, by_hand, weights)


def test_without_its_weight_a_term_is_not_drawn():
    off = replace(
        RECIPE,
        loss=replace(RECIPE.loss, self_consistency=0.0),
        align=replace(RECIPE.align, weight=0.0),
    )
    late = replace(RECIPE, align=replace(RECIPE.align, start=50))
    chosen = lambda recipe, iteration: {decide(recipe, iteration, call)[0] for call in range(60)}
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
    with_it, metrics = run(
        compiled(student_step, CONSISTENT, recipe), causal_state(), batch_of(0), drawn(4, 1)
    )
    without, _ = run(compiled(student_step, PLAIN), causal_state(), batch_of(0), drawn(4, 1))
    assert metrics["self_consistency"] > 0
    close(gradient(with_it.student), gradient(without.student), atol=1e-5)


@functools.partial(jax.jit, static_argnames="recipe")
def critic_by_hand(params, batch, draw, cache, recipe):
    """Value and gradient of flow matching on what the student's rollout ends in."""
    made, before = made_by(STUDENT, batch, KEY, draw.levels, draw.exit_step, cache, recipe)
    view, sigma, noise = view_of(jnp.concatenate([before, made.x0], 1), jax.random.split(KEY)[1])
    new = slice(before.shape[1], None)

    def loss(p):
        velocity = judge(p, view, sigma, batch["text"]).velocity
        return ((velocity[:, new] - (noise[:, new] - made.x0)) ** 2).mean()

    return jax.value_and_grad(loss)(params)


def test_a_critic_step_follows_the_gradient_of_flow_matching_on_the_students_rollout():
    after, metrics = critic_stepped()
    value, slope = critic_by_hand(CRITIC, batch_of(0), drawn(2, 1), None, RECIPE)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.critic), clipped(slope)[0], rtol=1e-3)


# One program for each choice, whatever is drawn.


@pytest.mark.slow
def test_every_choice_is_one_program_that_serves_all_numbers_of_updates_and_all_exits():
    seen, which = {}, {"student": student_step, "critic": critic_step}

    def watched(who, choice):
        def step(*args):
            draw = jax.device_get(args[-1])
            seen.setdefault((who, choice), set()).add(
                (int(np.argmax(draw.levels == 0)), int(draw.exit_step))
            )
            return programs[who, choice](*args)

        return step

    choices = {("student", choice) for choice in (PLAIN, CONSISTENT, ALIGNED)} | {("critic", PLAIN)}
    programs = {(who, choice): compiled(which[who], choice) for who, choice in choices}
    states, frozen, over_batch, everywhere = layout(causal_state(), FROZEN, {})
    feed = iter([place(batch_of(i % 3), over_batch) for i in range(100)])
    run = Run(RECIPE, place(FROZEN, frozen), watched, 2, place(jax.random.key(7), everywhere), feed)
    state = place(causal_state(), states)
    for iteration in range(14):
        with jax.transfer_guard_host_to_device("disallow"):
            state, metrics = iterate(state, run, iteration)
    assert set(seen) == choices
    assert seen["critic", PLAIN] == {(k, i) for k in (2, 4) for i in range(k)}
    assert {k for k, _ in seen["student", CONSISTENT]} == {4} and len(
        seen["student", CONSISTENT]
    ) > 1
    assert {k for k, _ in seen["student", ALIGNED]} == {2} and len(seen["student", ALIGNED]) > 1
    assert {program._cache_size() for program in programs.values()} == {1}
    assert int(state.step) == 17 and {"dmd", "critic", "critic_fresh"} <= set(metrics)
    assert int(metrics["student_skipped"]) == int(metrics["critic_skipped"]) == 0


# Streaming: an update goes on where the last one stopped.

ON = Choice(sequence="on")


def at_place(where, draw):
    """The program and the draw of an update at a place of a sequence: "new", "on" or "switch"."""
    return Choice(sequence="new" if where == "new" else "on"), draw._replace(
        switch=np.bool_(where == "switch")
    )


@functools.cache
def streamed(*places):
    """The state after critic updates at these places of a sequence, each with a batch and a key of
    its own.
    """
    state = causal_state(STREAM)
    for i, where in enumerate(places):
        choice, draw = at_place(where, drawn(4, 3))
        state, _ = run(compiled(critic_step, choice, STREAM), state, batch_of(i), draw, index=i)
    return state


@jax.jit
def next_frames(batch, key, draw, cache):
    """The four frames that an update of a sequence makes."""
    return made_by(STUDENT, batch, key, draw.levels, draw.exit_step, cache, STREAM)[0].x0


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
    like = jax.tree.map(lambda x: (x.shape, x.dtype), causal_state(STREAM).stream)
    assert (
        jax.tree.map(lambda x: (x.shape, x.dtype), streamed("new", "on", "switch").stream) == like
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
        np.testing.assert_array_equal(streamed(*places).stream.text, batch_of(number)["text"])


@pytest.mark.slow
def test_a_sequence_goes_on_on_its_own_cache():
    """The frames of the second update are those of a rollout on the cache and the prompt of the
    first.
    """
    before, after = streamed("new").stream, streamed("new", "on").stream
    key, draw = jax.random.fold_in(jax.random.key(7), 1), drawn(4, 3)
    again = lambda text: next_frames({"text": text}, key, draw, before.cache)
    np.testing.assert_allclose(after.cache.x0[:, 2:], again(before.text)[:, 2:], atol=1e-4)
    np.testing.assert_array_equal(after.cache.x0[:, :2], before.cache.x0[:, :2])
    assert np.abs(after.cache.x0[:, 2:] - again(batch_of(1)["text"])[:, 2:]).max() > 1e-3


@pytest.mark.slow
def test_a_new_sequence_looks_at_nothing_that_was_and_others_do():
    step = lambda place, state: run(
        compiled(critic_step, Choice(sequence=place), STREAM), state, batch_of(1), drawn(4, 3)
    )
    state = streamed("new", "on")
    other = replace(state, stream=jax.tree.map(lambda x: x + jnp.ones_like(x), state.stream))
    assert bits(step("new", state)) == bits(step("new", other))
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
    text = batch_of(2)["text"]
    cache = jax.jit(lambda cache: recache(NETWORK, STUDENT, cache, text, ROLLING))(before.cache)
    for name in ("k", "v"):
        sink = np.asarray(getattr(after.cache, name)[:, :, :2])
        np.testing.assert_allclose(sink, getattr(cache, name)[:, :, :2], atol=1e-4)
        assert np.all(np.abs(sink).max(axis=(3, 4, 5)) > 0.1), "the sink is kept, not zeroed"
        assert (
            np.abs(sink[1] - getattr(before.cache, name)[1, :, :2]).max() > 1e-2
        )  # the first layer knows no text
    np.testing.assert_array_equal(after.cache.x0[:, :2], before.cache.x0[:, :2])
    key, draw = jax.random.fold_in(jax.random.key(7), 2), drawn(4, 3)
    made = next_frames({"text": text}, key, draw, cache)
    np.testing.assert_allclose(after.cache.x0[:, 2:], made[:, 2:], atol=1e-4)


@pytest.mark.slow
def test_teacher_and_critic_see_the_overlap_and_judge_what_is_new():
    """Of a student's update and of a critic's, assembled by hand as above."""
    choice, state = Choice(True, True, "on"), replace(streamed("new"), critic=causal_state().critic)
    stream, batch, draw = state.stream, batch_of(1), drawn(4, 1)
    after, metrics = run(compiled(student_step, choice, STREAM), state, batch, draw)
    args = ({"text": stream.text}, draw, stream.cache)
    weights = weights_of(choice)
    assert_by_hand(after, metrics, student_by_hand(STUDENT, *args, weights, STREAM), weights)
    np.testing.assert_array_equal(after.stream.text, stream.text)
    np.testing.assert_array_equal(after.stream.cache.frames, [0, 1, 8, 9])
    after, metrics = run(compiled(critic_step, ON, STREAM), state, batch, draw)
    value, slope = critic_by_hand(CRITIC, *args, STREAM)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.critic), clipped(slope)[0], rtol=1e-3)
    frames = (args[-1].replace(x0=stream.cache.x0.at[:, -2:].add(1.0)), STREAM)
    assert abs(critic_by_hand(CRITIC, *args[:2], *frames)[0] - value) > 1e-3, (
        "the overlap makes no difference"
    )


def test_the_loop_gives_a_stream_to_student_and_critic_in_turn():
    """14 frames are three updates, whoever makes them: student, critic, critic."""
    seen, switches = [], []

    def record(who, choice):
        def step(state, frozen, batch, key, index, draw):
            seen.append((who, choice.sequence))
            switches.append(bool(draw.switch))
            return state, {"critic": jnp.zeros(())}

        return step

    recipe = replace(STREAM, stream=replace(STREAM.stream, switch=1.0))
    run = Run(
        recipe, {}, record, 3, jax.device_put(jax.random.key(1), jax.devices()[0]), iter(range(100))
    )
    for iteration in range(6):
        iterate(causal_state(), run, iteration)
    assert [who for who, _ in seen] == ["student", "critic", "critic", "critic"] * 6
    places = [place for _, place in seen]
    for start in range(0, 24, 3):
        assert places[start : start + 3] == ["new", "on", "on"]
        assert sorted(switches[start : start + 3]) == [False, False, True] and not switches[start]


# A level for each chunk, as CausVid trains.

CHUNKS = replace(RECIPE, video="noised_chunks")


@jax.jit
def chunks_by_hand(params, batch):
    """((DMD, self-consistency), gradient), and (value, gradient) of the critic."""
    k_video, k_renoise = jax.random.split(KEY)
    k_plan, k_noise = jax.random.split(k_video)
    plan, sight = (
        draw_chunk_plan(k_plan, BATCH, (2, 2, 2), grid(4, 2.0), 2),
        diffusion_forcing(6, CHUNKS.memory),
    )
    level = plan.sigma_s[..., None, None, None]
    x = (1 - level) * batch["video"] + level * jax.random.normal(k_noise, batch["video"].shape)

    def loss(p):
        video = NETWORK.denoise(p, x, plan.sigma_s, batch["text"], sight)
        terms = judged(p, video, sight, (x, *plan[:3]), x[:, :0], batch["text"], k_renoise, CRITIC)
        return terms[0] + 20 * terms[1], dict(zip(("dmd", "self_consistency"), terms, strict=True))

    def critic_loss(p):
        x0 = NETWORK.denoise(params, x, plan.sigma_s, batch["text"], sight).x0
        view, sigma, noise = view_of(x0, k_renoise)
        return ((judge(p, view, sigma, batch["text"]).velocity - (noise - x0)) ** 2).mean()

    return jax.value_and_grad(loss, has_aux=True)(params), jax.value_and_grad(critic_loss)(CRITIC)


@pytest.mark.slow
def test_noised_chunks_are_trained_at_levels_of_their_own_seeing_earlier_ones_as_they_are():
    assert decide(CHUNKS, 0, 0) == (CONSISTENT, None)
    student, (value, slope) = chunks_by_hand(STUDENT, batch_of(0))
    after, metrics = run(
        compiled(student_step, CONSISTENT, CHUNKS), causal_state(), batch_of(0), None
    )
    assert_by_hand(after, metrics, student, {"dmd": 1.0, "self_consistency": 20.0})
    after, metrics = run(compiled(critic_step, PLAIN, CHUNKS), causal_state(), batch_of(0), None)
    np.testing.assert_allclose(metrics["critic"], value, rtol=1e-4)
    close(gradient(after.critic), clipped(slope)[0], rtol=1e-3)


# Eight devices, and full size.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "choice"), [(student_step, Choice(True, True, "on")), (critic_step, ON)]
)
def test_eight_devices_do_what_one_does(which, choice):
    """Each has one video of a stream, and its share of the parameters."""
    state = replace(streamed("new"), critic=causal_state().critic)
    sizes = {"data": 2, "fsdp": 4}
    sharded = compile_step(which, NETS, STREAM, layout(state, FROZEN, sizes), choice=choice)
    args = (state, batch_of(1), drawn(4, 1))
    one, one_metrics = run(compiled(which, choice, STREAM), *args)
    eight, metrics = run(sharded, *args, sizes=sizes)
    close(metrics, one_metrics, rtol=1e-3)
    close(host(eight), host(one), rtol=1e-3, atol=1e-4)
    wanted = layout(state, FROZEN, sizes)[0]
    for x, where in zip(jax.tree.leaves(eight), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    assert eight.stream.cache.k.addressable_shards[0].data.shape[1] == 1


FULL_SIZE = [
    (student_step, ALIGNED._replace(sequence="on"), 12),
    (critic_step, ON, 12),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (student_step, PLAIN, 0),
            (student_step, CONSISTENT, 0),
            (student_step, ALIGNED, 0),
            (critic_step, PLAIN, 0),
            (student_step, CONSISTENT._replace(sequence="on"), 12),
        )
    ),
]


@pytest.mark.parametrize(("which", "choice", "window"), FULL_SIZE)
def test_full_size_rollouts_trace(which, choice, window):
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
    )
    network, null = (
        wan_network(config, Compute(jnp.bfloat16, "all"), 21, 3),
        jnp.zeros((1, 512, 4096)),
    )
    nets = Networks(network, network.denoise, guided(network.denoise, null, 4.0))
    params = jax.eval_shape(lambda: init_wan(jax.random.key(0), config))
    make = lambda p: replace(learners(recipe, p, p), stream=empty_stream(recipe, network, null))
    state = jax.eval_shape(make, params)
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = {"video": spec(1, 21, 60, 104, 16), "text": spec(1, 512, 4096)}
    step = lambda s, f, b, k, d: which(s, f, b, k, d, nets, recipe, choice)
    args = (
        {"teacher": params, "base": params},
        batch,
        jax.eval_shape(lambda: jax.random.key(0)),
        drawn(4, 1),
    )
    after, metrics = jax.eval_shape(step, state, *args)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert form(after) == form(state)
    assert all(metric.shape == () for metric in metrics.values())
    if window:
        assert after.stream.cache.k.shape == (30, 1, 9, 30 * 52, 12, 128)
        assert after.stream.cache.k.dtype == jnp.bfloat16
