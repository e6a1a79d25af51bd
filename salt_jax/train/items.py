"""A TrainState as nested dicts, one for each thing that somebody may want alone, and back."""

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from salt_jax.train.state import TrainState


def to_items(state: TrainState) -> dict[str, Any]:
    """student, ema, critic: parameters; student_opt, critic_opt: the rest of the learners; stream."""
    tree = nested(state)
    learners = [name for name in ("student", "critic") if name in tree]
    params = {name: tree[name].pop("params") for name in learners}
    others = {name: tree[name] for name in ("ema", "stream") if name in tree}
    return params | others | {f"{name}_opt": tree[name] for name in learners}


def from_items(items: dict[str, Any], like: TrainState, step: int) -> TrainState:
    """The inverse of `to_items`."""
    names = [name for name in ("student", "critic") if name in items]
    tree = {name: items[f"{name}_opt"] | {"params": items[name]} for name in names}
    tree |= {name: items[name] for name in ("ema", "stream") if name in items}
    tree |= {"step": jax.device_put(np.int32(step), like.step.sharding)}
    leaves = by_path(tree)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in by_path(like)])


def by_path(tree: Any) -> dict[str, Any]:
    """Every leaf by its path. Optax' tuples and empty states vanish: what is on disk does not depend on them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(tree: Any) -> dict[str, Any]:
    return traverse_util.unflatten_dict(by_path(tree), sep="/")
