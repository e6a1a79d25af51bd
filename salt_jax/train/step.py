"""The heart: what one update does. Pure functions of (state, frozen, batch, key); `compile_steps` jits them.

Salt Eq. 10: minimise L_DMD + lambda_SC L_SC over the student, while the critic follows the student's videos by flow
matching. `student_step` moves the student and its EMA and nothing else, `critic_step` the critic and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from salt_jax.flow.prediction import add_noise
from salt_jax.flow.schedule import draw_view_sigma
from salt_jax.losses.denoising import flow_matching_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.text_encoder import encode_text
from salt_jax.rollout.parallel import midpoint
from salt_jax.rollout.plan import Plan, draw_plan
from salt_jax.train.recipe import Recipe, make_optimizer
from salt_jax.train.state import TrainState, apply_gradients, update_ema
from salt_jax.types import Denoiser, Params, Prediction, PRNGKey, Sigma

# video: Latent [B, F, H, W, C]; text: TextEmb [B, T, D], or TokenIds [B, T] in stage denoising
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class Networks:
    """The apply functions of a run. Parameters travel apart: student and critic in the state, teacher frozen."""

    student: Denoiser
    critic: Denoiser
    teacher: Denoiser  # guided


def students_video(
    denoiser: Denoiser, params: Params, batch: Batch, key: PRNGKey, recipe: Recipe
) -> tuple[jax.Array, Prediction, Plan]:
    """The student's update at one level of its grid, from a noised real clip (backward simulation off, Salt App. B).

    Both optimisers see the same mixture of levels. Returns the noised clip, the prediction and the drawn levels.
    """
    k_plan, k_noise = jax.random.split(key)
    s, x0 = recipe.schedule, batch["video"]
    plan = draw_plan(k_plan, x0.shape[0], s.train_updates, s.anchor_updates, s.shift)
    x_s = add_noise(x0, jax.random.normal(k_noise, x0.shape), plan.sigma_s)
    return x_s, denoiser(params, x_s, plan.sigma_s, batch["text"]), plan


def noised_view(x0: jax.Array, key: PRNGKey, recipe: Recipe) -> tuple[jax.Array, jax.Array, Sigma]:
    """A noised copy of a video, with its noise and level, for teacher and critic to look at. No gradient into x0."""
    k_sigma, k_noise = jax.random.split(key)
    sigma = draw_view_sigma(k_sigma, x0.shape[0], recipe.view.shift, recipe.view.lowest, recipe.view.highest)
    noise = jax.random.normal(k_noise, x0.shape)
    return add_noise(jax.lax.stop_gradient(x0), noise, sigma), noise, sigma


def student_loss(
    params: Params,
    critic: Params,
    teacher: Params,
    batch: Batch,
    key: PRNGKey,
    nets: Networks,
    recipe: Recipe,
) -> tuple[jax.Array, Metrics]:
    """What the student is blamed for, Salt Eq. 10."""
    k_video, k_view = jax.random.split(key)
    text, stop = batch["text"], recipe.loss.stop_gradient
    # 1. The student makes a video in one update.
    x_s, video, plan = students_video(nets.student, params, batch, k_video, recipe)
    # 2. Teacher and critic judge the same noised copy of it.
    x, _, sigma = noised_view(video.x0, k_view, recipe)
    x0_teacher = nets.teacher(teacher, x, sigma, text).x0
    x0_critic = nets.critic(critic, x, sigma, text).x0
    # 3. The equations.
    terms = {"dmd": dmd_loss(video.x0, x0_critic, x0_teacher)}
    weights = {"dmd": 1.0, "self_consistency": recipe.loss.self_consistency}
    if recipe.loss.self_consistency:
        x_m = midpoint(x_s, video.velocity, plan.sigma_s, plan.sigma_m, stop == "midpoint")
        v_m = nets.student(params, x_m, plan.sigma_m, text).velocity
        terms["self_consistency"] = self_consistency_loss(
            video.velocity, v_m, plan.sigma_s, plan.sigma_m, plan.sigma_e, stop
        )
    terms = {name: term.mean() for name, term in terms.items()}
    return jnp.stack([weights[name] * term for name, term in terms.items()]).sum(), terms


def critic_loss(
    params: Params, student: Params, batch: Batch, key: PRNGKey, nets: Networks, recipe: Recipe
) -> tuple[jax.Array, Metrics]:
    """The critic learns to denoise the student's videos, so that Eq. 4 has the student's score."""
    k_video, k_view = jax.random.split(key)
    _, video, _ = students_video(nets.student, jax.lax.stop_gradient(student), batch, k_video, recipe)
    x, noise, sigma = noised_view(video.x0, k_view, recipe)
    velocity = nets.critic(params, x, sigma, batch["text"]).velocity
    loss = flow_matching_loss(velocity, video.x0, noise).mean()
    return loss, {"critic": loss}


def denoising_loss(
    params: Params, teacher: Params, batch: Batch, key: PRNGKey, nets: Networks, recipe: Recipe
) -> tuple[jax.Array, Metrics]:
    """Flow matching for a teacher-to-be and its text encoder together; some examples see the empty caption.

    The target is the data's velocity, or, where there is a teacher already, its velocity: for the closed form that is
    the conditional mean of the former, so the minimiser is the same and the gradient has less variance.
    """
    k_drop, k_view = jax.random.split(key)
    x0, tokens = batch["video"], batch["text"]
    null = jnp.zeros_like(tokens).at[:, 0].set(1)  # the empty caption: only the end token
    drop = jax.random.bernoulli(k_drop, recipe.caption_dropout, (x0.shape[0], 1))
    tokens = jnp.where(drop, null, tokens)
    text = encode_text(params["text_encoder"], tokens, recipe.text)
    x, noise, sigma = noised_view(x0, k_view, recipe)
    velocity = nets.student(params["wan"], x, sigma, text).velocity
    if recipe.teacher.kind != "data":
        target = nets.teacher(teacher, x, sigma, tokens[..., None].astype(jnp.float32)).velocity
        x0 = noise - target
    loss = flow_matching_loss(velocity, x0, noise).mean()
    return loss, {"denoising": loss}


def student_step(
    state: TrainState, teacher: Params, batch: Batch, key: PRNGKey, nets: Networks, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One update of the student and its EMA."""
    loss = lambda p: student_loss(p, state.critic.params, teacher, batch, key, nets, recipe)
    return _move_student(state, loss, recipe)


def denoising_step(
    state: TrainState, teacher: Params, batch: Batch, key: PRNGKey, nets: Networks, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One update of a teacher-to-be and its EMA."""
    return _move_student(state, lambda p: denoising_loss(p, teacher, batch, key, nets, recipe), recipe)


def critic_step(
    state: TrainState, teacher: Params, batch: Batch, key: PRNGKey, nets: Networks, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One update of the critic."""
    loss = lambda p: critic_loss(p, state.student.params, batch, key, nets, recipe)
    grads, metrics = jax.grad(loss, has_aux=True)(state.critic.params)
    tx = make_optimizer(recipe.critic_optimizer, recipe.updates * recipe.critic_updates)
    critic = apply_gradients(state.critic, grads, metrics["critic"], tx)
    metrics |= {"critic_grad_norm": optax.tree.norm(grads), "critic_skipped": critic.skipped}
    return replace(state, critic=critic), metrics | {"critic_skipped_in_a_row": critic.skipped_in_a_row}


def _move_student(state: TrainState, loss: Callable, recipe: Recipe) -> tuple[TrainState, Metrics]:
    grads, metrics = jax.grad(loss, has_aux=True)(state.student.params)
    tx = make_optimizer(recipe.student_optimizer, recipe.updates)
    student = apply_gradients(state.student, grads, jnp.stack(list(metrics.values())), tx)
    ema = update_ema(state.ema, student.params, recipe.ema.decay, state.step, recipe.ema.start)
    metrics |= {"student_grad_norm": optax.tree.norm(grads), "student_skipped": student.skipped}
    metrics |= {"student_skipped_in_a_row": student.skipped_in_a_row}
    return replace(state, step=state.step + 1, student=student, ema=ema), metrics


def compile_step(step: Callable, nets: Networks, recipe: Recipe, shardings: Any) -> Callable:
    """Jits one step: `(state, teacher, batch, seed key, index) -> state, metrics`.

    The state is donated, the teacher never. Shardings are fixed on both sides, so nothing recompiles and nothing moves.

    Args:
      shardings: (state, teacher, batch, replicated), trees of NamedSharding.
    """
    in_state, in_teacher, in_batch, everywhere = shardings

    def run(state, teacher, batch, key, index):
        return step(state, teacher, batch, jax.random.fold_in(key, index), nets, recipe)

    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=(in_state, in_teacher, in_batch, everywhere, everywhere),
        out_shardings=(in_state, everywhere),
    )
