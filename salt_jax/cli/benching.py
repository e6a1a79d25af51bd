"""python -m launch.bench [--config=configs/X.py]
                       [--preset=wan2.1-t2v-1.3b --frames=21 --height=60 --width=104]

Times the parts of training and of generating with random weights: one table, and the same numbers
with --json=FILE. Student, critic and teacher are the config's, or all of --preset. On a CPU in a
minute:

    python -m launch.bench --preset=wan2.1-t2v-tiny --frames=6 --height=4 --width=4 --vae=tiny \\
        --runs=2
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from salt_jax.cli.app import find_config, made_with, read_config, run_main
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.models.presets import PRESETS
from salt_jax.models.text_encoder import PRESETS as TEXT_PRESETS
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.planning import bench
from salt_jax.sharding import all_devices
from salt_jax.stages import make_stage

PARTS = ("teacher_forward", "student_step", "critic_step", "streaming", "vae")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    find_config("--config=configs/self_forcing.py:wan").partition("=")[2],
    "the run whose parts are timed; see configs/",
    lock_config=True,
)
PRESET = flags.DEFINE_enum(
    "preset", None, list(PRESETS), "preset of all networks, in place of the config's"
)
FRAMES = flags.DEFINE_integer("frames", None, "latent frames of a clip", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", None, "latent rows", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", None, "latent columns", lower_bound=1)
CLIPS = flags.DEFINE_integer(
    "clips", None, "clips of an update; default one for each device", lower_bound=1
)
VAE = flags.DEFINE_enum("vae", "wan2.1", list(VAE_PRESETS), "sizes of the VAE")
NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 4, "network evaluations of a chunk in streaming", lower_bound=1
)
WEIGHTS_DTYPE = flags.DEFINE_enum(
    "weights_dtype",
    "bfloat16",
    ("float32", "bfloat16"),
    "type of a teacher timed alone and of a student that generates; updates use "
    "config.teacher.dtype",
)
MATMUL = flags.DEFINE_integer(
    "matmul",
    None,
    "side of the reference product; default 8192, on a CPU 1024",
    lower_bound=1,
)
WHAT = flags.DEFINE_list(
    "what", list(PARTS), "parts to time; one alone gives its own peak of accelerator memory"
)
RUNS = flags.DEFINE_integer("runs", 5, "runs of each part, after one to warm up", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "a file to write the numbers to")


def make_recipe(config: Any) -> Recipe:
    """The config with what the flags change."""
    config.weights = config.init_from = ""
    config.batch_size = CLIPS.value or jax.device_count()
    if PRESET.value:
        config.model.preset, config.teacher.preset, config.teacher.weights = PRESET.value, "", ""
        fits = [name for name, t in TEXT_PRESETS.items() if t.dim == PRESETS[PRESET.value].text_dim]
        config.text_encoder = fits[0]
    sizes = (FRAMES.value, HEIGHT.value, WIDTH.value)
    if any(sizes):
        if config.data.kind != "latents":
            raise UserError(
                "--frames, --height and --width are of latents, and this config has none; drop them"
            )
        config.data.clip = tuple(
            new or old for new, old in zip(sizes, config.data.clip, strict=True)
        )
    return read_recipe(config)


def parts_of(recipe: Recipe, what: list[str]) -> dict[str, Callable[[], Iterable[bench.Result]]]:
    """What to time, ready to be called. Parts that a recipe does not have are left out.

    Raises:
      UserError: there is no part of that name.
    """
    if set(what) - set(PARTS):
        raise UserError(f"--what={','.join(what)} has parts other than {', '.join(PARTS)}")
    runs, frozen, stage = RUNS.value, WEIGHTS_DTYPE.value, make_stage(recipe, all_devices())
    vae = (
        VAE_PRESETS[VAE.value] if recipe.wan.out_channels == VAE_PRESETS[VAE.value].z_dim else None
    )
    size = MATMUL.value or (1024 if jax.default_backend() == "cpu" else 8192)
    parts: dict[str, Callable[[], Iterable[bench.Result]]] = {}
    parts["matmul"] = lambda: [bench.matmul(size, recipe.compute.dtype, runs)]
    if recipe.teacher.kind == "network":
        parts["teacher_forward"] = lambda: [bench.teacher_forward(recipe, jnp.dtype(frozen), runs)]
    for learner in stage.learners:
        parts[f"{learner}_step"] = partial(bench.updates, stage, learner, runs)
    if recipe.causal:
        parts["streaming"] = lambda: bench.streaming(
            recipe, vae, NUM_STEPS.value, jnp.dtype(frozen), runs
        )
    if vae:
        parts["vae"] = lambda: bench.vae_parts(recipe, vae, runs)
    return {name: part for name, part in parts.items() if name in ("matmul", *what)}


def surroundings() -> dict[str, Any]:
    """Hardware, versions and command."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return made_with("launch.bench", ("jax", "jaxlib", "flax", "optax")) | {
        "device": device.device_kind,
        "devices": jax.device_count(),
        # of the whole process, on one device; None: the backend does not say, see xla_bytes
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def with_rates(results: list[bench.Result]) -> list[dict[str, Any]]:
    """Each result with TFLOP/s of one device, and the share of what the product of two matrices
    reaches there.
    """
    rate = lambda r, devices: r.flops / r.seconds / devices
    best = rate(results[0], 1)
    spread = lambda r: jax.device_count() if "step" in r.part else 1  # the others run on one
    rates = [rate(r, spread(r)) for r in results]
    told = zip(results, rates, strict=True)
    return [r._asdict() | {"tflops_per_second": x / 1e12, "of_matmul": x / best} for r, x in told]


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"{'part':36}{'compile s':>10}{'median s':>11}"
        f"{'TFLOP':>11}{'TFLOP/s':>9}{'of matmul':>10}{'GB':>8}"
    ]
    for r in rows:
        gb = f"{r['xla_bytes'] / 1e9:8.3f}" if r["xla_bytes"] else f"{'-':>8}"
        numbers = f"{r['compile_seconds']:10.2f}{r['seconds']:11.4g}{r['flops'] / 1e12:11.4g}"
        lines.append(
            f"{r['part']:36}{numbers}{r['tflops_per_second']:9.4g}{r['of_matmul']:10.1%}{gb}"
        )
    for r in rows:
        if r["part"] == "streaming":
            lines += [
                f"  {name.replace('_', ' '):34}{value:10.4g}" for name, value in r["more"].items()
            ]
    return "\n".join(lines)


def main(_):
    # Disable the cache, or we time cache reads.
    jax.config.update("jax_enable_compilation_cache", False)
    recipe, results = make_recipe(read_config(CONFIG).copy_and_resolve_references()), []
    for name, part in (bar := tqdm(parts_of(recipe, WHAT.value).items(), unit="part")):
        bar.set_description(name)
        results += part()
    rows = with_rates(results)
    print(show(rows))
    told = surroundings()
    peak = told["peak_bytes"]
    print(f"GB: arguments, results and temporaries on one {told['device']}, by XLA's account")
    print(
        f"peak of the process: {peak / 1e9:.3f} GB"
        if peak
        else "peak of the process: this backend does not say"
    )
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(told | {"results": rows}, indent=2))


def run() -> None:
    """The program."""
    run_main(main, __doc__)
