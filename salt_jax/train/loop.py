"""A run from its first iteration, or from where it stopped, to its last: the one place where time
passes.

One iteration is one student update followed by the critic's. A batch, and everything random, is a
function of (seed, number of the update), so a run that is killed and started again does what it
would have done.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tensorboardX import SummaryWriter
from tqdm import tqdm

from salt_jax import checkpoint, sharding
from salt_jax.config.migrate import record_changes, refuse_another_run
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.data.pipeline import batches
from salt_jax.errors import UserError
from salt_jax.models.image_condition import condition_latents
from salt_jax.moving_shapes import dataset
from salt_jax.rollout.draws import Choice, Draw, draw_rollout, place_in_sequence
from salt_jax.state import TrainState
from salt_jax.train.preview import make_preview, show
from salt_jax.train.roles import (
    Role,
    going_on,
    read_roles,
    refuse_changed,
    replace_text,
    roles,
    table,
    write_roles,
)
from salt_jax.train.setup import Setup, setup
from salt_jax.train.stages import stage_step
from salt_jax.train.step import compile_step, critic_step, student_step
from salt_jax.train.trajectories import make_trajectories
from salt_jax.types import ImageText, Params

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Everything an iteration needs besides the state."""

    recipe: Recipe
    frozen: dict[str, Params]
    step: Callable[[str, Choice], Callable]  # "student" or "critic" and the choice -> its program
    critic_ratio: int
    key: jax.Array
    feed: Iterator[dict[str, jax.Array]]  # stands at the batch that the state asks for


def train(recipe: Recipe, workdir: str | Path) -> TrainState:
    """Trains until `recipe.iterations`, resuming what the workdir holds.

    The workdir gets roles.json, config.json, TensorBoard events and checkpoints, and changes.jsonl
    if it goes on with other values. What a refused start would spoil, config.json, is written last.

    Raises:
      UserError: weights, data or checkpoints do not fit the recipe, the workdir is not writable, or
        too many updates in a row were not finite (the term is named).
    """
    mesh = sharding.make_mesh(dataclasses.asdict(recipe.mesh))
    refuse_uneven(recipe, mesh.shape["data"] * mesh.shape["fsdp"])
    parts = setup(recipe, mesh)
    where = sharding.state_shardings(mesh, parts.frozen)
    # what is in its place is not copied
    parts = parts._replace(frozen=jax.device_put(parts.frozen, where))
    with tqdm(desc="checksums", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        now = roles(recipe, bar.update)
    with checkpoint.open_checkpoints(workdir, recipe.keep, recipe.keep_every) as manager:
        was = read_roles(workdir)
        fresh = None if manager.all_steps() else parts.fresh
        parts = parts._replace(fresh=None)  # and what it starts from: there is one state at a time
        state = fresh() if fresh else resume(manager, parts.state, recipe, files_may_move=bool(was))
        cast(was, now, recipe, workdir, int(state.step))
        run = make_run(recipe, parts, mesh, int(state.step), workdir, files_may_move=bool(was))
        preview = make_preview(recipe, parts, sharding.replicated(mesh))  # None of kind latents
        keep_config(workdir, recipe, int(state.step))
        sizes = recipe.memory.sizes(recipe.clip_shape[0]) if recipe.causal else ()
        recent: list[dict[str, jax.Array]] = []
        meta = {"config": to_json(recipe), "mesh": dict(mesh.shape)}
        span = range(int(state.step), recipe.iterations)
        bar = tqdm(
            span, initial=span.start, total=recipe.iterations, desc=recipe.stage, mininterval=1
        )
        with SummaryWriter(str(workdir)) as writer:
            for iteration in bar:
                with jax.transfer_guard("disallow"):
                    state, metrics = iterate(state, run, iteration)
                recent.append(metrics)
                done = iteration + 1
                if done % recipe.log_every == 0 or done == recipe.iterations:
                    values, recent = summarize(jax.device_get(recent)), []
                    report(values, done, writer, bar)
                    stop_if_stuck(values, recipe.max_skipped, done)
                kept = recipe.keep_every and done % recipe.keep_every == 0
                if kept or done % recipe.save_every == 0 or done == recipe.iterations:
                    checkpoint.save(manager, state, meta)
                    if preview:
                        show(writer, preview(state.ema), sizes, done)
    return state


def cast(was: list[Role], now: list[Role], recipe: Recipe, workdir: str | Path, step: int) -> None:
    """Tells who is who, and keeps it for the next start; one that goes on must have the parts it
    began with.

    Raises:
      UserError: a file that a run began with has changed.
    """
    begun = step or any((Path(workdir) / "trajectories").glob("*.safetensors"))
    if begun:
        refuse_changed(was, now)
    if jax.process_index() == 0:
        print(table(going_on(now, recipe, workdir, step) if step else now), flush=True)
        if not (begun and was):
            write_roles(workdir, now)


def keep_config(workdir: str | Path, recipe: Recipe, step: int) -> None:
    """Writes config.json; of a run that goes on what has changed is printed and added to
    changes.jsonl.
    """
    path = Path(workdir) / "config.json"
    if jax.process_index() == 0:
        before = path.read_text(errors="replace") if step and path.is_file() else ""
        record_changes(workdir, before, recipe, step)
        replace_text(path, to_json(recipe))


def resume(
    manager: Any, state: TrainState, recipe: Recipe, files_may_move: bool = False
) -> TrainState:
    """The newest checkpoint, laid out as `state`, which is its form, says.

    Raises:
      UserError: there is none that can be read, or it is of a run with another config.
    """
    restored = checkpoint.restore(manager, state)
    assert restored is not None, "there is no checkpoint to go on from"
    refuse_another_run(restored[1]["config"], recipe, files_may_move)
    return restored[0]


def make_run(
    recipe: Recipe,
    parts: Setup,
    mesh: Mesh,
    start: int,
    workdir: str | Path,
    files_may_move: bool = False,
) -> Run:
    """Readies the steps, and opens the data where iteration `start` needs it.

    Raises:
      UserError: the data set cannot be made or read.
    """
    states, frozen = (
        jax.tree.map(lambda x: x.sharding, tree) for tree in (parts.state, parts.frozen)
    )
    everywhere, over_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    @functools.cache
    def step(who: str, choice: Choice) -> Callable:
        steps = {"student": student_step, "critic": critic_step}
        which, static = (
            (steps[who], {"choice": choice}) if recipe.stage == "distil" else (stage_step, {})
        )
        return compile_step(
            which, parts.networks, recipe, (states, frozen, over_batch, everywhere), **static
        )

    critic_ratio = recipe.critic_ratio if recipe.stage == "distil" else 0
    d, source = recipe.data, parts.records
    if source is None:
        source, _ = dataset.build(d.dir, recipe.world, d.num_train, d.num_test, d.seed)
    if recipe.stage == "ode_regression":
        teacher, null = parts.frozen["teacher"], parts.frozen["null_text"]
        directory = Path(workdir) / "trajectories"
        network = parts.networks.student
        args = (network, teacher, null, parts.encode_caption, source, files_may_move)
        source = make_trajectories(directory, recipe, *args)
    stream = batches(
        source,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        start=start * (1 + critic_ratio),
        encode_caption=parts.encode_caption,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    place = functools.partial(jax.make_array_from_process_local_data, over_batch)
    return Run(
        recipe,
        parts.frozen,
        step,
        critic_ratio,
        jax.device_put(jax.random.key(recipe.seed + 1), everywhere),
        (jax.tree.map(place, as_told(batch)) for batch in stream),
    )


def as_told(batch: dict[str, Any]) -> dict[str, Any]:
    """What the steps read of a batch: where it has pictures they belong to what the networks are
    told.
    """
    told = {name: batch[name] for name in batch if name not in ("scene", "image", "condition")}
    if "image" in batch:
        told["text"] = ImageText(
            batch["text"], batch["image"], condition_latents(batch["condition"])
        )
    return told


def iterate(state: TrainState, run: Run, iteration: int) -> tuple[TrainState, dict[str, jax.Array]]:
    """One student update, then the critic's; each update has its own batch, its own key and its own
    draw.
    """
    metrics: dict[str, jax.Array] = {}
    for i in range(1 + run.critic_ratio):
        call = iteration * (1 + run.critic_ratio) + i
        choice, draw = decide(run.recipe, iteration, call)
        if i:
            # the critic has one term, whatever the student has
            choice = Choice(sequence=choice.sequence)
        step = run.step("critic" if i else "student", choice)
        put = functools.partial(jax.device_put, device=run.key.sharding)
        state, more = step(
            state, run.frozen, next(run.feed), run.key, put(np.int32(call)), jax.tree.map(put, draw)
        )
        metrics |= {"critic_fresh": more["critic"]} if i == 1 else {}
        metrics |= more
    return state, metrics


def decide(recipe: Recipe, iteration: int, call: int) -> tuple[Choice, Draw | None]:
    """What optimizer call number `call` does: which program, and what is drawn for it.

    Pure, on the host.
    """
    on = recipe.loss.self_consistency > 0
    if recipe.stage != "distil" or recipe.video != "rollout":
        return Choice(self_consistency=on), None
    r, s, align, stream = recipe.rollout, recipe.schedule, recipe.align, recipe.stream
    choice, draw = draw_rollout(
        recipe.seed,
        call,
        r.num_steps,
        r.probabilities,
        r.first_steps,
        s.anchor_levels,
        recipe.levels,
        on,
        align.probability if align.weight and iteration >= align.start else 0.0,
    )
    if stream.max_frames:
        frames, more = recipe.clip_shape[0], recipe.clip_shape[0] - stream.overlap
        place = place_in_sequence(recipe.seed, call, frames, more, stream.max_frames, stream.switch)
        choice = choice._replace(sequence="new" if place == "new" else "on")
        draw = draw._replace(switch=np.bool_(place == "switch"))
    return choice, draw


def summarize(recent: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each term over the updates that had it; of counters the last value."""
    names = {name for metrics in recent for name in metrics}
    series = {name: [float(m[name]) for m in recent if name in m] for name in sorted(names)}
    last = lambda name: name.endswith(("skipped", "in_a_row"))
    return {
        name: values[-1] if last(name) else float(np.mean(values))
        for name, values in series.items()
    }


def report(values: dict[str, float], step: int, writer: SummaryWriter, bar: tqdm) -> None:
    """Scalars to TensorBoard, the losses to the bar."""
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()
    bar.set_postfix(
        {k: f"{v:.4g}" for k, v in values.items() if not k.endswith(("skipped", "row", "norm"))}
    )


def stop_if_stuck(values: dict[str, float], limit: int, step: int) -> None:
    """Raises UserError, naming the terms that are not finite, once `limit` updates in a row were
    skipped.
    """
    for who in ("student", "critic"):
        skipped, in_a_row = (
            values.get(f"{who}_skipped", 0),
            values.get(f"{who}_skipped_in_a_row", 0),
        )
        if in_a_row >= limit:
            bad = [k for k, v in values.items() if not np.isfinite(v)] or ["the gradient"]
            raise UserError(
                f"{in_a_row:.0f} {who} updates in a row were not finite at update {step} "
                f"({', '.join(bad)}); "
                "lower the learning rate, or restart from an earlier checkpoint"
            )
        if skipped:
            log.warning("%d %s updates skipped so far: not finite", skipped, who)
