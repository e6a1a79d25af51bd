"""The training state, and the two ways it is updated: by gradient and by averaging.

On disk the state is nested dicts, one for each thing that somebody may want alone.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from salt_jax.config.schema import Recipe
from salt_jax.models.kv_cache import KVCache
from salt_jax.optimizer import optimizer_of
from salt_jax.types import Leaf, Params, Tree


@flax.struct.dataclass
class Learner:
    """A network under training: float32 parameters, optimizer moments, and the updates that were
    thrown away.
    """

    params: Params
    opt_state: Params
    skipped: Leaf  # int32[], updates skipped because something was not finite
    skipped_in_a_row: Leaf  # int32[], zero after a good update


@flax.struct.dataclass
class Stream:
    """The unfinished videos of streaming long tuning: each update continues them."""

    cache: KVCache  # of the student, every slot filled
    text: Leaf  # [B, T, D], the prompts
    switch: Leaf = None  # [B, T, D], the prompts paired with these, where the data has them
    past: Leaf = None  # float32 [B, F, H, W, C], the last frames, where one is encoded anew


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to resume as if it had never stopped. The teacher never changes and is
    not in here.
    """

    iteration: Leaf  # int32[], how many are finished
    learners: dict[str, Learner]  # "student" and, in distillation, "critic"
    ema: Params  # float32, the averaged student
    stream: Leaf = None  # a Stream, in streaming long tuning; jit puts marks where there is none


def init_learner(params: Params, tx: optax.GradientTransformation) -> Learner:
    """A learner that starts at `params`: copied, so that donating it never frees the teacher it
    started from.
    """
    params = _float32_copy(params)
    return Learner(params, tx.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def init_state(learners: dict[str, Learner], stream: Stream | None = None) -> TrainState:
    """The state before the first iteration; the EMA starts as a copy of the student."""
    ema = _float32_copy(learners["student"].params)
    return TrainState(jnp.zeros((), jnp.int32), learners, ema, stream)


def first_state(
    recipe: Recipe, starts: dict[str, Params], stream: Stream | None = None
) -> TrainState:
    """The same for a run: each learner with its optimizer at its start."""
    learners = {
        name: init_learner(start, optimizer_of(recipe, name)) for name, start in starts.items()
    }
    return init_state(learners, stream)


def apply_gradients(
    learner: Learner, grads: Params, loss: Float[Array, "..."], tx: optax.GradientTransformation
) -> Learner:
    """One optimizer update, or none: a gradient or loss that is not finite leaves parameters and
    moments bit for bit.

    Args:
        learner: what moves.
        grads: a tree like `learner.params`.
        loss: the loss the gradients came from, or all its terms; every entry has to be finite.
        tx: the optimizer that made `learner.opt_state`.

    Returns:
        The learner after the update, or the same one with `skipped` and `skipped_in_a_row` one
        higher.

    Raises:
        AssertionError: `grads` has other arrays than `learner.params`.
    """
    chex.assert_trees_all_equal_shapes(grads, learner.params)
    finite = jnp.isfinite(optax.tree.norm(grads)) & jnp.all(jnp.isfinite(loss))
    updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
    new = optax.apply_updates(learner.params, updates), opt_state
    old = learner.params, learner.opt_state
    params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    missed = 1 - finite.astype(jnp.int32)
    return Learner(
        params, opt_state, learner.skipped + missed, (learner.skipped_in_a_row + 1) * missed
    )


def fetched(tree: Tree, host: bool) -> Tree:
    """What waits in the host's memory, brought to the devices; `host` False: as it is."""
    return jax.device_put(tree, jax.memory.Space.Device) if host else tree


def put_back(tree: Tree, host: bool) -> Tree:
    """The inverse; counters, which have no axes, stay."""
    if not host:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)


def update_ema(
    ema: Params,
    params: Params,
    decay: float | Float[Array, ""],
    step: int | Int[Array, ""],
    start: int,
) -> Params:
    """The averaged student: ema <- decay * ema + (1 - decay) * params, in float32; a plain copy
    while step < start.

    `step` counts the updates finished before the one that made `params`: `state.iteration` as it
    began.

    Raises:
        AssertionError: the two have other arrays.
    """
    chex.assert_trees_all_equal_shapes(ema, params)
    params = _float32_copy(params)
    averaged = optax.incremental_update(params, ema, step_size=1 - decay)
    return jax.tree.map(lambda a, p: jnp.where(step < start, p, a), averaged, params)


def _float32_copy(tree: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)


def to_items(state: TrainState) -> dict[str, Params]:
    """Of each learner NAME its parameters, and as NAME_opt the rest of it; ema; stream."""
    items = {name: nested(getattr(state, name)) for name in ("ema", "stream")}
    for name, learner in state.learners.items():
        rest = nested(learner)
        items |= {name: rest.pop("params"), f"{name}_opt": rest}
    return {name: item for name, item in items.items() if item}


def from_items(items: dict[str, Params], like: TrainState, step: int) -> TrainState:
    """The inverse of `to_items`."""
    learners = {
        name: items[f"{name}_opt"] | {"params": items[name]}
        for name in items
        if f"{name}_opt" in items
    }
    tree = {name: items[name] for name in ("ema", "stream") if name in items}
    tree |= {"learners": learners}
    tree |= {"iteration": jax.device_put(np.int32(step), like.iteration.sharding)}
    leaves = by_path(tree)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in by_path(like)])


def by_path(tree: object) -> dict[str, Leaf]:
    """Every leaf by its path.

    Optax' tuples and empty states vanish: what is on disk does not depend on them.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(tree: object) -> dict[str, Params]:
    return traverse_util.unflatten_dict(by_path(tree), sep="/")
