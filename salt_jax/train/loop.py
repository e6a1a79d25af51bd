"""A run from its first iteration, or from its last checkpoint, to its end.

One iteration is one student update followed by the critic's. A batch, and everything random, is a
function of (seed, number of the update), so a run that is killed and started again does what it
would have done.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from salt_jax import checkpoint, hosts, sharding
from salt_jax.checkpoint_files import make_writable, refuse_unwritable
from salt_jax.config.migrate import refuse_another_run
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.data.pipeline import batches
from salt_jax.errors import Stopped
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.lock import Lock, locked
from salt_jax.keys import Json
from salt_jax.moving_shapes import dataset
from salt_jax.stages import make_stage
from salt_jax.stages.roles import Role, read_roles, roles
from salt_jax.stages.stage import Batch, Frozen, Metrics, RecordSource, Stage, Update
from salt_jax.stages.texts import to_batch
from salt_jax.state import TrainState
from salt_jax.train.logs import EventLog, report, stop_if_stuck, summarize
from salt_jax.train.preview import make_preview, show
from salt_jax.train.provenance import keep_config, keep_roles
from salt_jax.train.setup import Setup, setup
from salt_jax.train.step import Call, compile_step
from salt_jax.train.stop import Stop
from salt_jax.types import Params


class Run(NamedTuple):
    """Everything an iteration needs besides the state."""

    stage: Stage
    frozen: Frozen
    program: Callable[[Update], jax.stages.Wrapped]
    key: jax.Array
    feed: Iterator[Batch]  # positioned at the batch of the next call
    preview: Callable[[Params], np.ndarray] | None = None  # of the average; None of kind latents


class Places(NamedTuple):
    """Where a run writes to."""

    workdir: AnyPath
    manager: CheckpointManager
    lock: Lock | None  # of the first process, which holds it for all


def train(
    recipe: Recipe, workdir: str | AnyPath, made_by: Json | None = None, stop: Stop | None = None
) -> TrainState:
    """Trains until `recipe.iterations`, resuming what the workdir holds.

    The workdir gets roles.json, config.json, TensorBoard events and checkpoints, and changes.jsonl
    if it resumes with other values. config.json is written last, so that a refused start keeps it.
    Of several processes the first one writes all but checkpoints.

    Args:
      made_by: what config.json says of itself: config file, commit, versions.
      stop: asked between iterations, see `stop.stoppable`.

    Raises:
      UserError: weights, data or checkpoints do not fit the recipe, the workdir is not writable,
        full, or another run's, or too many updates in a row were not finite (the term is named).
      Stopped: `stop` was asked for; what was trained is saved.
    """
    stop = stop or Stop()
    mesh = sharding.make_mesh(dataclasses.asdict(recipe.mesh))
    refuse_uneven(recipe, mesh.shape["data"] * mesh.shape["fsdp"])
    with hosts.agreed(f"the workdir {workdir}"):
        refuse_unwritable(workdir)
    stage = make_stage(recipe, mesh)
    parts = setup(stage)
    where = sharding.state_shardings(mesh, parts.frozen)
    # what is in its place is not copied
    only = [parts._replace(frozen=sharding.put(parts.frozen, where))]
    del parts  # what a state is made of is given up once there is one
    now: list[Role] = []
    hosts.only_first(lambda: now.extend(read_files(stage)), "checksums of the weights")
    make_writable(workdir)
    with (
        owned(workdir, stop) as lock,
        checkpoint.writing(workdir, recipe.keep, recipe.keep_every) as manager,
    ):
        places = Places(as_path(workdir), manager, lock)
        state, run = begin(only, places, now, made_by)
        return go_on(state, run, places, stop)


@contextmanager
def owned(workdir: str | AnyPath, stop: Stop) -> Iterator[Lock | None]:
    """The lock of a workdir, which the first process takes for all.

    Raises:
      UserError: another run has it.
    """
    with ExitStack() as stack:
        held: list[Lock] = []
        take = lambda: held.append(stack.enter_context(locked(workdir)))
        hosts.only_first(take, f"the lock of {workdir}")
        lock = held[0] if held else None
        stop.at_exit = lock.release if lock else stop.at_exit
        yield lock


def read_files(stage: Stage) -> list[Role]:
    """The parts of a run as it begins, with the checksums of their files."""
    with tqdm(desc="checksums", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        return roles(stage, bar.update)


def begin(
    only: list[Setup], places: Places, now: list[Role], made_by: Json | None
) -> tuple[TrainState, Run]:
    """The first state or that of the newest checkpoint, and all that iterations need; says in the
    workdir what the run is.

    Raises:
      UserError: as `train`.
    """
    parts = only.pop()
    recipe, workdir = parts.stage.recipe, places.workdir
    was: list[Role] = []

    def is_known() -> bool:
        was.extend(read_roles(workdir))
        return bool(was)

    known = hosts.only_first(is_known, "roles.json")
    fresh = None if places.manager.all_steps() else parts.fresh
    parts = parts._replace(fresh=None)  # and what it starts from: there is one state at a time
    state = fresh() if fresh else resume(places.manager, parts.state, recipe, known)
    begun = int(state.iteration)
    hosts.only_first(lambda: keep_roles(was, now, recipe, workdir, begun), "roles.json")
    run = make_run(parts, begun, workdir, known)
    hosts.only_first(lambda: keep_config(workdir, recipe, begun, made_by), "config.json")
    return state, run


def go_on(state: TrainState, run: Run, places: Places, stop: Stop) -> TrainState:
    """The iterations that are left, with logs, previews and checkpoints. Raises as `train`."""
    recipe, manager, mesh = run.stage.recipe, places.manager, run.stage.mesh
    assert mesh is not None
    sizes = recipe.memory.sizes(recipe.clip_shape[0]) if recipe.causal else ()
    recent: list[Metrics] = []
    meta = {"config": to_json(recipe), "mesh": dict(mesh.shape)}
    begun, last, mine = int(state.iteration), recipe.iterations, hosts.is_first()
    votes, saved = hosts.Votes(mesh), time.monotonic()
    bar = tqdm(
        range(begun, last), recipe.stage, last, initial=begun, mininterval=1, disable=not mine
    )
    with EventLog(places.workdir, mine) as events:
        for iteration in bar:
            with jax.transfer_guard("disallow"):
                state, metrics = iterate(state, run, iteration)
            recent.append(metrics)
            stop.unsaved, done = True, iteration + 1
            late = mine and 0 < 60 * recipe.save_every_minutes <= time.monotonic() - saved
            stopping, late = votes(stop.asked, late)
            if done % recipe.log_every == 0 or done == last:
                values, recent = summarize(jax.device_get(recent)), []
                report(values, done, events, bar)
                stop_if_stuck(values, recipe.max_skipped, done)
            if places.lock:
                places.lock.refuse_lost()
            kept = recipe.keep_every and done % recipe.keep_every == 0
            planned = kept or done % recipe.save_every == 0 or done == last
            if planned or late or stopping:
                checkpoint.save(manager, state, meta)
                events.flush(anyway=True)
                saved = time.monotonic()
            if planned and run.preview:
                show(events, run.preview(state.ema), sizes, done)
            if stopping and done < last:
                break
    checkpoint.finish(manager)
    if int(state.iteration) < last:
        raise Stopped(f"stopped at iteration {int(state.iteration)} of {last}, which is saved")
    return state


def resume(
    manager: CheckpointManager, state: TrainState, recipe: Recipe, files_may_move: bool = False
) -> TrainState:
    """The newest checkpoint, laid out as `state`, which is its form, says.

    Raises:
      UserError: there is none that can be read, or it is of a run with another config.
    """
    restored = checkpoint.restore(manager, state)
    assert restored is not None, "there is no checkpoint to resume from"
    refuse_another_run(restored[1]["config"], recipe, files_may_move)
    return restored[0]


def make_run(parts: Setup, start: int, workdir: str | AnyPath, files_may_move: bool = False) -> Run:
    """Readies the programs, and opens the data where iteration `start` needs it.

    Raises:
      UserError: the data set cannot be made or read.
    """
    stage, recipe = parts.stage, parts.stage.recipe
    assert stage.mesh is not None
    states, frozen = (
        jax.tree.map(lambda x: x.sharding, tree) for tree in (parts.state, parts.frozen)
    )
    mesh = stage.mesh
    everywhere, over_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shardings = states, frozen, over_batch, everywhere
    program = functools.cache(functools.partial(compile_step, stage, shardings=shardings))
    d, source = recipe.data, parts.records
    if source is None:
        build = functools.partial(dataset.build, d.dir, recipe.world, d.num_train, d.num_test)
        source, _ = hosts.first_then_others(lambda: build(d.seed), f"the data set in {d.dir}")
    records = stage.records(
        RecordSource(source, as_path(workdir), parts.frozen, parts.encode_caption, files_may_move)
    )
    count = recipe.batch_size
    rows = sharding.local_rows(over_batch, count)
    stream = batches(
        records,
        batch_size=count,
        seed=recipe.seed,
        start=start * len(stage.updates(0)),
        encode_caption=parts.encode_caption,
        rows=rows,
        world=recipe.world,
    )
    place = lambda x: sharding.put_rows(x, rows, count, over_batch)
    feed = (jax.tree.map(place, to_batch(stage, arrays)) for arrays in stream)
    key = jax.jit(jax.random.key, out_shardings=everywhere)(recipe.seed + 1)
    return Run(stage, parts.frozen, program, key, feed, make_preview(parts))


def iterate(state: TrainState, run: Run, iteration: int) -> tuple[TrainState, Metrics]:
    """The optimizer calls of an iteration; each has its own batch, its own key and its own draw."""
    metrics: Metrics = {}
    put = lambda x: sharding.put(x, run.key.sharding)
    updates = run.stage.updates(iteration)
    for i, (update, draw) in enumerate(updates):
        index = put(np.int32(iteration * len(updates) + i))
        call = Call(run.key, index, jax.tree.map(put, draw))
        state, more = run.program(update)(state, run.frozen, next(run.feed), call)
        # of a learner that moves several times also what its first call saw
        metrics |= {"critic_fresh": more["critic"]} if update.moves == "critic" and i == 1 else {}
        metrics |= more
    return state, metrics
