"""What the programs share: a trained workdir, prompts, and one clear line for an error that is the user's to mend."""

import dataclasses
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from salt_jax.data import shapes
from salt_jax.errors import UserError
from salt_jax.models.denoiser import Network
from salt_jax.models.kv_cache import CachePolicy, Positions
from salt_jax.models.lora import merge
from salt_jax.models.vae import SPACE, TIME
from salt_jax.train.checkpoint import restore_params
from salt_jax.train.recipe import Recipe, from_json
from salt_jax.train.setup import embed, initial_weights, make_network, student_start
from salt_jax.train.sharding import make_mesh
from salt_jax.types import Params

FPS = 16  # of all Wan 2.1 videos


class Trained(NamedTuple):
    """A workdir, opened for reading."""

    recipe: Recipe
    network: Network
    params: Params  # of the averaged student, or teacher-to-be
    weights: Params  # {"wan", "text_encoder"} of the teacher that belongs to it; {} of kind latents
    embed: Callable[[Sequence[str]], np.ndarray]  # captions -> float32 [N, T, D]


def read_config(flag: flags.FlagHolder) -> Any:
    """The ConfigDict of a flag that ml_collections defined. Raises UserError if there is no such file."""
    try:
        config = flag.value
        config.keys()
    except OSError as error:
        name = config_flags.get_config_filename(flags.FLAGS[flag.name])
        raise UserError(f"cannot load the config file {name}; check --{flag.name}") from error
    return config


def open_workdir(workdir: str) -> Trained:
    """Reads config.json and the newest checkpoint's EMA.

    Raises:
      UserError: there is nothing to read, or it does not fit.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; train with --workdir={workdir} first, or name another workdir"
        )
    recipe = from_json(path.read_text())
    mesh, latents = all_devices(), recipe.data.kind == "latents"
    params = restore_params(workdir, "ema", mesh)
    if recipe.stage == "denoising":
        weights, params = params, params["wan"]
    else:
        weights = {} if latents and not recipe.lora.rank else initial_weights(recipe, mesh)
    if recipe.lora.rank:
        params = merge(student_start(recipe, weights["wan"], mesh), params, recipe.lora)
    return Trained(
        recipe,
        make_network(recipe, None),
        params,
        weights,
        lambda captions: embed(recipe, weights["text_encoder"], captions),
    )


def all_devices() -> Mesh:
    """For work without a batch to cut: parameters are spread over all devices."""
    return make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})


def read_memory(told: str, policy: CachePolicy) -> CachePolicy:
    """ "WINDOW:SINK:POSITIONS" -> `policy` with another memory.

    Raises:
      UserError: it is not of that form, or the numbers do not fit the chunks.
    """
    try:
        window, sink, positions = told.split(":")
        if positions not in get_args(Positions):
            raise ValueError(f"positions is {positions!r}, not one of {', '.join(get_args(Positions))}")
        return dataclasses.replace(policy, window=int(window), sink=int(sink), positions=positions)
    except ValueError as error:
        raise UserError(
            f"--memory {told}: {error}; write WINDOW:SINK:POSITIONS, such as 6:1:relative"
        ) from error


def read_prompts(prompt: str | None, file: str | None, recipe: Recipe | None, count: int) -> tuple[str, ...]:
    """Captions from a flag, from a text file with one a line, or `count` of the recipe's world, evenly spread.

    Raises:
      UserError: the file is unreadable, not UTF-8, or has no prompt.
    """
    if prompt and file:
        raise UserError("--prompt and --prompts_file exclude each other; give one of them")
    if prompt:
        return (prompt,) * count
    if not file:
        assert recipe, "the caller has asked for a prompt"
        scenes = shapes.scenes(recipe.world)
        return tuple(shapes.caption(scenes[i]) for i in shapes.spread(recipe.world, count))
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the prompt file {file} ({error.strerror}); check --prompts_file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt file {file} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"the prompt file {file} has no prompt; write one per line")
    return prompts


def read_size(told: str, frames: int) -> tuple[int, int]:
    """Width and height of "WIDTHxHEIGHT", in pixels of Wan 2.1.

    Raises:
      UserError: they, or the number of frames, have no latent.
    """
    width, _, height = told.partition("x")
    step = SPACE * 2  # a token is 2 x 2 positions of the latent
    if not (width.isdigit() and height.isdigit()) or int(width) % step or int(height) % step:
        raise UserError(f"--size={told} is not WIDTHxHEIGHT, both multiples of {step}, such as 832x480")
    if frames % TIME != 1:
        raise UserError(f"--frames={frames} must be {TIME}k + 1, such as 81")
    return int(width), int(height)


def run_main(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with every error that is the user's to mend printed as one line and exit code 2."""

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:  # from ml_collections, which names the key alone
            key, hint = re.search(r"\w+", str(error)), re.search(r"Did you mean.*\?", str(error))
            told = hint[0] if hint else "configs/base.py lists every key."
            fail(f"unknown config key {key and key[0]!r} in {' '.join(argv[1:])}. {told}")
        except (flags.Error, TypeError, ValueError) as error:
            fail(f"{error}; see --help and configs/base.py")
        if len(rest) > 1:
            fail(f"unknown argument {rest[1]!r}; options start with --")
        return rest

    def guarded(argv):
        # Programs that were compiled once are kept, so the next start and the next run of the same shape are quick.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "salt_jax" / "jax"))
        # TFDS talks through absl; our own warnings go through the standard logger of their module.
        logging.set_verbosity(logging.ERROR)
        std_logging.getLogger("salt_jax").setLevel(std_logging.WARNING)
        try:
            main(argv)
        except UserError as error:
            fail(str(error))

    app.run(guarded, flags_parser=parse)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
