"""The optimizer of student and critic."""

import jax
import jax.numpy as jnp
import optax

from salt_jax.config.schema import Recipe
from salt_jax.config.sections import Optimizer


def optimizer_of(recipe: Recipe, learner: str) -> optax.GradientTransformation:
    """That of "student" or "critic" over a whole run."""
    if learner == "student":
        return make_optimizer(recipe.student_optimizer, recipe.iterations)
    return make_optimizer(recipe.critic_optimizer, recipe.iterations * recipe.critic_ratio)


def make_optimizer(o: Optimizer, updates: int) -> optax.GradientTransformation:
    """Clipped AdamW with linear warm-up, then constant or cosine over `updates`; no first moment
    where b1 is 0.
    """
    end = 0.0 if o.decay else o.learning_rate
    if o.decay:
        rate = optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup, updates, end)
    else:
        rate = (
            optax.linear_schedule(0.0, o.learning_rate, o.warmup) if o.warmup else o.learning_rate
        )
    adamw = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw if o.b1 else _forgetful(adamw))


def _forgetful(adamw: optax.GradientTransformation) -> optax.GradientTransformation:
    """AdamW of b1 = 0: its first moment is the gradient at hand, so the last one need not be
    kept.
    """

    def with_moment(state: optax.OptState, mu: optax.Updates | None) -> optax.OptState:
        assert isinstance(state, tuple) and isinstance(state[0], optax.ScaleByAdamState)
        return state[0]._replace(mu=mu), *state[1:]

    def init(params: optax.Params) -> optax.OptState:
        return with_moment(adamw.init(params), None)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        nothing = jax.tree.map(jnp.zeros_like, updates)  # what b1 multiplies; the compiler drops it
        updates, state = adamw.update(updates, with_moment(state, nothing), params)
        return updates, with_moment(state, None)

    return optax.GradientTransformation(init, update)
