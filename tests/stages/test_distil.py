"""The losses of a distillation of whole clips: the paper's, written out once more, on toys."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.schedule import grid
from salt_jax.optimizer import make_optimizer
from salt_jax.rollout.draws import draw_triples
from salt_jax.stages.stage import Inputs, Update
from salt_jax.state import apply_gradients, first_state
from tests.helpers import close
from tests.stages.toys import (
    FROZEN,
    OPTIMIZER,
    RECIPE,
    TEACHER,
    UPDATES,
    Toy,
    batch_of,
    run_toy,
    stage_of,
    toy_params,
    toy_state,
)

KEY = jax.random.key(11)


def loss_of(stage, update, student, critic, batch, key=KEY):
    """(value, what is told besides) of an update of the learner that moves, at these parameters."""
    state = first_state(stage.recipe, {"student": student, "critic": critic})
    inputs = Inputs(state, FROZEN, batch, stage.noise(key, batch), None)
    return stage.loss({"student": student, "critic": critic}[update.moves], inputs, update)


# The paper's equations, written out once more: numbers that were drawn come in, no loss of ours is
# called.


def draws(key, batch, recipe):
    """Levels and noises of an update: (s, m, e, noise of the clip), (sigma, noise of the view)."""
    k_video, k_renoise = jax.random.split(key)
    k_plan, k_noise = jax.random.split(k_video)
    k_sigma, k_fresh = jax.random.split(k_renoise)
    size, column = batch.size, lambda level: level.reshape(-1, 1, 1, 1, 1)
    levels = grid(recipe.schedule.train_levels, recipe.schedule.shift)
    triple = draw_triples(k_plan, size, levels, recipe.triples)
    u = jax.random.uniform(k_sigma, (size,))
    sigma = jnp.clip(5.0 * u / (1 + 4.0 * u), 0.02, 0.98)
    assert (recipe.renoise.shift, recipe.renoise.lowest, recipe.renoise.highest) == (
        5.0,
        0.02,
        0.98,
    )
    normal = lambda key: jax.random.normal(key, batch.video.shape)
    levels = [column(level) for level in (triple.sigma_s, triple.sigma_m, triple.sigma_e)]
    return (*levels, normal(k_noise)), (column(sigma), normal(k_fresh))


def velocity(params, x, level, cond):
    return Toy().denoise(params, x, level.reshape(-1), cond).velocity


def guided_velocity(x, level, cond):
    """The teacher's, u + 2 (c - u)."""
    null = cond._replace(text=FROZEN["null_text"].repeat(len(cond.text), 0))
    c, u = (velocity(TEACHER, x, level, told) for told in (cond, null))
    return u + 2.0 * (c - u)


def papers_student_loss(params, critic, batch, key, recipe, weight, stop):
    """A function with the gradient of Salt Eq. 4 (direction per element, times dx0/dtheta) plus
    `weight` Eq. 8.
    """
    (s, m, e, noise), (t, fresh) = draws(key, batch, recipe)
    cond, fixed = batch.cond, jax.lax.stop_gradient
    x_s = (1 - s) * batch.video + s * noise
    v_s = velocity(params, x_s, s, cond)
    x0 = x_s - s * v_s
    x_t = fixed((1 - t) * x0 + t * fresh)
    real = x_t - t * guided_velocity(x_t, t, cond)
    fake = x_t - t * velocity(critic, x_t, t, cond)
    size = np.prod(batch.video.shape[1:])
    distance = jnp.abs(x0 - real).sum((1, 2, 3, 4), keepdims=True) / size
    eq_4 = (fixed((fake - real) / distance) * x0).sum() / size / len(x0)
    x_m = x_s - (s - m) * v_s
    v_m = velocity(params, fixed(x_m) if stop == "midpoint" else x_m, m, cond)
    x_1, x_2 = x_s - (s - e) * v_s, x_m - (m - e) * v_m
    x_1, x_2 = fixed(x_1) if stop == "direct" else x_1, fixed(x_2) if stop == "composed" else x_2
    eq_8 = ((x_1 - x_2) ** 2).sum() / size / len(x0)
    return eq_4 + weight * eq_8, eq_8


@pytest.mark.parametrize("stop", ["none", "composed", "direct", "midpoint"])
def test_the_students_gradient_is_the_papers(stop):
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, self_consistency=100.0, stop_gradient=stop))
    params, critic, batch = toy_params(0), toy_params(1), batch_of(0)
    ours = lambda p: loss_of(stage_of(recipe), UPDATES["student"], p, critic, batch)
    papers = lambda p: papers_student_loss(p, critic, batch, KEY, recipe, 100.0, stop)
    found, aux = jax.jit(jax.grad(ours, has_aux=True))(params)
    wanted, eq_8 = jax.jit(jax.grad(papers, has_aux=True))(params)
    close(found, wanted)
    np.testing.assert_allclose(aux.metrics["self_consistency"], eq_8, rtol=1e-4)
    assert 100 * eq_8 > 0.1, "too small a part of the gradient to be tested"


def test_the_student_step_applies_that_gradient():
    state, batch, key = toy_state(), batch_of(0), jax.random.fold_in(jax.random.key(7), 0)
    student, critic = state.learners["student"], state.learners["critic"]
    papers = lambda p: papers_student_loss(p, critic.params, batch, key, RECIPE, 1.0, "none")
    grads, _ = jax.jit(jax.grad(papers, has_aux=True))(student.params)
    tx = make_optimizer(OPTIMIZER, RECIPE.iterations)
    wanted = apply_gradients(student, grads, jnp.float32(0), tx)
    after, _ = run_toy("student", state, batch)
    close(after.learners["student"].params, wanted.params)


@dataclass(frozen=True)
class Counted(Toy):
    """Counts its evaluations."""

    calls: list = field(default_factory=list)

    def denoise(self, *args):
        self.calls.append(1)
        return super().denoise(*args)


def test_without_its_weight_self_consistency_is_neither_computed_nor_reported():
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, self_consistency=0.0))
    params, critic, batch, student = toy_params(0), toy_params(1), batch_of(0), Counted()
    stage = stage_of(recipe, student=student)
    (update, _), *_ = stage.updates(0)
    assert update == Update("student")
    ours = lambda p: loss_of(stage, update, p, critic, batch)
    found, aux = jax.jit(jax.grad(ours, has_aux=True))(params)
    papers = lambda p: papers_student_loss(p, critic, batch, KEY, recipe, 0.0, "none")[0]
    close(found, jax.jit(jax.grad(papers))(params))
    assert set(aux.metrics) == {"dmd", "dmd_gap"} and len(student.calls) == 1


def test_the_critics_gradient_is_flow_matching_on_the_students_video():
    params, student, batch = toy_params(1), toy_params(0), batch_of(0)

    def papers(p):
        (s, _, _, noise), (t, fresh) = draws(KEY, batch, RECIPE)
        x_s = (1 - s) * batch.video + s * noise
        x0 = x_s - s * velocity(student, x_s, s, batch.cond)
        x_t = (1 - t) * x0 + t * fresh
        return ((velocity(p, x_t, t, batch.cond) - (fresh - x0)) ** 2).mean()

    ours = lambda p: loss_of(stage_of(), UPDATES["critic"], student, p, batch)[0]
    wanted = jax.jit(jax.value_and_grad(papers))(params)
    close(jax.jit(jax.value_and_grad(ours))(params), wanted)


def test_the_gap_is_the_mean_distance_of_critic_and_teacher():
    """What DMD is about, in the clips' own units: it falls as the student gets better, unlike the
    loss.
    """
    params, critic, batch = toy_params(0), toy_params(1), batch_of(0)
    _, aux = loss_of(stage_of(), UPDATES["student"], params, critic, batch)
    (s, _, _, noise), (t, fresh) = draws(KEY, batch, RECIPE)
    x_s = (1 - s) * batch.video + s * noise
    x0 = x_s - s * velocity(params, x_s, s, batch.cond)
    x_t = (1 - t) * x0 + t * fresh
    real, fake = guided_velocity(x_t, t, batch.cond), velocity(critic, x_t, t, batch.cond)
    np.testing.assert_allclose(aux.metrics["dmd_gap"], np.abs(t * (real - fake)).mean(), rtol=1e-4)
