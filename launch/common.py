"""What the programs that compute share: a trained workdir, opened for reading, and the devices."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from launch.parsing import read_workdir
from salt_jax.checkpoint import checkpoint_digest, restore_step
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.models.denoiser import Network
from salt_jax.models.lora import merge
from salt_jax.sharding import make_mesh
from salt_jax.train.roles import read_roles, refuse_another_base
from salt_jax.train.setup import embed, make_network
from salt_jax.train.start import initial_weights, student_start
from salt_jax.types import Params

ITEMS = {"ema": "ema", "none": "student"}  # --average -> what a checkpoint calls it


class Trained(NamedTuple):
    """A workdir, opened for reading."""

    recipe: Recipe
    checkpoint: dict[str, Any]  # which one: step, average, and sha256 of what was read
    network: Network
    params: Params  # of the student, averaged or not, or teacher-to-be
    weights: Params  # {"wan", "text_encoder"} of the teacher that belongs to it; {} of kind latents
    embed: Callable[[Sequence[str]], np.ndarray]  # captions -> float32 [N, T, D]


def open_workdir(workdir: str, step: int | None = None, average: str = "ema") -> Trained:
    """Reads config.json and a checkpoint: the newest that can be read, or the one of `step`;
    averaged, or not ("none").

    Raises:
      UserError: there is nothing to read, or it does not fit.
    """
    recipe, mesh = read_workdir(Path(workdir), step), all_devices()
    step, params = restore_step(workdir, ITEMS[average], mesh, step)
    told = {
        "step": step,
        "average": average,
        "sha256": checkpoint_digest(workdir, step, ITEMS[average]),
    }
    if (
        recipe.lora.rank
    ):  # what it adapts, as it was when the run began: a base that has changed is refused below
        told["bases"] = {r.name: r.digest for r in read_roles(workdir) if "base" in r.name}
    if recipe.stage == "denoising":
        weights, params = params, params["wan"]
    else:
        latents = recipe.data.kind == "latents"
        weights = {} if latents and not recipe.lora.rank else initial_weights(recipe, mesh)
    if recipe.lora.rank:
        refuse_another_base(workdir, recipe)
        params = merge(student_start(recipe, weights["wan"], mesh), params, recipe.lora)
    return Trained(
        recipe,
        told,
        make_network(recipe, None),
        params,
        weights,
        lambda captions: embed(recipe, weights["text_encoder"], captions),
    )


def record(run: Trained) -> dict[str, str]:
    """What a file of this network says of it: `salt_jax` is carried on when other programs' layouts
    come and go.
    """
    config = to_json(run.recipe)
    return {
        "config": config,
        "salt_jax": json.dumps({"config": json.loads(config), **run.checkpoint}),
    }


def all_devices() -> Mesh:
    """For work without a batch to cut: parameters are spread over all devices."""
    return make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
