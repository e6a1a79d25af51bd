"""A TrainState on disk, written by Orbax while training goes on: WORKDIR/checkpoints/STEP/ITEM.

| item                    | holds                                                                |
|-------------------------|----------------------------------------------------------------------|
| student, critic, ..     | parameters of each learner, as nested dicts; each loads alone        |
| student_opt, ..         | its moments, and the counts of skipped updates                       |
| ema                     | the averaged student                                                 |
| stream                  | in streaming long tuning: caches and prompts of the videos under way |
| data                    | {"step": int}, the data position: a batch comes from (seed, step)    |
| meta                    | {"config": str, "mesh": {axis: size}}, for the reader, not restored  |

A step counts only once Orbax has renamed its directory and left `commit_success.txt` in it; what a
killed process was writing stays behind under a temporary name and is ignored. The teacher never
changes and is never saved. Missing and cut-off files are noticed; flipped bits in array data are
not: Orbax keeps no checksum of it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as managers

from salt_jax import hosts
from salt_jax.checkpoint_files import (
    JSONS,
    damage,
    directory_of,
    full_disk,
    refuse_uncommitted,
    set_aside,
    trees,
)
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.keys import Json
from salt_jax.sharding import laid_out, state_shardings
from salt_jax.state import TrainState, by_path, from_items, nested, to_items
from salt_jax.types import Params

log = logging.getLogger(__name__)

T = TypeVar("T")


def open_checkpoints(
    workdir: str | AnyPath, keep: int, keep_every: int = 0
) -> ocp.CheckpointManager:
    """The checkpoints of a workdir, open for writing. A context manager: leaving it waits.

    The newest `keep` stay, and beside them, unless `keep_every` is 0, those whose step is a
    multiple of it.
    """
    directory = directory_of(workdir)
    newest, some = managers.LatestN(keep), [managers.EveryNSteps(keep_every)] if keep_every else []
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy([newest, *some]),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return _manager(directory, options)


@contextmanager
def writing(
    workdir: str | AnyPath, keep: int, keep_every: int = 0
) -> Iterator[ocp.CheckpointManager]:
    """`open_checkpoints`; leaving it waits for what is being written.

    Raises:
        UserError: the disk refuses.
    """
    manager = open_checkpoints(workdir, keep, keep_every)
    with full_disk(manager.directory), manager:
        yield manager


def save(manager: ocp.CheckpointManager, state: TrainState, meta: Json) -> None:
    """Start writing `state` as step `state.iteration`; a step that is already there is left alone.

    Returns once the arrays are copied, so `state` may be donated to the next step; a failed write
    raises at the next call or in `finish`. Every process has to call it.

    Raises:
        UserError: the disk refuses; the checkpoint before it is whole.
    """
    step = int(jax.device_get(state.iteration))
    if step in manager.all_steps():
        return
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in to_items(state).items()}
    items |= {"data": ocp.args.JsonSave({"step": step}), "meta": ocp.args.JsonSave(meta)}
    with jax.transfer_guard("allow"), full_disk(manager.directory):
        manager.save(step, args=ocp.args.Composite(**items))


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what `save` began is on the disk.

    Raises:
        UserError: the disk refuses.
    """
    with full_disk(manager.directory):
        manager.wait_until_finished()
        manager.check_for_errors()


def restore(
    manager: ocp.CheckpointManager, abstract_state: TrainState
) -> tuple[TrainState, Json] | None:
    """The newest whole state and its meta, or None where nothing was saved yet. Complete or
    refused, never a part.

    A damaged step is reported, renamed to STEP.damaged.TIME (nothing is deleted) and the one before
    it is taken.

    Args:
        manager: from `open_checkpoints`.
        abstract_state: `jax.ShapeDtypeStruct`s with the shardings wanted now; the mesh may differ
          from the saved one.

    Raises:
        UserError: no step is readable, or the state has other arrays than `abstract_state`.
    """
    expected = to_items(abstract_state)

    def read(step: int) -> Json:
        _refuse_mismatch(reader, step, expected)
        items = {name: _restore_args(tree) for name, tree in expected.items()}
        items |= {name: ocp.args.JsonRestore() for name in JSONS}
        found = dict(reader.restore(step, args=ocp.args.Composite(**items)).items())
        if found["data"] != {"step": step}:
            raise ValueError(f"its data position is {found['data']}")
        return found

    root = as_path(manager.directory)
    with _reading(root) as reader:
        got, damaged = _newest_readable(reader, read, together=True)
    if got and damaged:
        hosts.only_first(lambda: set_aside(root, damaged), "damaged checkpoints")
        manager.reload()
    return (from_items(got, abstract_state, got["data"]["step"]), got["meta"]) if got else None


def restore_params(
    workdir: str | AnyPath, what: str, mesh: Mesh, step: int | None = None
) -> Params:
    """The parameters of `restore_step`, whichever step they are of."""
    return restore_step(workdir, what, mesh, step)[1]


def restore_step(
    workdir: str | AnyPath, what: str, mesh: Mesh, step: int | None = None
) -> tuple[int, Params]:
    """Only the parameters of "ema", "student" or "critic": no optimizer is known or read, nothing
    is written.

    `step` None is the newest that can be read; one that is named is read or refused. Returned too.

    Raises:
        UserError: the workdir has no checkpoint, not the one that is named, or none that is
          readable.
    """
    if what not in ("ema", "student", "critic"):
        raise ValueError(f"what is {what!r}; it has to be 'ema', 'student' or 'critic'")

    def read(step: int) -> tuple[int, Params]:
        stored = nested(_stored(manager, step)[what])
        abstract = laid_out(stored, state_shardings(mesh, stored))
        args = ocp.args.Composite(**{what: _restore_args(abstract)})
        return step, manager.restore(step, args=args)[what]

    found, directory = None, directory_of(workdir)
    if directory.is_dir():
        with _reading(directory) as manager:
            there = manager.all_steps()
            if step is None or not there:
                found, _ = _newest_readable(manager, read, together=mesh.is_multi_process)
            else:
                found = _named(step, there, directory, read)
    if found is None:
        raise UserError(
            f"there is no checkpoint in {directory}; train with this --workdir first, or name "
            "another"
        )
    return found


def _named(step: int, there: Sequence[int], directory: AnyPath, read: Callable[[int], T]) -> T:
    """`read(step)`. Raises UserError, with the steps there are, where it is absent or damaged."""
    others = [str(s) for s in sorted(there, reverse=True) if s != step]
    those = (
        ", ".join(others[:10]) + (f" ... and {len(others) - 10} more" if len(others) > 10 else "")
        or "no other"
    )
    if step not in there:
        raise UserError(f"there is no checkpoint of step {step} in {directory}; there are {those}")
    try:
        refuse_uncommitted(directory / str(step))
        return read(step)
    except Exception as error:
        raise UserError(
            f"checkpoint step {step} in {directory} is damaged ({damage(error)}); put a copy of "
            f"it back, or choose another step ({those})"
        ) from error


def _newest_readable(
    manager: ocp.CheckpointManager, read: Callable[[int], T], together: bool
) -> tuple[T | None, Sequence[int]]:
    """`read(step)` of the newest step that can be read, None where there is no step; and the newer
    ones, which are damaged.

    `together`: all processes read, and a step that one of them cannot read none takes.
    """
    root, damaged = as_path(manager.directory), {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            with hosts.agreed(f"checkpoint step {step}") if together else nullcontext():
                refuse_uncommitted(root / str(step))
                value = read(step)
        except Exception as error:
            damaged[step] = why = damage(error)
            log.warning(
                "checkpoint step %d in %s is damaged (%s): back to the one before", step, root, why
            )
            continue
        return value, [*damaged]
    if damaged:
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise UserError(
            f"no checkpoint in {root} could be read ({reasons}); put back a copy of one, move the "
            "directories of damaged steps away, or pass a new --workdir"
        )
    return None, []


def _stored(manager: ocp.CheckpointManager, step: int) -> dict[str, Params]:
    """What is on disk, as trees of shapes and dtypes. No array is read."""
    metadata, names = manager.item_metadata(step), trees(as_path(manager.directory) / str(step))
    if lost := [name for name in names if metadata[name] is None]:
        raise OSError(f"{lost[0]}/_METADATA is missing")
    return {name: metadata[name].tree for name in names}


def _restore_args(abstract: dict[str, Params]) -> ocp.args.PyTreeRestore:
    """Restore arguments: read these arrays with their shardings, and ignore others on disk: see
    `_refuse_mismatch`.
    """
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)


def _refuse_mismatch(
    manager: ocp.CheckpointManager, step: int, expected: dict[str, Params]
) -> None:
    """A first moment that is not kept (b1 = 0) may be there: earlier versions wrote it, and it is
    not read.
    """
    here, there = (
        {path: f"{x.dtype}{list(x.shape)}" for path, x in by_path(tree).items()}
        for tree in (expected, _stored(manager, step))
    )
    left = {p for p in there if "/mu/" in p and p.replace("/mu/", "/nu/") in here} - set(here)
    for path in [path for path in here | there if path not in left]:
        if here.get(path) != there.get(path):
            raise UserError(
                f"checkpoint step {step} in {manager.directory} was written for another model "
                f"preset or optimizer: {path} is {there.get(path, 'absent')} there and "
                f"{here.get(path, 'absent')} in this config; pass the config that made it, or a "
                "new --workdir"
            )


def _reading(directory: AnyPath) -> ocp.CheckpointManager:
    """For this process, which waits for no other one, whatever these do."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"reader {me}")
    how = ocp.CheckpointManagerOptions(
        create=False, save_root_metadata=False, multiprocessing_options=alone
    )
    return _manager(directory, how)


def _manager(directory: AnyPath, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    # Learners are known by their files alone. Of a step that is being written Orbax goes by what it
    # is given, of one that is there by the names of its items.
    arrays, jsons = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    items = {path.name for path in directory.glob("*/*") if path.is_dir()}
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in (None, *(items - {*JSONS})):
        registry.add(name, ocp.args.PyTreeSave, arrays)
        registry.add(name, ocp.args.PyTreeRestore, arrays)
    for name in JSONS:
        registry.add(name, ocp.args.JsonSave, jsons)
        registry.add(name, ocp.args.JsonRestore, jsons)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)
