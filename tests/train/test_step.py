"""One update moves what it should and nothing else, along the paper's gradient, on one device or on
eight.

Most tests run on `toy`, a denoiser of two matrices, which compiles in a second; the same steps then
run on Wan.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from salt_jax import sharding
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from salt_jax.flow.prediction import from_velocity
from salt_jax.flow.schedule import grid
from salt_jax.models.denoiser import Network, guided, wan_network
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.models.wan import init_wan
from salt_jax.rollout.draws import Choice, draw_plan
from salt_jax.state import apply_gradients, init_learner, init_state
from salt_jax.train import step
from salt_jax.train.begin import draw_noise
from salt_jax.train.loop import Run, iterate, stop_if_stuck, summarize
from salt_jax.train.optimizer import make_optimizer
from salt_jax.train.step import Networks, compile_step, critic_step, student_step
from tests.placing import place

RECIPE = read_recipe(base.get_config())
# eps: a gradient of almost zero would turn the rounding of a sharded sum into a whole step of Adam.
OPTIMIZER = replace(RECIPE.student_optimizer, learning_rate=1e-2, eps=1e-3)
RECIPE = replace(
    RECIPE,
    student_optimizer=OPTIMIZER,
    critic_optimizer=OPTIMIZER,
    ema=replace(RECIPE.ema, decay=0.9, start=0),
    # levels far apart: self-consistency has something to say
    schedule=replace(RECIPE.schedule, shift=2.0),
    critic_ratio=2,
)
CLIPS = (8, 2, 4, 4, 3)  # B F H W C
TEXT = 4  # width of the text that the toy reads
BOTH, DMD = Choice(self_consistency=True), Choice()  # the two programs of a student's update


def toy(params, x, sigma, text, sight=None):
    """Velocity = out tanh(in [x, sigma, mean text]), per pixel."""
    per_pixel = lambda z: jnp.broadcast_to(
        z.reshape(z.shape[0], 1, 1, 1, -1), (*x.shape[:-1], z.size // z.shape[0])
    )
    h = jnp.concatenate([x, per_pixel(sigma), per_pixel(text.mean(1))], axis=-1)
    return from_velocity(x, jnp.tanh(h @ params["in"]["kernel"]) @ params["out"]["kernel"], sigma)


def toy_params(seed, text_dim=TEXT):
    k_in, k_out = jax.random.split(jax.random.key(seed))
    inner = jax.random.normal(k_in, (3 + 1 + text_dim, 16))
    return {"in": {"kernel": inner}, "out": {"kernel": 0.5 * jax.random.normal(k_out, (16, 3))}}


def networks(student, critic=toy, teacher=toy):
    """A denoiser as a whole network: whole clips need no more of it."""
    return Networks(Network(student, None, None, None, None), critic, teacher)


TOY = networks(toy)
TEACHER = toy_params(2)
FROZEN = {"teacher": TEACHER}


def learners(recipe, student, critic):
    student_tx = make_optimizer(recipe.student_optimizer, recipe.iterations)
    critic_tx = make_optimizer(recipe.critic_optimizer, recipe.iterations * recipe.critic_ratio)
    return init_state(init_learner(student, student_tx), critic and init_learner(critic, critic_tx))


def toy_state(recipe=RECIPE):
    """Moments and EMA as in the middle of a run: no two trees are equal."""
    state = learners(recipe, toy_params(0), toy_params(1))
    return replace(state, step=jnp.int32(3), ema=toy_params(4))


def batch_of(seed, shape=CLIPS, text=(3, TEXT)):
    k_video, k_text = jax.random.split(jax.random.key(seed))
    return {
        "video": jax.random.uniform(k_video, shape, minval=-1.0),
        "text": jax.random.normal(k_text, (shape[0], *text)),
    }


def layout(state, frozen, sizes):
    mesh = sharding.make_mesh(
        {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | dict(sizes),
        jax.devices()[: np.prod([1, *sizes.values()])],
    )
    shard = lambda tree: sharding.state_shardings(mesh, tree)
    return shard(state), shard(frozen), sharding.batch_sharding(mesh), sharding.replicated(mesh)


def choice_of(which):
    return BOTH if which is student_step else DMD


@functools.cache
def compiled(which, recipe=RECIPE):
    """A step of the toy on one device, compiled once for all tests."""
    return compile_step(
        which, TOY, recipe, layout(toy_state(), FROZEN, {}), choice=choice_of(which)
    )


def run_toy(which, state, batch, index=0, recipe=RECIPE):
    return compiled(which, recipe)(state, FROZEN, batch, jax.random.key(7), jnp.int32(index), None)


def host(tree):
    return jax.tree.map(np.array, tree)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def close(found, wanted, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def test_a_student_step_moves_student_ema_and_step_and_nothing_else():
    state, before = toy_state(), host(toy_state())
    after, metrics = run_toy(student_step, state, batch_of(0))
    assert bits(after.critic) == bits(before.critic)
    assert int(after.step) == 4
    for old, new in zip(
        jax.tree.leaves(before.student.params), jax.tree.leaves(after.student.params), strict=True
    ):
        assert not np.array_equal(old, new)
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.student.params))
    assert set(metrics) == {"dmd", "dmd_gap", "self_consistency"} | {
        f"student_{name}" for name in ("grad_norm", "skipped", "skipped_in_a_row")
    }
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "the state should be donated"
    close(TEACHER, toy_params(2), rtol=0, atol=0)  # the teacher is not


def test_a_critic_step_moves_the_critic_and_nothing_else():
    state, before = toy_state(), host(toy_state())
    after, metrics = run_toy(critic_step, state, batch_of(0))
    for name in ("step", "student", "ema"):
        assert bits(getattr(after, name)) == bits(getattr(before, name)), name
    for old, new in zip(
        jax.tree.leaves(before.critic.params), jax.tree.leaves(after.critic.params), strict=True
    ):
        assert not np.array_equal(old, new)
    assert set(metrics) == {"critic"} | {
        f"critic_{name}" for name in ("grad_norm", "skipped", "skipped_in_a_row")
    }
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    close(TEACHER, toy_params(2), rtol=0, atol=0)


def test_what_is_drawn_is_a_function_of_the_seed_and_the_index():
    first = run_toy(student_step, toy_state(), batch_of(0), index=5)
    again = run_toy(student_step, toy_state(), batch_of(0), index=5)
    other = run_toy(student_step, toy_state(), batch_of(0), index=6)
    assert bits(first) == bits(again)
    assert float(first[1]["dmd"]) != float(other[1]["dmd"])


# The paper's equations, written out once more: numbers that were drawn come in, no loss of ours is
# called.


def draws(key, batch, recipe):
    """Levels and noises of an update: (s, m, e, noise of the clip), (sigma, noise of the view)."""
    k_video, k_renoise = jax.random.split(key)
    k_plan, k_noise = jax.random.split(k_video)
    k_sigma, k_fresh = jax.random.split(k_renoise)
    size, column = len(batch["video"]), lambda level: level.reshape(-1, 1, 1, 1, 1)
    levels = grid(recipe.schedule.train_levels, recipe.schedule.shift)
    plan = draw_plan(k_plan, size, levels, recipe.schedule.anchor_levels)
    u = jax.random.uniform(k_sigma, (size,))
    sigma = jnp.clip(5.0 * u / (1 + 4.0 * u), 0.02, 0.98)
    assert (recipe.renoise.shift, recipe.renoise.lowest, recipe.renoise.highest) == (
        5.0,
        0.02,
        0.98,
    )
    normal = lambda key: jax.random.normal(key, batch["video"].shape)
    levels = [column(level) for level in (plan.sigma_s, plan.sigma_m, plan.sigma_e)]
    return (*levels, normal(k_noise)), (column(sigma), normal(k_fresh))


def velocity(params, x, level, text):
    return toy(params, x, level.reshape(-1), text).velocity


def papers_student_loss(params, critic, teacher, batch, key, recipe, weight, stop):
    """A function with the gradient of Salt Eq. 4 (direction per element, times dx0/dtheta) plus
    `weight` Eq. 8.
    """
    (s, m, e, noise), (t, fresh) = draws(key, batch, recipe)
    text, fixed = batch["text"], jax.lax.stop_gradient
    x_s = (1 - s) * batch["video"] + s * noise
    v_s = velocity(params, x_s, s, text)
    x0 = x_s - s * v_s
    x_t = fixed((1 - t) * x0 + t * fresh)
    real, fake = (x_t - t * velocity(p, x_t, t, text) for p in (teacher, critic))
    size = np.prod(batch["video"].shape[1:])
    distance = jnp.abs(x0 - real).sum((1, 2, 3, 4), keepdims=True) / size
    eq_4 = (fixed((fake - real) / distance) * x0).sum() / size / len(x0)
    x_m = x_s - (s - m) * v_s
    v_m = velocity(params, fixed(x_m) if stop == "midpoint" else x_m, m, text)
    x_1, x_2 = x_s - (s - e) * v_s, x_m - (m - e) * v_m
    x_1, x_2 = fixed(x_1) if stop == "direct" else x_1, fixed(x_2) if stop == "composed" else x_2
    eq_8 = ((x_1 - x_2) ** 2).sum() / size / len(x0)
    return eq_4 + weight * eq_8, eq_8


@pytest.mark.parametrize("stop", ["none", "composed", "direct", "midpoint"])
def test_the_students_gradient_is_the_papers(stop):
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, self_consistency=100.0, stop_gradient=stop))
    params, critic, batch, key = toy_params(0), toy_params(1), batch_of(0), jax.random.key(11)
    noise = draw_noise(key, batch, recipe)
    ours = lambda p: step.student_loss(
        p, critic, FROZEN, batch, noise, None, None, TOY, recipe, BOTH
    )
    papers = lambda p: papers_student_loss(p, critic, TEACHER, batch, key, recipe, 100.0, stop)
    found, (metrics, _) = jax.jit(jax.grad(ours, has_aux=True))(params)
    wanted, eq_8 = jax.jit(jax.grad(papers, has_aux=True))(params)
    close(found, wanted)
    np.testing.assert_allclose(metrics["self_consistency"], eq_8, rtol=1e-4)
    assert 100 * eq_8 > 0.1, "too small a part of the gradient to be tested"


def test_the_student_step_applies_that_gradient():
    state, batch, key = toy_state(), batch_of(0), jax.random.fold_in(jax.random.key(7), 0)
    papers = lambda p: papers_student_loss(
        p, state.critic.params, TEACHER, batch, key, RECIPE, 1.0, "none"
    )
    grads, _ = jax.jit(jax.grad(papers, has_aux=True))(state.student.params)
    tx = make_optimizer(OPTIMIZER, RECIPE.iterations)
    wanted = apply_gradients(state.student, grads, jnp.float32(0), tx)
    after, _ = run_toy(student_step, state, batch)
    close(after.student.params, wanted.params)


def test_without_its_weight_self_consistency_is_neither_computed_nor_reported():
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, self_consistency=0.0))
    params, critic, batch, key, calls = (
        toy_params(0),
        toy_params(1),
        batch_of(0),
        jax.random.key(11),
        [],
    )

    def counted(*args):
        calls.append(1)
        return toy(*args)

    nets = networks(counted)
    noise = draw_noise(key, batch, recipe)
    ours = lambda p: step.student_loss(
        p, critic, FROZEN, batch, noise, None, None, nets, recipe, DMD
    )
    found, (metrics, _) = jax.jit(jax.grad(ours, has_aux=True))(params)
    papers = lambda p: papers_student_loss(p, critic, TEACHER, batch, key, recipe, 0.0, "none")[0]
    close(found, jax.jit(jax.grad(papers))(params))
    assert set(metrics) == {"dmd", "dmd_gap"} and len(calls) == 1


def test_the_critics_gradient_is_flow_matching_on_the_students_video():
    params, student, batch, key = toy_params(1), toy_params(0), batch_of(0), jax.random.key(11)

    def papers(p):
        (s, _, _, noise), (t, fresh) = draws(key, batch, RECIPE)
        x_s = (1 - s) * batch["video"] + s * noise
        x0 = x_s - s * velocity(student, x_s, s, batch["text"])
        x_t = (1 - t) * x0 + t * fresh
        return ((velocity(p, x_t, t, batch["text"]) - (fresh - x0)) ** 2).mean()

    noise = draw_noise(key, batch, RECIPE)
    ours = lambda p: step.critic_loss(p, student, batch, noise, None, None, TOY, RECIPE)[0]
    wanted = jax.jit(jax.value_and_grad(papers))(params)
    close(jax.jit(jax.value_and_grad(ours))(params), wanted)


@pytest.mark.parametrize(("which", "who"), [(student_step, "student"), (critic_step, "critic")])
def test_one_bad_example_skips_the_update_bit_for_bit_and_a_good_batch_goes_on(which, who):
    good, before = batch_of(0), host(toy_state())
    bad = {"video": good["video"].at[3, 0, 1, 2, 0].set(jnp.nan), "text": good["text"]}
    state, _ = run_toy(which, toy_state(), bad)
    state, metrics = run_toy(which, state, bad)
    learner, was = getattr(state, who), getattr(before, who)
    assert bits((learner.params, learner.opt_state)) == bits((was.params, was.opt_state))
    assert (int(metrics[f"{who}_skipped"]), int(metrics[f"{who}_skipped_in_a_row"])) == (2, 2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(host(state)))
    values = {name: float(value) for name, value in metrics.items()}
    term = "dmd" if who == "student" else "critic"
    with pytest.raises(UserError, match=rf"2 {who} updates in a row .* update 9 \({term}"):
        stop_if_stuck(values, limit=2, step=9)
    stop_if_stuck(values, limit=3, step=9)

    state, metrics = run_toy(which, state, good)
    assert (int(metrics[f"{who}_skipped"]), int(metrics[f"{who}_skipped_in_a_row"])) == (2, 0)
    assert bits(getattr(state, who).params) != bits(was.params)


def test_the_gap_is_the_mean_distance_of_critic_and_teacher():
    """What DMD is about, in the clips' own units: it falls as the student gets better, unlike the
    loss.
    """
    params, critic, batch, key = toy_params(0), toy_params(1), batch_of(0), jax.random.key(11)
    given = draw_noise(key, batch, RECIPE)
    _, (metrics, _) = step.student_loss(
        params, critic, FROZEN, batch, given, None, None, TOY, RECIPE, BOTH
    )
    (s, _, _, noise), (t, fresh) = draws(key, batch, RECIPE)
    x_s = (1 - s) * batch["video"] + s * noise
    x0 = x_s - s * velocity(params, x_s, s, batch["text"])
    x_t = (1 - t) * x0 + t * fresh
    real, fake = (t * velocity(p, x_t, t, batch["text"]) for p in (TEACHER, critic))
    np.testing.assert_allclose(metrics["dmd_gap"], np.abs(real - fake).mean(), rtol=1e-4)


def test_nothing_recompiles_and_nothing_is_transferred_unasked_over_iterations():
    shardings = layout(toy_state(), FROZEN, {"fsdp": 8})
    steps = functools.cache(
        lambda who, choice: compile_step(
            student_step if who == "student" else critic_step, TOY, RECIPE, shardings, choice=choice
        )
    )
    run = Run(
        RECIPE,
        place(FROZEN, shardings[1]),
        steps,
        RECIPE.critic_ratio,
        jax.device_put(jax.random.key(1), shardings[3]),
        iter([place(batch_of(i), shardings[2]) for i in range(12)]),
    )
    state = place(toy_state(), shardings[0])
    for i in range(4):
        with jax.transfer_guard("disallow"):
            state, metrics = iterate(state, run, i)
    assert steps.cache_info().currsize == 2, (
        "a whole clip's student and critic have one program each"
    )
    assert steps("student", BOTH)._cache_size() == steps("critic", DMD)._cache_size() == 1
    assert int(state.step) == 7 and int(state.critic.opt_state[1][0].count) == 8
    assert {"dmd", "critic", "critic_fresh"} <= set(metrics)
    assert np.isfinite(run.frozen["teacher"]["in"]["kernel"]).all()


def test_every_update_has_its_own_batch_and_its_own_number():
    seen = []

    def record(who, choice):
        def step(state, frozen, batch, key, index, draw):
            seen.append((who, choice, batch, int(index)))
            return state, {"critic": index} if who == "critic" else {}

        return step

    key = jax.device_put(jax.random.key(1), jax.devices()[0])
    for start in (0, 2):  # as if stopped and started again
        run = Run(RECIPE, {}, record, 2, key, iter(range(3 * start, 100)))
        for i in (start, start + 1):
            _, metrics = iterate(toy_state(), run, i)
            # The first critic update after the student's sees what it has not seen yet; the last
            # one is reported too.
            assert (int(metrics["critic_fresh"]), int(metrics["critic"])) == (3 * i + 1, 3 * i + 2)
    who = [("student", BOTH), ("critic", DMD), ("critic", DMD)] * 4
    assert seen == [(*pair, n, n) for n, pair in enumerate(who)]


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


def on_mesh(which, nets, make, frozen, batch, sizes):
    """Two updates; state and metrics as numpy arrays, and the bytes of state that the first device
    holds.
    """
    shardings = layout(make(), frozen, sizes)
    fresh = lambda: compile_step(which, nets, RECIPE, shardings, choice=choice_of(which))
    jitted = compiled(which) if nets is TOY and not sizes else fresh()
    state, placed = place(make(), shardings[0]), place(batch, shardings[2])
    frozen, key = place(frozen, shardings[1]), place(jax.random.key(7), shardings[3])
    for index in range(2):
        state, metrics = jitted(
            state, frozen, placed, key, place(np.int32(index), shardings[3]), None
        )
    for x, where in zip(jax.tree.leaves(state), jax.tree.leaves(shardings[0]), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    return host(state), host(metrics), local


@pytest.mark.parametrize("which", [student_step, critic_step])
def test_eight_devices_do_what_one_does(which):
    args = (which, TOY, toy_state, FROZEN, batch_of(0))
    one, one_metrics, one_bytes = on_mesh(*args, {})
    state, metrics, local = on_mesh(*args, {"data": 2, "fsdp": 4})
    close(metrics, one_metrics)
    close(state, one)
    assert local < one_bytes / 3


@pytest.mark.slow
@pytest.mark.parametrize("which", [student_step, critic_step])
def test_eight_devices_do_what_one_does_with_wan(which):
    config = PRESETS["tiny"]
    net = wan_network(config, Compute(), 3, 3)

    def wan(seed):
        """Like a trained network: no zeros in the head, student and critic and teacher differ."""
        params = init_wan(jax.random.key(0), config)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        shaken = [
            x + 0.03 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, shaken)

    student, critic, teacher = (jax.jit(wan)(seed) for seed in (1, 2, 3))
    batch = batch_of(0, (8, 3, 12, 12, 3), (config.text_length, config.text_dim))
    null = jnp.zeros((1, config.text_length, config.text_dim))
    nets = Networks(net, net.denoise, guided(net.denoise, null, 2.0))
    args = (which, nets, lambda: learners(RECIPE, student, critic), {"teacher": teacher}, batch)
    one, one_metrics, one_bytes = on_mesh(*args, {})
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 4}):
        state, metrics, local = on_mesh(*args, sizes)
        close(metrics, one_metrics, rtol=1e-3, atol=1e-5)
        close(state, one, rtol=1e-3, atol=1e-4)
        assert local < one_bytes / 3


@pytest.mark.parametrize(
    "preset", ["wan2.1-t2v-1.3b", pytest.param("wan2.1-t2v-14b", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("which", [student_step, critic_step])
def test_full_size_steps_trace(which, preset):
    """480p for five seconds, bfloat16 with recomputation: shapes and types agree and masters stay
    float32.
    """
    config = PRESETS[preset]
    net = wan_network(config, Compute(jnp.bfloat16, "all"), 21, 3)
    nets = Networks(net, net.denoise, guided(net.denoise, jnp.zeros((1, 512, 4096)), 4.0))
    params = jax.eval_shape(lambda: init_wan(jax.random.key(0), config))
    state = jax.eval_shape(lambda p: learners(RECIPE, p, p), params)
    batch = {
        "video": jax.ShapeDtypeStruct((1, 21, 60, 104, 16), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32),
    }
    run = lambda s, f, b, k: which(s, f, b, k, None, nets, RECIPE, choice_of(which))
    frozen, key = {"teacher": params}, jax.eval_shape(lambda: jax.random.key(0))
    after, metrics = jax.eval_shape(run, state, frozen, batch, key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert {x.dtype for x in jax.tree.leaves(after.student.params)} == {np.dtype(np.float32)}
    assert all(metric.shape == () for metric in metrics.values())
