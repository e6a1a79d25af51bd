"""The heart: what one update does. Pure functions of (state, frozen, batch, key, draw);
`compile_step` jits them.

Salt Eq. 13: minimise L_DMD + lambda_SC L_SC + lambda_align L_align over the student, while the
critic follows the student's videos by flow matching. For whole clips that is Eq. 10. `student_step`
moves the student, its EMA and the video it is making, and nothing else; `critic_step` the critic
and that video.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.flow_matching import flow_matching_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.models.denoiser import Network
from salt_jax.models.kv_cache import KVCache, forget
from salt_jax.models.lora import merge
from salt_jax.rollout.causal import Trajectory, recache
from salt_jax.rollout.draws import Choice, Draw, as_reference
from salt_jax.rollout.parallel import midpoint
from salt_jax.state import (
    Learner,
    Stream,
    TrainState,
    apply_gradients,
    fetched,
    put_back,
    update_ema,
)
from salt_jax.train.accumulate import mean_gradient
from salt_jax.train.begin import Batch, Noise, begin, draw_noise
from salt_jax.train.optimizer import make_optimizer
from salt_jax.types import Denoiser, Params, PRNGKey

Metrics = dict[str, jax.Array]
Frozen = dict[str, Params]  # "teacher", and what a recipe asks for: "base", "null_text", ...


@dataclass(frozen=True)
class Networks:
    """The apply functions of a run.

    Parameters travel apart: student and critic in the state, the rest frozen.
    """

    student: Network
    critic: Denoiser
    teacher: Denoiser  # guided


def student_loss(
    params: Params,
    critic: Params,
    frozen: Frozen,
    batch: Batch,
    noise: Noise,
    draw: Any,
    cache: KVCache | None,
    nets: Networks,
    recipe: Recipe,
    choice: Choice,
) -> tuple[jax.Array, tuple[Metrics, Trajectory | None]]:
    """What the student is blamed for, Salt Eq. 13.

    `choice` is static: its ifs are gone after tracing.
    """
    text, stop = batch["text"], recipe.loss.stop_gradient
    # 1. The student begins a video on its own, then makes the update that it is blamed for, of all
    # chunks at once.
    start = begin(nets.student, params, batch, noise, draw, cache, recipe)
    video = nets.student.denoise(params, start.x, start.sigma, text, start.sight)
    # 2. Teacher and critic judge the same noised copy of it.
    whole = lambda x0: jnp.concatenate([start.before, x0], axis=1)
    new = slice(start.before.shape[1], None)
    x = add_noise(jax.lax.stop_gradient(whole(video.x0)), noise.renoise, noise.sigma)
    x0_teacher = nets.teacher(frozen["teacher"], x, noise.sigma, text).x0[:, new]
    x0_critic = nets.critic(critic, x, noise.sigma, text).x0[:, new]
    # 3. The equations.
    terms = {"dmd": dmd_loss(video.x0, x0_critic, x0_teacher)}
    more = {"dmd_gap": jnp.abs(x0_critic - x0_teacher).mean()}
    if choice.self_consistency:
        x_m = midpoint(start.x, video.velocity, start.sigma, start.sigma_m, stop == "midpoint")
        v_m = nets.student.denoise(params, x_m, start.sigma_m, text, start.sight).velocity
        terms["self_consistency"] = self_consistency_loss(
            video.velocity, v_m, start.sigma, start.sigma_m, start.sigma_e, stop
        )
    if choice.alignment:
        best = as_reference(draw, recipe.rollout.first_steps)
        reference = begin(nets.student, params, batch, noise, best, cache, recipe)
        judge = {"base": frozen.get("base"), "critic": critic, "student": params}[
            recipe.align.network
        ]
        judge, seen = (
            jax.lax.stop_gradient(judge),
            lambda x0: add_noise(whole(x0), noise.renoise, noise.sigma),
        )
        look = lambda x0: nets.student.features(
            judge, seen(x0), noise.sigma, text, recipe.align.layers
        )[:, new]
        terms["alignment"], active = cache_alignment_loss(
            look(video.x0), look(reference.trajectory.x0), recipe.align.margin
        )
        more["alignment_active"] = active.mean()
    weights = {
        "dmd": 1.0,
        "self_consistency": recipe.loss.self_consistency,
        "alignment": recipe.align.weight,
    }
    terms = {name: term.mean() for name, term in terms.items()}
    loss = jnp.stack([weights[name] * term for name, term in terms.items()]).sum()
    return loss, (terms | more, start.trajectory)


def critic_loss(
    params: Params,
    student: Params,
    batch: Batch,
    noise: Noise,
    draw: Draw | None,
    cache: KVCache | None,
    nets: Networks,
    recipe: Recipe,
) -> tuple[jax.Array, tuple[Metrics, Trajectory | None]]:
    """The critic learns to denoise the student's videos, so that Eq. 4 has the student's score."""
    student, text = jax.lax.stop_gradient(student), batch["text"]
    start = begin(nets.student, student, batch, noise, draw, cache, recipe)
    if start.trajectory:
        x0 = start.trajectory.x0
    else:
        x0 = nets.student.denoise(student, start.x, start.sigma, text, start.sight).x0
    whole = jax.lax.stop_gradient(jnp.concatenate([start.before, x0], axis=1))
    x, new = add_noise(whole, noise.renoise, noise.sigma), slice(start.before.shape[1], None)
    velocity = nets.critic(params, x, noise.sigma, text).velocity[:, new]
    loss = flow_matching_loss(velocity, x0, noise.renoise[:, new]).mean()
    return loss, ({"critic": loss}, start.trajectory)


def student_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: PRNGKey,
    draw: Draw | None,
    nets: Networks,
    recipe: Recipe,
    choice: Choice,
) -> tuple[TrainState, Metrics]:
    """One update of the student and its EMA."""
    lora, critic = recipe.lora, merge(frozen.get("base"), state.critic.params, recipe.lora)
    whole = lambda p: merge(frozen.get("student"), p, lora)
    now, noise = whole(state.student.params), draw_noise(key, batch, recipe)

    def loss(params, batch, noise, stream):
        batch, cache = go_on(now, stream, batch, draw, nets, recipe, choice)
        args = (critic, frozen, batch, noise, draw, cache, nets, recipe, choice)
        value, (metrics, made) = student_loss(whole(params), *args)
        return value, (metrics, carry(made, batch, recipe))

    return move_student(state, loss, batch, noise, recipe)


def critic_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: PRNGKey,
    draw: Draw | None,
    nets: Networks,
    recipe: Recipe,
    choice: Choice,
) -> tuple[TrainState, Metrics]:
    """One update of the critic."""
    student = merge(frozen.get("student"), state.student.params, recipe.lora)
    whole = lambda p: merge(frozen.get("base"), p, recipe.lora)

    def loss(params, batch, noise, stream):
        batch, cache = go_on(student, stream, batch, draw, nets, recipe, choice)
        value, (metrics, made) = critic_loss(
            whole(params), student, batch, noise, draw, cache, nets, recipe
        )
        return value, (metrics, carry(made, batch, recipe))

    parts = batch, draw_noise(key, batch, recipe), state.stream
    (_, (metrics, stream)), grads = mean_gradient(
        loss, state.critic.params, *parts, recipe.accumulate
    )
    tx = make_optimizer(recipe.critic_optimizer, recipe.iterations * recipe.critic_ratio)
    critic = apply_at(state.critic, grads, metrics["critic"], tx, recipe)
    metrics |= {"critic_grad_norm": optax.tree.norm(grads), "critic_skipped": critic.skipped}
    metrics |= {"critic_skipped_in_a_row": critic.skipped_in_a_row}
    return replace(state, critic=critic, stream=stream), metrics


def apply_at(learner: Learner, grads: Params, loss: jax.Array, tx: Any, recipe: Recipe) -> Learner:
    """`apply_gradients` with moments that may wait in the host's memory."""
    learner = replace(learner, opt_state=fetched(learner.opt_state, recipe.host_state))
    learner = apply_gradients(learner, grads, loss, tx)
    return replace(learner, opt_state=put_back(learner.opt_state, recipe.host_state))


def go_on(
    params: Params,
    stream: Stream | None,
    batch: Batch,
    draw: Any,
    nets: Networks,
    recipe: Recipe,
    choice: Choice,
) -> tuple[Batch, KVCache | None]:
    """The prompts of an update and the cache it goes on from: those of the video under way, unless
    a new one starts.

    A switch takes the batch's prompts and reads the cached frames again under them, before anything
    is made.
    """
    if stream is None or choice.sequence == "new":
        return batch, None
    if not recipe.stream.switch:
        return batch | {"text": stream.text}, stream.cache
    # A branch, not a program of its own: that would be half as many programs again.
    text = jnp.where(draw.switch, batch["text"], stream.text)
    again = lambda cache: recache(nets.student, params, cache, text, recipe.memory)
    return batch | {"text": text}, jax.lax.cond(
        draw.switch, again, lambda cache: cache, stream.cache
    )


def carry(made: Trajectory | None, batch: Batch, recipe: Recipe) -> Stream | None:
    """What the next update goes on from."""
    if made is None or not recipe.stream.max_frames:
        return None
    return Stream(forget(made.cache, recipe.memory), batch["text"])


def move_student(
    state: TrainState, loss: Callable, batch: Batch, noise: Any, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One update of the student's parameters and their average; `loss` as in
    `train.accumulate.mean_gradient`.
    """
    parts = batch, noise, state.stream
    (value, (metrics, stream)), grads = mean_gradient(
        loss, state.student.params, *parts, recipe.accumulate
    )
    tx = make_optimizer(recipe.student_optimizer, recipe.iterations)
    student = apply_at(state.student, grads, value, tx, recipe)
    ema = fetched(state.ema, recipe.host_state)
    ema = update_ema(ema, student.params, recipe.ema.decay, state.step, recipe.ema.start)
    ema = put_back(ema, recipe.host_state)
    metrics |= {"student_grad_norm": optax.tree.norm(grads), "student_skipped": student.skipped}
    metrics |= {"student_skipped_in_a_row": student.skipped_in_a_row}
    return replace(state, step=state.step + 1, student=student, ema=ema, stream=stream), metrics


def compile_step(
    step: Callable, nets: Networks, recipe: Recipe, shardings: Any, **static: Any
) -> Callable:
    """Jits one step: `(state, frozen, batch, seed key, index, draw) -> state, metrics`.

    The state is donated, what is frozen never. Shardings are fixed on both sides, so nothing
    recompiles or moves.

    Args:
      shardings: (state, frozen, batch, replicated), trees of NamedSharding.
      static: what else the step takes that is not an array.
    """
    in_state, in_frozen, in_batch, everywhere = shardings

    def run(state, frozen, batch, key, index, draw):
        return step(
            state, frozen, batch, jax.random.fold_in(key, index), draw, nets, recipe, **static
        )

    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=(in_state, in_frozen, in_batch, everywhere, everywhere, everywhere),
        out_shardings=(in_state, everywhere),
    )
