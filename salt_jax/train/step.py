"""One optimizer call as a program: the same for every stage and every learner."""

from dataclasses import replace
from typing import NamedTuple

import jax
import optax
from jax.sharding import NamedSharding

from salt_jax.optimizer import optimizer_of
from salt_jax.rollout.draws import Draw
from salt_jax.stages.accumulate import mean_gradient
from salt_jax.stages.stage import Batch, Frozen, Inputs, Metrics, Stage, Update
from salt_jax.state import (
    Learner,
    TrainState,
    apply_gradients,
    fetched,
    put_back,
    update_ema,
)
from salt_jax.types import Leaf, Params, PRNGKey


class Call(NamedTuple):
    """Which optimizer call of a run it is."""

    key: PRNGKey  # of the run
    index: Leaf  # int32 []
    draw: Draw | None  # what was drawn for it on the host


def train_step(
    stage: Stage, update: Update, state: TrainState, frozen: Frozen, batch: Batch, call: Call
) -> tuple[TrainState, Metrics]:
    """Moves one learner by the gradient of its loss; with the student its average moves, and an
    iteration has passed. `stage` and `update` are static.
    """
    recipe, name = stage.recipe, update.moves
    noise = stage.noise(jax.random.fold_in(call.key, call.index), batch)
    ema = fetched(state.ema, recipe.host_state)
    there = replace(state, ema=ema)

    def loss(params, batch, noise, stream):
        inputs = Inputs(replace(there, stream=stream), frozen, batch, noise, call.draw)
        value, aux = stage.loss(params, inputs, update)
        return value, (aux.metrics, aux.stream)

    parts = state.learners[name].params, batch, noise, state.stream
    (value, (metrics, stream)), grads = mean_gradient(loss, *parts, recipe.accumulate)
    learner = _moved(stage, name, state.learners[name], grads, value)
    state = replace(state, learners=state.learners | {name: learner}, stream=stream)
    if name == "student":
        ema = update_ema(ema, learner.params, recipe.ema.decay, state.iteration, recipe.ema.start)
        ema = put_back(ema, recipe.host_state)
        state = replace(state, ema=ema, iteration=state.iteration + 1)
    metrics |= {
        f"{name}_grad_norm": optax.tree.norm(grads),
        f"{name}_skipped": learner.skipped,
        f"{name}_skipped_in_a_row": learner.skipped_in_a_row,
    }
    return state, metrics


Shardings = tuple[TrainState, Frozen, NamedSharding, NamedSharding]
"""Of state and frozen, array by array, and of all of a batch and of a call."""


def compile_step(stage: Stage, update: Update, shardings: Shardings) -> jax.stages.Wrapped:
    """Jits one optimizer call: `(state, frozen, batch, call) -> state, metrics`.

    The state is donated, what is frozen never. Shardings are fixed on both sides, so nothing
    recompiles or moves.
    """
    *_, everywhere = shardings

    def run(state, frozen, batch, call):
        return train_step(stage, update, state, frozen, batch, call)

    return jax.jit(
        run,
        donate_argnums=0,
        in_shardings=shardings,
        out_shardings=(shardings[0], everywhere),
    )


def _moved(stage: Stage, name: str, learner: Learner, grads: Params, value: jax.Array) -> Learner:
    """`apply_gradients` with moments that may wait in the host's memory."""
    host = stage.recipe.host_state
    learner = replace(learner, opt_state=fetched(learner.opt_state, host))
    learner = apply_gradients(learner, grads, value, optimizer_of(stage.recipe, name))
    return replace(learner, opt_state=put_back(learner.opt_state, host))
