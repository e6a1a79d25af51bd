"""Steps of a student that works chunk by chunk: the losses assembled by hand, one program for all draws, and streams.

Everything runs on a Wan of two layers and clips of three chunks of two frames.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.denoiser import guided, wan_network
from salt_jax.models.kv_cache import CachePolicy
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.wan import init_wan
from salt_jax.rollout.causal import diffusion_forcing, recache, replay, rollout, sight_of
from salt_jax.rollout.plan import Choice, draw_chunk_plan, draw_rollout
from salt_jax.train import sharding, step
from salt_jax.train.loop import Run, decide, iterate
from salt_jax.train.recipe import read_recipe
from salt_jax.train.setup import empty_stream
from salt_jax.train.step import Networks, compile_step, critic_step, student_step
from tests.models.test_wan import randomised
from tests.train.test_step import OPTIMIZER, bits, close, host, layout, learners

SMALL = WanConfig(48, 2, 2, 64, 3, 3, (1, 2, 2), 8, 4, 32, 1e-6)
CLIP = (6, 4, 4, 3)  # F H W C
BATCH = 8
RECIPE = read_recipe(base.get_config())
RECIPE = replace(
    RECIPE,
    video="rollout",
    batch_size=BATCH,
    data=replace(RECIPE.data, kind="latents", clip=CLIP[:3]),
    memory=CachePolicy(2, 2, 0, 0, "absolute"),
    schedule=replace(RECIPE.schedule, train_updates=4, anchor_updates=2, shift=2.0),
    rollout=replace(RECIPE.rollout, updates=(2, 4), probabilities=(0.5, 0.5)),
    align=replace(RECIPE.align, weight=20.0, margin=0.01, layers=1),
    loss=replace(RECIPE.loss, self_consistency=20.0),  # the terms weigh about the same
    student_optimizer=OPTIMIZER,
    critic_optimizer=OPTIMIZER,
    ema=replace(RECIPE.ema, decay=0.9, start=0),
    critic_updates=2,
)
ROLLING = CachePolicy(2, 2, 6, 2, "relative")  # a cache of four frames: two of the sink and two before the chunk
STREAM = replace(RECIPE, memory=ROLLING, stream=replace(RECIPE.stream, max_frames=14, overlap=2))
PLAIN, CONSISTENT, ALIGNED = Choice(), Choice(self_consistency=True), Choice(alignment=True)

NETWORK = wan_network(SMALL, Compute(), CLIP[0], 2)
NULL = jnp.zeros((1, SMALL.text_length, SMALL.text_dim))
NETS = Networks(NETWORK, NETWORK.denoise, guided(NETWORK.denoise, NULL, 2.0))


@functools.cache
def wan(seed):
    return randomised(init_wan(jax.random.key(0), SMALL), seed)


STUDENT, CRITIC, TEACHER, BASE, EMA = 1, 2, 3, 4, 5


def frozen():
    return {"teacher": wan(TEACHER), "base": wan(BASE)}


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """What is compiled here runs for milliseconds: half the effort of compiling it is enough."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def causal_state(recipe=RECIPE):
    """As in the middle of a run: no two networks are equal."""
    state = learners(recipe, wan(STUDENT), wan(CRITIC))
    stream = empty_stream(recipe, NETWORK, NULL)
    return replace(state, step=jnp.int32(3), ema=jax.tree.map(jnp.asarray, wan(EMA)), stream=stream)


def batch_of(seed):
    k_video, k_text = jax.random.split(jax.random.key(seed))
    return {
        "video": jax.random.uniform(k_video, (BATCH, *CLIP), minval=-1.0),
        "text": jax.random.normal(k_text, (BATCH, SMALL.text_length, SMALL.text_dim)),
    }


@functools.cache
def drawn(updates, exit_update, number=0):
    """What `draw_rollout` draws in one of the calls that have so many updates and exit there."""
    args = ((2, 4), (0.5, 0.5), 0, 2, 2.0, True, 0.5)
    draws = (draw_rollout(0, call, *args)[1] for call in range(1000))
    fits = (d for d in draws if np.count_nonzero(d.levels) == updates and d.exit_update == exit_update)
    return [draw for draw, _ in zip(fits, range(number + 1), strict=False)][number]


@functools.cache
def compiled(which, choice, recipe=RECIPE):
    """A step on one device, compiled once for all tests."""
    shardings = layout(causal_state(recipe), frozen(), {})
    return compile_step(which, NETS, recipe, shardings, choice=choice)


def run(which, choice, state, batch, draw, recipe=RECIPE, index=0):
    return compiled(which, choice, recipe)(
        state, frozen(), batch, jax.random.key(7), jnp.int32(index), jax.tree.map(jnp.asarray, draw)
    )


KEY = jax.random.fold_in(jax.random.key(7), 0)  # of the update that `run` makes


# What an update moves.


def assert_all_moved(before, after):
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


@pytest.mark.parametrize("choice", [CONSISTENT, ALIGNED])
def test_a_student_step_moves_student_ema_and_step_and_nothing_else(choice):
    state, before = causal_state(), host(causal_state())
    after, metrics = run(student_step, choice, state, batch_of(0), drawn(4 if choice is CONSISTENT else 2, 1))
    assert bits(after.critic) == bits(before.critic) and after.stream is None
    assert int(after.step) == 4
    assert_all_moved(before.student.params, after.student.params)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.student.params))
    more = {"self_consistency"} if choice is CONSISTENT else {"alignment", "alignment_active"}
    own = {"student_grad_norm", "student_skipped", "student_skipped_in_a_row"}
    assert set(metrics) == {"dmd", "dmd_gap"} | more | own
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "the state should be donated"


def test_a_critic_step_moves_the_critic_and_nothing_else():
    before = host(causal_state())
    after, metrics = run(critic_step, PLAIN, causal_state(), batch_of(0), drawn(2, 1))
    for name in ("step", "student", "ema", "stream"):
        assert bits(getattr(after, name)) == bits(getattr(before, name)), name
    assert_all_moved(before.critic.params, after.critic.params)
    assert set(metrics) == {"critic", "critic_grad_norm", "critic_skipped", "critic_skipped_in_a_row"}


# The losses once more, by hand. What is differentiated is `p`; everything else is a constant, not stopped.


def view_of(x0, key):
    """Levels and noise of the view, and the noised copy."""
    k_sigma, k_noise = jax.random.split(key)
    u = jax.random.uniform(k_sigma, (BATCH,))
    sigma, noise = jnp.clip(5.0 * u / (1 + 4.0 * u), 0.02, 0.98), jax.random.normal(k_noise, x0.shape)
    level = sigma.reshape(-1, 1, 1, 1, 1)
    return (1 - level) * x0 + level * noise, sigma, noise


def judged(p, video, sight, start, before, text, k_view, critic):
    """DMD and self-consistency of a video whose update began at `start` = (x, sigma, sigma_m, sigma_e), [B, F]."""
    x, s, m, e = start
    fixed = jax.lax.stop_gradient(video.x0)
    view, sigma, _ = view_of(jnp.concatenate([before, fixed], 1), k_view)
    new = slice(before.shape[1], None)
    x0_teacher, x0_critic = (
        f(q, view, sigma, text).x0[:, new] for f, q in ((NETS.teacher, wan(TEACHER)), (NETS.critic, critic))
    )
    column = lambda level: level[..., None, None, None]
    x_m = x - column(s - m) * video.velocity
    v_m = NETWORK.denoise(p, x_m, m, text, sight).velocity
    return dmd_loss(video.x0, x0_critic, x0_teacher), self_consistency_loss(video.velocity, v_m, s, m, e, "none")


def by_hand(p, params, critic, batch, key, draw, cache, recipe):
    """(DMD, self-consistency, alignment, trajectory) of a rollout by `params` whose exit updates are those of `p`."""
    k_video, k_view = jax.random.split(key)
    overlap = 0 if cache is None else recipe.stream.overlap
    text, shape = batch["text"], (CLIP[0] - overlap, *CLIP[1:])
    make = lambda levels, exit_update: rollout(
        NETWORK, params, text, levels, exit_update, "cm", jax.random.split(k_video, BATCH), shape, recipe.memory, cache
    )
    made = make(draw.levels, draw.exit_update)
    before = made.x[:, :0] if cache is None else cache.x0[:, -overlap:]
    video = replay(NETWORK, p, made, text, recipe.memory)
    full = lambda level: jnp.full(made.x.shape[:2], level)
    start = (made.x, full(draw.levels[draw.exit_update]), full(draw.sigma_m), full(draw.sigma_e))
    sight = sight_of(made, recipe.memory)
    dmd, consistency = judged(p, video, sight, start, before, text, k_view, critic)
    better = make(draw.reference_levels, draw.reference_exit).x0
    judge = {"base": wan(BASE), "critic": critic, "student": params}[recipe.align.network]

    def look(x0):
        view, sigma, _ = view_of(jnp.concatenate([before, x0], 1), k_view)
        return NETWORK.features(judge, view, sigma, text, recipe.align.layers)[:, before.shape[1] :]

    alignment, _ = cache_alignment_loss(look(video.x0), look(better), recipe.align.margin)
    return dmd.mean(), consistency.mean(), alignment.mean(), made


@functools.partial(jax.jit, static_argnames=("recipe", "choice"))
def both_ways(params, critic, batch, draw, cache, recipe, choice):
    """((value, gradient, terms) of ours, the same by hand)."""

    def ours(p):
        args = (critic, frozen(), batch, KEY, draw, cache, NETS, recipe, choice)
        value, (terms, _) = step.student_loss(p, *args)
        return value, terms

    def theirs(p):
        dmd, consistency, alignment, _ = by_hand(p, params, critic, batch, KEY, draw, cache, recipe)
        terms = {"dmd": dmd, "self_consistency": consistency, "alignment": alignment}
        on = {"dmd": 1.0, "self_consistency": 20.0 * choice.self_consistency, "alignment": 20.0 * choice.alignment}
        return sum(on[name] * terms[name] for name in terms), terms

    return [jax.value_and_grad(loss, has_aux=True)(params) for loss in (ours, theirs)]


def assert_same_loss(found, wanted):
    (value, terms), slope = found
    (wanted_value, wanted_terms), wanted_slope = wanted
    np.testing.assert_allclose(value, wanted_value, rtol=1e-4)
    for name in set(terms) & set(wanted_terms):
        np.testing.assert_allclose(terms[name], wanted_terms[name], rtol=1e-4, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_slope))
    close(slope, wanted_slope, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("judge", ["base", "critic", "student"])
def test_the_students_gradient_is_that_of_the_terms_assembled_by_hand(judge):
    """All terms at once: the reference and the judge of the alignment, and the rollout, are constants."""
    recipe = replace(RECIPE, align=replace(RECIPE.align, network=judge))
    args = (wan(STUDENT), wan(CRITIC), batch_of(0))
    for draw in (drawn(4, 1), drawn(2, 0)) if judge == "base" else (drawn(2, 1),):
        found, wanted = both_ways(*args, jax.tree.map(jnp.asarray, draw), None, recipe, Choice(True, True))
        assert_same_loss(found, wanted)
        _, terms = wanted[0]
        assert 20 * terms["alignment"] > 0.03 * terms["dmd"], "too small a part to be tested"
        if draw.sigma_m < draw.levels[draw.exit_update]:
            assert 20 * terms["self_consistency"] > 0.03 * terms["dmd"], "too small a part to be tested"
        else:
            assert terms["self_consistency"] == 0


def test_the_student_step_applies_that_gradient():
    """One update of the compiled step against the optimizer on the gradient by hand: keys and draws are those."""
    from salt_jax.train.recipe import make_optimizer
    from salt_jax.train.state import apply_gradients

    draw, state = drawn(4, 1), causal_state()
    _, ((value, _), slope) = both_ways(
        wan(STUDENT), wan(CRITIC), batch_of(0), jax.tree.map(jnp.asarray, draw), None, RECIPE, CONSISTENT
    )
    wanted = apply_gradients(state.student, slope, value, make_optimizer(OPTIMIZER, RECIPE.updates))
    after, _ = run(student_step, CONSISTENT, state, batch_of(0), draw)
    close(after.student.params, wanted.params, rtol=1e-3, atol=1e-4)
