"""The stages before distillation: each loss against the same one assembled by hand, what it moves,
its targets.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.prediction import from_velocity
from salt_jax.flow.schedule import grid
from salt_jax.losses.flow_matching import midlevel_weight
from salt_jax.models.denoiser import Network
from salt_jax.models.text_encoder import init_text_encoder
from salt_jax.moving_shapes.exact import closed_form_denoiser, closed_form_params
from salt_jax.rollout.causal import teacher_forcing
from salt_jax.train import stages
from salt_jax.train.step import Networks, compile_step
from tests.placing import place
from tests.train import test_causal_step as causal
from tests.train.test_causal_step import (
    BATCH,
    CLIP,
    EMA,
    KEY,
    NETWORK,
    NULL,
    STUDENT,
    clipped,
    gradient,
    wan,
)
from tests.train.test_step import (
    RECIPE,
    batch_of,
    bits,
    close,
    host,
    layout,
    learners,
    networks,
    toy,
    toy_params,
)

WIDE = 64  # width of the tiny text encoder


def loss_of(loss, params, ema, frozen, batch, key, nets, recipe):
    """With what is drawn from this key."""
    return loss(params, ema, frozen, batch, stages.draw_stage(key, batch, recipe), nets, recipe)


# Stage denoising: a teacher-to-be and its text encoder.


def denoising(kind, dropout):
    teacher = replace(RECIPE.teacher, kind=kind)
    return replace(RECIPE, stage="denoising", teacher=teacher, caption_dropout=dropout)


def tokens(count):
    """A different caption for each clip: end token 1, padding 0."""
    ids = np.arange(count)[:, None] * 7 + np.arange(5)[None] + 10
    return jnp.asarray(
        np.concatenate([ids, np.ones((count, 1)), np.zeros((count, 2))], axis=1), jnp.int32
    )


@functools.cache
def denoising_params():
    return {
        "wan": toy_params(0, WIDE),
        "text_encoder": jax.jit(init_text_encoder, static_argnums=1)(
            jax.random.key(3), RECIPE.text
        ),
    }


def test_a_teacher_to_be_learns_and_so_does_its_text_encoder():
    recipe = denoising("data", 0.0)
    batch = batch_of(0) | {"text": tokens(8)}
    make = lambda: learners(recipe, denoising_params(), None)
    shardings = layout(make(), {}, {})
    state, before = place(make(), shardings[0]), host(make().student.params)
    jitted = compile_step(
        stages.stage_step, networks(toy, teacher=closed_form_denoiser), recipe, shardings
    )
    losses = []
    for _ in range(20):
        state, metrics = jitted(state, {}, batch, jax.random.key(7), jnp.int32(0), None)
        losses.append(float(metrics["denoising"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert jitted._cache_size() == 1 and state.critic is None and int(state.step) == 20
    moments = state.student.opt_state[1][0].nu
    for path, nu in jax.tree_util.tree_leaves_with_path(moments["text_encoder"]):
        assert float(nu.max()) > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"
    assert bits(state.student.params["text_encoder"]) != bits(before["text_encoder"])


def test_the_closed_form_of_one_clip_a_caption_is_that_clip():
    """Its conditional mean is the clip, so the loss against the teacher's velocity is the loss
    against the data's.
    """
    batch, params, key = batch_of(0) | {"text": tokens(8)}, denoising_params(), jax.random.key(5)
    captions = np.asarray(batch["text"], np.float32)[..., None]
    teacher = closed_form_params(np.asarray(batch["video"])[:, None], captions)
    nets = networks(toy, teacher=closed_form_denoiser)

    def losses(p):
        cases = ("closed_form", 0.0), ("data", 0.0), ("closed_form", 1.0), ("data", 1.0)
        frozen = {"teacher": teacher}
        return [
            loss_of(stages.denoising_loss, p, p, frozen, batch, key, nets, denoising(*case))
            for case in cases
        ]

    exact, data, exact_empty, data_empty = jax.jit(losses)(params)
    np.testing.assert_allclose(exact, data, rtol=1e-4)
    # The empty caption leaves all clips in: the mean is another and the loss lower than against a
    # single clip.
    assert exact_empty < 0.99 * data_empty


def test_a_dropped_caption_is_the_empty_caption():
    params, nets = denoising_params(), networks(toy, teacher=closed_form_denoiser)
    empty = jnp.zeros((8, 8), jnp.int32).at[:, 0].set(1)

    def losses(p):
        batches = [batch_of(0) | {"text": text} for text in (tokens(8), empty, tokens(8))]
        args = zip(batches, (1.0, 0.0, 0.0), strict=True)
        return [
            loss_of(
                stages.denoising_loss, p, p, {}, b, jax.random.key(5), nets, denoising("data", drop)
            )
            for b, drop in args
        ]

    dropped, empty, kept = map(float, jax.jit(losses)(params))
    assert dropped == pytest.approx(empty, rel=1e-6) and kept != pytest.approx(empty, rel=1e-3)


# Stages that make a student causal. Keys are split as the stage splits them; the rest is written
# out once more.

FROZEN = {"teacher": wan(7), "null_text": jax.random.normal(jax.random.key(9), NULL.shape)}
NETS = Networks(NETWORK, NETWORK.denoise, NETWORK.denoise)
CAUSAL = replace(
    causal.RECIPE, caption_dropout=0.5, ode=replace(causal.RECIPE.ode, num_steps=8, guidance=2.0)
)
CAUSAL = replace(CAUSAL, renoise=replace(CAUSAL.renoise, lowest=0.001, highest=1.0))
STAGES = ("teacher_forcing", "ode_regression", "consistency")


def stage_batch():
    """With states of trajectories at the student's four levels and at the end."""
    batch = causal.batch_of(0)
    return batch | {"states": jax.random.normal(jax.random.key(3), (BATCH, 5, *CLIP))}


def column(level):
    return level.reshape(*level.shape, *(1,) * (5 - level.ndim))


def forced(params, x, sigma, text, x0):
    """What a network says of noisy chunks, each given the clean ones before it."""
    sight = teacher_forcing(NETWORK, params, x0, text, CAUSAL.memory)
    return NETWORK.denoise(params, x, sigma, text, sight)


def teacher_forcing_by_hand(batch):
    k_drop, k_sigma, k_noise = jax.random.split(KEY, 3)
    dropped = jax.random.bernoulli(k_drop, 0.5, (BATCH, 1, 1))
    assert 0 < dropped.sum() < BATCH
    text = dropped * FROZEN["null_text"] + ~dropped * batch["text"]
    u = jax.random.uniform(k_sigma, (BATCH * 3,)).reshape(BATCH, 3)
    sigma = jnp.clip(5 * u / (1 + 4 * u), 0.001, 1.0)[:, jnp.array([0, 0, 1, 1, 2, 2])]
    noise = jax.random.normal(k_noise, (BATCH, *CLIP))
    x = (1 - column(sigma)) * batch["video"] + column(sigma) * noise
    weight, target = column(midlevel_weight(sigma, 5.0)), noise - batch["video"]
    return lambda p: (
        weight * (forced(p, x, sigma, text, batch["video"]).velocity - target) ** 2
    ).mean()


def ode_regression_by_hand(batch):
    level = np.asarray(jax.random.randint(KEY, (BATCH,), 0, 4))
    assert len(set(level)) > 2
    x = jnp.stack([batch["states"][b, level[b]] for b in range(BATCH)])
    sigma = jnp.asarray(grid(4, 2.0)[level])
    said = lambda p: forced(p, x, sigma, batch["text"], batch["video"]).x0
    return lambda p: ((said(p) - batch["states"][:, 4]) ** 2).mean()


def guided_by_hand(x, sigma, batch):
    null = FROZEN["null_text"].repeat(BATCH, 0)
    texts = batch["text"], null
    c, u = (forced(FROZEN["teacher"], x, sigma, t, batch["video"]).velocity for t in texts)
    return u + 2.0 * (c - u)


def consistency_by_hand(batch):
    k_level, k_noise = jax.random.split(KEY)
    n = np.asarray(jax.random.randint(k_level, (BATCH,), 0, 8))
    assert len(set(n)) > 3
    sigma, after = (jnp.asarray(grid(8, 2.0)[m]) for m in (n, n + 1))
    x = (1 - column(sigma)) * batch["video"] + column(sigma) * jax.random.normal(
        k_noise, (BATCH, *CLIP)
    )
    says = lambda p, x, sigma: forced(p, x, sigma, batch["text"], batch["video"]).x0

    def loss(p):
        further = x - column(sigma - after) * guided_by_hand(x, sigma, batch)
        return ((says(p, x, sigma) - says(EMA, further, after)) ** 2).mean()

    return loss


def stage_state():
    state = learners(CAUSAL, STUDENT, None)
    return replace(state, step=jnp.int32(3), ema=EMA)


def stepped(stage, batch, recipe=CAUSAL):
    """One update of a stage on one device."""
    recipe = replace(recipe, stage=stage)
    shardings = layout(stage_state(), FROZEN, {})
    state = place(stage_state(), shardings[0])
    return compile_step(stages.stage_step, NETS, recipe, shardings)(
        state, FROZEN, batch, jax.random.key(7), jnp.int32(0), None
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_follows_the_gradient_of_its_loss_and_moves_every_parameter_and_their_average(
    stage,
):
    """Keys are those of the update; average, teacher and states are constants."""
    by_hand = {
        "teacher_forcing": teacher_forcing_by_hand,
        "ode_regression": ode_regression_by_hand,
        "consistency": consistency_by_hand,
    }[stage]
    batch, before = stage_batch(), host(stage_state())
    after, metrics = stepped(stage, batch)
    value, slope = jax.jit(jax.value_and_grad(by_hand(batch)))(STUDENT)
    np.testing.assert_allclose(metrics[stage], value, rtol=1e-4)
    own = {"student_grad_norm", "student_skipped", "student_skipped_in_a_row"}
    assert set(metrics) == {stage} | own
    slope, _ = clipped(slope)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    close(gradient(after.student), slope, rtol=1e-3, atol=1e-4 * largest)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slope)), "a parameter gets no gradient"
    assert int(after.step) == 4 and after.critic is None and after.stream is None
    causal.assert_all_moved(before.student.params, after.student.params)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.student.params))


def test_teacher_forcing_says_nothing_about_pure_noise():
    """Where all levels are 1 the weight is 0."""
    recipe = replace(
        CAUSAL, stage="teacher_forcing", renoise=replace(CAUSAL.renoise, lowest=1.0, highest=1.0)
    )
    args = (EMA, FROZEN, stage_batch(), KEY, NETS, recipe)
    loss = jax.jit(lambda p: loss_of(stages.teacher_forcing_loss, p, *args))
    assert abs(loss(STUDENT)) < 1e-6


# Consistency with a single update goes from noise to the end, where a network's clean estimate is
# the state itself.


def consistency(params, ema, guidance):
    ode = replace(CAUSAL.ode, num_steps=1, guidance=guidance)
    recipe = replace(
        CAUSAL, stage="consistency", ode=ode, schedule=replace(CAUSAL.schedule, train_levels=1)
    )
    return loss_of(stages.consistency_loss, params, ema, FROZEN, stage_batch(), KEY, NETS, recipe)


@pytest.mark.slow
def test_consistency_at_the_last_level_targets_the_state_itself():
    """Whatever the average says; and a student that is the unguided teacher is there already."""
    run = jax.jit(consistency, static_argnums=2)
    assert run(STUDENT, EMA, 2.0) == run(STUDENT, wan(8), 2.0) > 1e-3
    assert run(FROZEN["teacher"], EMA, 1.0) < 1e-9
    assert run(FROZEN["teacher"], EMA, 2.0) > 1e-6, "guidance makes no difference"


# Trajectories of the causal teacher.


def straight(params, x, sigma, text, sight=None):
    """A velocity that depends on nothing but the text: trajectories are lines."""
    slope = text.mean((1, 2)).reshape(-1, 1, 1, 1, 1) * params
    return from_velocity(x, jnp.broadcast_to(slope, x.shape), sigma)


def nothing_read(params, x0, text, sight):
    return jnp.zeros((1, *x0.shape[:2], 1, 1, 1)), jnp.zeros((1, *x0.shape[:2], 1, 1, 1))


@pytest.mark.parametrize(("updates", "kept"), [(4, 4), (8, 4), (12, 2)])
def test_a_constant_velocity_makes_straight_lines_kept_at_the_students_levels(updates, kept):
    """Under guidance 3: state(sigma) = noise - (1 - sigma) (u + 3 (c - u)), and the last entry is
    the end.
    """
    recipe = replace(
        CAUSAL,
        ode=replace(CAUSAL.ode, num_steps=updates, guidance=3.0),
        schedule=replace(CAUSAL.schedule, train_levels=kept, shift=5.0),
    )
    batch, network = causal.batch_of(0), Network(straight, nothing_read, None, None, None)
    null = FROZEN["null_text"]
    states = stages.trajectory(network, jnp.float32(0.7), batch, null, KEY, recipe)
    assert states.shape == (BATCH, kept + 1, *CLIP)
    noise = jax.random.normal(KEY, (BATCH, *CLIP))
    c, u = 0.7 * batch["text"].mean((1, 2)), 0.7 * null.mean()
    slope = np.asarray(u + 3.0 * (c - u)).reshape(-1, 1, 1, 1, 1)
    for i, level in enumerate(grid(kept, 5.0)):
        np.testing.assert_allclose(states[:, i], noise - (1 - level) * slope, atol=1e-5)


def test_trajectories_pass_the_levels_that_are_listed():
    """On top of the ten updates of the grid, which they need not be among."""
    schedule = replace(CAUSAL.schedule, train_levels=3, shift=8.0, levels=(1000.0, 757.0, 522.0))
    recipe = replace(CAUSAL, ode=replace(CAUSAL.ode, num_steps=10, guidance=1.0), schedule=schedule)
    grid_levels = [8 * u / (1 + 7 * u) for u in np.arange(10, -1, -1) / 10]
    np.testing.assert_allclose(
        stages.ode_levels(recipe), sorted([*grid_levels, 0.757, 0.522])[::-1], rtol=1e-6
    )
    batch, network = causal.batch_of(0), Network(straight, nothing_read, None, None, None)
    states = stages.trajectory(network, jnp.float32(0.7), batch, FROZEN["null_text"], KEY, recipe)
    assert states.shape == (BATCH, 4, *CLIP)
    slope = column(0.7 * batch["text"].mean((1, 2)))
    for i, level in enumerate((1.0, 0.757, 0.522, 0.0)):
        wanted = jax.random.normal(KEY, (BATCH, *CLIP)) - (1 - level) * slope
        np.testing.assert_allclose(states[:, i], wanted, atol=1e-5)


def test_a_trajectory_is_that_of_a_loop_over_eulers_updates():
    """Of the causal teacher with guidance, on the clean chunks of the batch."""
    batch = causal.batch_of(1)
    recipe = replace(CAUSAL, schedule=replace(CAUSAL.schedule, train_levels=4, shift=2.0))
    run = jax.jit(
        lambda key: stages.trajectory(
            NETWORK, FROZEN["teacher"], batch, FROZEN["null_text"], key, recipe
        )
    )
    states, velocity = (
        run(KEY),
        jax.jit(lambda x, sigma: guided_by_hand(x, jnp.full(BATCH, sigma), batch)),
    )
    x, levels, wanted = jax.random.normal(KEY, (BATCH, *CLIP)), grid(8, 2.0), []
    for now, after in itertools.pairwise(levels):
        wanted.append(x)
        x = x - (now - after) * velocity(x, now)
    np.testing.assert_allclose(states, jnp.stack([*wanted[::2], x], 1), atol=1e-4)
