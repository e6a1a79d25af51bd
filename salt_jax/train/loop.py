"""A run from its first iteration, or from its last checkpoint, to its end.

One iteration is one student update followed by the critic's. A batch, and everything random, is a
function of (seed, number of the update), so a run that is killed and started again does what it
would have done.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager
from tensorboardX import SummaryWriter
from tqdm import tqdm

from salt_jax import checkpoint, sharding
from salt_jax.config.migrate import refuse_another_run
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.data.pipeline import batches
from salt_jax.keys import Json
from salt_jax.moving_shapes import dataset
from salt_jax.stages import make_stage
from salt_jax.stages.roles import read_roles, roles
from salt_jax.stages.stage import Batch, Frozen, Metrics, RecordSource, Stage, Update
from salt_jax.stages.texts import to_batch
from salt_jax.state import TrainState
from salt_jax.train.logs import report, stop_if_stuck, summarize
from salt_jax.train.preview import make_preview, show
from salt_jax.train.provenance import keep_config, keep_roles
from salt_jax.train.setup import Setup, setup
from salt_jax.train.step import Call, compile_step


class Run(NamedTuple):
    """Everything an iteration needs besides the state."""

    stage: Stage
    frozen: Frozen
    program: Callable[[Update], jax.stages.Wrapped]
    key: jax.Array
    feed: Iterator[Batch]  # positioned at the batch of the next call


def train(recipe: Recipe, workdir: str | Path, made_by: Json | None = None) -> TrainState:
    """Trains until `recipe.iterations`, resuming what the workdir holds.

    The workdir gets roles.json, config.json, TensorBoard events and checkpoints, and changes.jsonl
    if it resumes with other values. config.json is written last, so that a refused start keeps it.

    Args:
      made_by: what config.json says of itself: config file, commit, versions.

    Raises:
      UserError: weights, data or checkpoints do not fit the recipe, the workdir is not writable, or
        too many updates in a row were not finite (the term is named).
    """
    mesh = sharding.make_mesh(dataclasses.asdict(recipe.mesh))
    refuse_uneven(recipe, mesh.shape["data"] * mesh.shape["fsdp"])
    stage = make_stage(recipe, mesh)
    parts = setup(stage)
    where = sharding.state_shardings(mesh, parts.frozen)
    # what is in its place is not copied
    parts = parts._replace(frozen=jax.device_put(parts.frozen, where))
    with tqdm(desc="checksums", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        now = roles(stage, bar.update)
    with checkpoint.open_checkpoints(workdir, recipe.keep, recipe.keep_every) as manager:
        was = read_roles(workdir)
        fresh = None if manager.all_steps() else parts.fresh
        parts = parts._replace(fresh=None)  # and what it starts from: there is one state at a time
        state = fresh() if fresh else resume(manager, parts.state, recipe, files_may_move=bool(was))
        begun = int(state.iteration)
        keep_roles(was, now, recipe, workdir, begun)
        run = make_run(parts, begun, workdir, files_may_move=bool(was))
        preview = make_preview(parts)  # None of kind latents
        keep_config(workdir, recipe, begun, made_by)
        sizes = recipe.memory.sizes(recipe.clip_shape[0]) if recipe.causal else ()
        recent: list[Metrics] = []
        meta = {"config": to_json(recipe), "mesh": dict(mesh.shape)}
        last = recipe.iterations
        bar = tqdm(range(begun, last), initial=begun, total=last, desc=recipe.stage, mininterval=1)
        with SummaryWriter(str(workdir)) as writer:
            for iteration in bar:
                with jax.transfer_guard("disallow"):
                    state, metrics = iterate(state, run, iteration)
                recent.append(metrics)
                done = iteration + 1
                if done % recipe.log_every == 0 or done == last:
                    values, recent = summarize(jax.device_get(recent)), []
                    report(values, done, writer, bar)
                    stop_if_stuck(values, recipe.max_skipped, done)
                kept = recipe.keep_every and done % recipe.keep_every == 0
                if kept or done % recipe.save_every == 0 or done == last:
                    checkpoint.save(manager, state, meta)
                    if preview:
                        show(writer, preview(state.ema), sizes, done)
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


def make_run(parts: Setup, start: int, workdir: str | Path, files_may_move: bool = False) -> Run:
    """Readies the programs, and opens the data where iteration `start` needs it.

    Raises:
      UserError: the data set cannot be made or read.
    """
    stage, recipe = parts.stage, parts.stage.recipe
    assert stage.mesh is not None
    states, frozen = (
        jax.tree.map(lambda x: x.sharding, tree) for tree in (parts.state, parts.frozen)
    )
    everywhere, over_batch = sharding.replicated(stage.mesh), sharding.batch_sharding(stage.mesh)
    shardings = states, frozen, over_batch, everywhere
    program = functools.cache(functools.partial(compile_step, stage, shardings=shardings))
    d, source = recipe.data, parts.records
    if source is None:
        source, _ = dataset.build(d.dir, recipe.world, d.num_train, d.num_test, d.seed)
    records = stage.records(
        RecordSource(source, Path(workdir), parts.frozen, parts.encode_caption, files_may_move)
    )
    stream = batches(
        records,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        start=start * len(stage.updates(0)),
        encode_caption=parts.encode_caption,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    place = functools.partial(jax.make_array_from_process_local_data, over_batch)
    feed = (jax.tree.map(place, to_batch(stage, arrays)) for arrays in stream)
    key = jax.device_put(jax.random.key(recipe.seed + 1), everywhere)
    return Run(stage, parts.frozen, program, key, feed)


def iterate(state: TrainState, run: Run, iteration: int) -> tuple[TrainState, Metrics]:
    """The optimizer calls of an iteration; each has its own batch, its own key and its own draw."""
    metrics: Metrics = {}
    put = functools.partial(jax.device_put, device=run.key.sharding)
    updates = run.stage.updates(iteration)
    for i, (update, draw) in enumerate(updates):
        index = put(np.int32(iteration * len(updates) + i))
        call = Call(run.key, index, jax.tree.map(put, draw))
        state, more = run.program(update)(state, run.frozen, next(run.feed), call)
        # of a learner that moves several times also what its first call saw
        metrics |= {"critic_fresh": more["critic"]} if update.moves == "critic" and i == 1 else {}
        metrics |= more
    return state, metrics
