"""A trained workdir, or a file that was exported from one, opened for reading."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from salt_jax.checkpoint_files import checkpoint_digest
from salt_jax.config.reading import from_json, read_workdir, to_json
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.header import read_metadata
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import digest, save_weights
from salt_jax.keys import Json
from salt_jax.models.lora import merge
from salt_jax.sharding import own_devices
from salt_jax.stages import make_stage
from salt_jax.stages.roles import read_roles, refuse_another_base
from salt_jax.stages.stage import Stage
from salt_jax.stages.texts import embed
from salt_jax.stages.weights import initial_weights, student_start
from salt_jax.types import Params

ITEMS = {"ema": "ema", "none": "student"}  # whether averaged -> what a checkpoint calls it


class Trained(NamedTuple):
    """A network and the run that made it."""

    stage: Stage
    made_with: Json  # which one: step, average, and sha256 of what was read
    params: Params  # of the student, averaged or not, or teacher-to-be
    weights: Params  # {"wan", "text_encoder"} of the teacher that belongs to it; {} of kind latents
    text_file: str  # where the text encoder is from; "": trained or fresh

    @property
    def recipe(self) -> Recipe:
        return self.stage.recipe

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Captions -> float32 [N, T, D]."""
        return embed(self.recipe, self.weights["text_encoder"], captions)


def open_workdir(workdir: str | AnyPath, step: int | None = None, average: str = "ema") -> Trained:
    """Reads config.json and a checkpoint: the newest that can be read, or the one of `step`;
    averaged ("ema"), or not ("none").

    Raises:
      UserError: there is nothing to read, or it does not fit.
    """
    from salt_jax.checkpoint import restore_step  # here, because files are read without Orbax

    stage, mesh = make_stage(read_workdir(workdir)), own_devices()
    recipe = stage.recipe
    step, params = restore_step(workdir, ITEMS[average], mesh, step)
    sha256 = checkpoint_digest(workdir, step, ITEMS[average])
    made_with = {"step": step, "average": average, "sha256": sha256}
    if recipe.lora.rank:
        # what it adapts, as it was when the run began: a base that has changed is refused below
        made_with["bases"] = {r.name: r.digest for r in read_roles(workdir) if "base" in r.name}
    if "tokens" in stage.needs:
        return Trained(stage, made_with, params["wan"], params, recipe.weights)
    latents = recipe.data.kind == "latents"
    weights = {} if latents and not recipe.lora.rank else initial_weights(recipe, mesh)
    if recipe.lora.rank:
        refuse_another_base(workdir, recipe)
        params = merge(student_start(recipe, weights["wan"], mesh), params, recipe.lora)
    return Trained(stage, made_with, params, weights, recipe.weights)


def open_networks(workdir: str | AnyPath, step: int | None = None) -> Iterator[tuple[str, Params]]:
    """What a checkpoint has under the names of the Self Forcing family, one after the other:
    generator, generator_ema, and critic where the run trains one; LoRAs are merged.

    Raises:
      UserError: as `open_workdir`.
    """
    run = open_workdir(workdir, step, "none")
    yield "generator", run.params
    run = open_workdir(workdir, run.made_with["step"], "ema")
    yield "generator_ema", run.params
    if "critic" in run.stage.learners:
        from salt_jax.checkpoint import restore_step

        critic = restore_step(workdir, "critic", own_devices(), run.made_with["step"])[1]
        yield "critic", merge(run.weights.get("wan"), critic, run.recipe.lora)


def open_exported(file: str | AnyPath) -> Trained:
    """A file of `export`, or a shipped asset by name.

    Raises:
      UserError: it has no config in it, or it does not fit.
    """
    path = located(file)
    config = read_metadata(path).get("config")
    if not config:
        raise UserError(f"{file} has no config in it; name a workdir, or a file of launch.export")
    stage = make_stage(from_json(config, path))
    tree = initial_weights(replace(stage.recipe, weights=str(path)), own_devices())
    return Trained(stage, {"sha256": digest(path)}, tree["wan"], tree, str(path))


def export(run: Trained, file: str | AnyPath) -> None:
    """Writes the network of a run, with its text encoder, as one file of float16: half the size,
    and the rounding is far below the network's own error.
    """
    tree = {"wan": run.params, "text_encoder": run.weights["text_encoder"]}
    where = as_path(file)
    where.parent.mkdir(parents=True, exist_ok=True)
    save_weights(where, tree, "float16", record(run))


def record(run: Trained) -> dict[str, str]:
    """What a file of this network says of it: `salt_jax` is carried on when other programs' layouts
    come and go.
    """
    config = to_json(run.recipe)
    origin = {"config": json.loads(config), **run.made_with}
    return {"config": config, "salt_jax": json.dumps(origin)}
