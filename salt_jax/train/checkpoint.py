"""A TrainState on disk, written by Orbax while training goes on: WORKDIR/checkpoints/STEP/ITEM.

| item                    | holds                                                                            |
|-------------------------|----------------------------------------------------------------------------------|
| student, ema, critic    | parameters as nested dicts; each loads without the others                        |
| student_opt, critic_opt | moments and the counts of skipped updates                                        |
| stream                  | in streaming long tuning: caches and prompts of the videos under way             |
| data                    | {"step": int}, the data position: a batch is a function of (seed, step)          |
| meta                    | {"config": str, "mesh": {axis: size}}, for the reader; nothing in it is restored |

A step counts only once Orbax has renamed its directory and left `commit_success.txt` in it; what a killed process was
writing stays behind under a temporary name and is ignored. The teacher never changes and is never saved. Missing and
cut-off files are noticed; flipped bits in array data are not: Orbax keeps no checksum of it.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh

from salt_jax.errors import UserError
from salt_jax.train.sharding import state_shardings
from salt_jax.train.state import TrainState
from salt_jax.types import Params

log = logging.getLogger(__name__)

TREES = ("student", "student_opt", "ema")
JSONS = ("data", "meta")
WITH_CRITIC = ("critic", "critic_opt")
STREAM = ("stream",)
T = TypeVar("T")


def open_checkpoints(workdir: str | Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, open for writing; the newest `keep` stay. A context manager: leaving it waits.

    Raises:
        UserError: the workdir cannot be written to.
    """
    directory = _directory(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}); pass a --workdir you may write to"
        ) from error
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return _manager(directory, options)


def save(manager: ocp.CheckpointManager, state: TrainState, meta: dict[str, Any]) -> None:
    """Start writing `state` as step `state.step`; a step that is already there is left alone.

    Returns once the arrays are copied, so `state` may be donated to the next step; a failed write raises at the next
    call or when the manager closes. Every process has to call it.
    """
    step = int(jax.device_get(state.step))
    if step in manager.all_steps():
        return
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    items |= {"data": ocp.args.JsonSave({"step": step}), "meta": ocp.args.JsonSave(meta)}
    with jax.transfer_guard("allow"):
        manager.save(step, args=ocp.args.Composite(**items))


def restore(
    manager: ocp.CheckpointManager, abstract_state: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest whole state and its meta, or None where nothing was saved yet. Complete or refused, never a part.

    A damaged step is reported, renamed to STEP.damaged.TIME (nothing is deleted) and the one before it is taken.

    Args:
        manager: from `open_checkpoints`.
        abstract_state: `jax.ShapeDtypeStruct`s with the shardings wanted now; the mesh may differ from the saved one.

    Raises:
        UserError: no step is readable, or the state has other arrays than `abstract_state`.
    """
    expected = _items(abstract_state)

    def read(step: int) -> tuple[TrainState, dict[str, Any]]:
        _refuse_mismatch(manager, step, expected)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in expected.items()}
        items |= {name: ocp.args.JsonRestore() for name in JSONS}
        found = dict(manager.restore(step, args=ocp.args.Composite(**items)).items())
        if found["data"] != {"step": step}:
            raise ValueError(f"its data position is {found['data']}")
        return _state(found, abstract_state, step), found["meta"]

    return _newest_readable(manager, read, set_aside=True)


def restore_params(workdir: str | Path, what: str, mesh: Mesh) -> Params:
    """Only the parameters of "ema" or "student", for sampling: no optimizer is known or read, nothing is written.

    Raises:
        UserError: the workdir has no checkpoint, or none that is readable.
    """
    if what not in ("ema", "student"):
        raise ValueError(f"what is {what!r}; it has to be 'ema' or 'student'")

    def read(step: int) -> Params:
        stored = _nested(_stored(manager, step)[what])
        target = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        abstract = jax.tree.map(target, stored, state_shardings(mesh, stored))
        args = ocp.args.Composite(**{what: ocp.args.StandardRestore(abstract)})
        return manager.restore(step, args=args)[what]

    params, directory = None, _directory(workdir)
    if directory.is_dir():
        options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
        with _manager(directory, options) as manager:
            params = _newest_readable(manager, read, set_aside=False)
    if params is None:
        raise UserError(
            f"there is no checkpoint in {directory}; train with this --workdir first, or name another"
        )
    return params


def _newest_readable(manager: ocp.CheckpointManager, read: Callable[[int], T], set_aside: bool) -> T | None:
    """`read(step)` of the newest step that can be read, None where there is no step."""
    root, damaged = Path(manager.directory), {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            _refuse_uncommitted(root / str(step))
            value = read(step)
        except Exception as error:
            # What Orbax and TensorStore raise on missing or cut-off files, some of it as a bare Exception.
            if type(error) is not Exception and not isinstance(error, (ValueError, KeyError, OSError)):
                raise
            damaged[step] = why = str(error).split("\n")[0].split(". See")[0][:200]
            log.warning("checkpoint step %d in %s is damaged (%s): back to the one before", step, root, why)
            if jax.process_count() > 1:
                break  # other processes may have read their part; they must not go on without this one
            continue
        if damaged and set_aside:
            for bad in damaged:
                (root / str(bad)).rename(root / f"{bad}.damaged.{time.time_ns()}")
            manager.reload()
        return value
    if damaged:
        told = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise UserError(
            f"no checkpoint in {root} could be read ({told}); put back a copy of one, move the directories of damaged "
            "steps away, or pass a new --workdir"
        )
    return None


def _refuse_uncommitted(directory: Path) -> None:
    """Orbax takes a half-copied directory for a step; only these files say that its writer, or a copy, finished."""
    items = TREES + JSONS
    for optional in (WITH_CRITIC, STREAM):
        items += optional if any((directory / name).exists() for name in optional) else ()
    for item in ("", *items):
        if not (directory / item / "commit_success.txt").is_file():
            raise OSError(f"{directory / item}/commit_success.txt is missing")


def _stored(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What is on disk, as trees of shapes and dtypes. No array is read."""
    metadata = manager.item_metadata(step)
    trees = [
        name for name in TREES + WITH_CRITIC + STREAM if (Path(manager.directory) / str(step) / name).is_dir()
    ]
    if lost := [name for name in trees if metadata[name] is None]:
        raise OSError(f"{lost[0]}/_METADATA is missing")
    return {name: metadata[name].tree for name in trees}


def _refuse_mismatch(manager: ocp.CheckpointManager, step: int, expected: dict[str, Any]) -> None:
    here, there = (
        {path: f"{x.dtype}{list(x.shape)}" for path, x in _paths(tree).items()}
        for tree in (expected, _stored(manager, step))
    )
    for path in here | there:
        if here.get(path) != there.get(path):
            raise UserError(
                f"checkpoint step {step} in {manager.directory} was written for another model preset or optimizer: "
                f"{path} is {there.get(path, 'absent')} there and {here.get(path, 'absent')} in this config; "
                "pass the config that made it, or a new --workdir"
            )


def _items(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts, one for each thing that somebody may want alone."""
    tree = _nested(state)
    learners = [name for name in ("student", "critic") if name in tree]
    params = {name: tree[name].pop("params") for name in learners}
    others = {name: tree[name] for name in ("ema", "stream") if name in tree}
    return params | others | {f"{name}_opt": tree[name] for name in learners}


def _state(items: dict[str, Any], like: TrainState, step: int) -> TrainState:
    """The inverse of `_items`."""
    names = [name for name in ("student", "critic") if name in items]
    tree = {name: items[f"{name}_opt"] | {"params": items[name]} for name in names}
    tree |= {name: items[name] for name in ("ema", "stream") if name in items}
    tree |= {"step": jax.device_put(np.int32(step), like.step.sharding)}
    leaves = _paths(tree)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in _paths(like)])


def _paths(tree: Any) -> dict[str, Any]:
    """Every leaf by its path. Optax' tuples and empty states vanish: what is on disk does not depend on them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(tree: Any) -> dict[str, Any]:
    return traverse_util.unflatten_dict(_paths(tree), sep="/")


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _manager(directory: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {name: ocp.StandardCheckpointHandler() for name in TREES + WITH_CRITIC + STREAM}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in JSONS}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
