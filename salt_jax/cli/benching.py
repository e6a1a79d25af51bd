"""What launch.bench does: the parts of a run timed one after another, a table, and the numbers."""

import json
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

from salt_jax import hosts
from salt_jax.cli import bench_flags as f
from salt_jax.cli.app import made_with
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.io.files import as_path, write_whole
from salt_jax.keys import Config, Json
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.planning import bench
from salt_jax.planning.bench_attention import attention_kernel
from salt_jax.sharding import all_devices
from salt_jax.stages import make_stage


def time_parts(config: Config, what: list[str]) -> None:
    """Times the parts that are named, prints the table, and writes the numbers. Several processes
    time together, updates over all devices, and the first one tells.

    Raises:
      UserError: what the flags change does not make a run.
    """
    # Disable the cache, or we time cache reads.
    jax.config.update("jax_enable_compilation_cache", False)
    config.batch_size = f.CLIPS.value or jax.device_count()
    found, results = surroundings(), []
    first, parts = hosts.is_first(), parts_of(read_recipe(config), what)
    for name, part in (bar := tqdm(parts.items(), unit="part", disable=not first)):
        bar.set_description(name)
        for result in part():
            results.append(result)
            if first and f.JSON.value:  # after each, so that one who is stopped has the others
                told = {"peak_bytes": peak_bytes(), "results": with_rates(results)}
                write_whole(as_path(f.JSON.value), json.dumps(found | told, indent=2))
    hosts.only_first(lambda: tell(with_rates(results), found), "printing the numbers")


def tell(rows: list[Json], found: Json) -> None:
    """Prints the table."""
    print(show(rows))
    print(f"GB: arguments, results and temporaries on one {found['device']}, by XLA's account")
    peak = peak_bytes()
    print(
        f"peak of the process: {peak / 1e9:.3f} GB"
        if peak
        else "peak of the process: this backend does not say"
    )


def peak_bytes() -> int | None:
    """Of the whole process, on one device; None: the backend does not say, see xla_bytes."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def parts_of(recipe: Recipe, what: list[str]) -> dict[str, Callable[[], Iterable[bench.Result]]]:
    """What to time, ready to be called. Parts that a recipe does not have are left out."""
    runs, frozen = f.RUNS.value, jnp.dtype(f.WEIGHTS_DTYPE.value)
    vae = VAE_PRESETS[f.VAE.value]
    vae = vae if recipe.wan.out_channels == vae.z_dim else None
    size = f.MATMUL.value or (1024 if jax.default_backend() == "cpu" else 8192)
    parts: dict[str, Callable[[], Iterable[bench.Result]]] = {}
    parts["matmul"] = partial(bench.matmul, size, recipe.compute.dtype, runs)
    if recipe.teacher.kind == "network":
        parts["teacher_forward"] = partial(bench.teacher_forward, recipe, frozen, runs)
    stage = make_stage(recipe, all_devices())
    for learner in stage.learners:
        parts[f"{learner}_step"] = partial(bench.updates, stage, learner, runs)
    if recipe.causal:
        steps = f.NUM_STEPS.value
        parts["streaming"] = partial(bench.streaming, recipe, vae, steps, frozen, runs)
    if vae:
        parts["vae"] = partial(bench.vae_parts, recipe, vae, runs)
    for kernel in f.KERNELS:
        parts[f"attention_{kernel}"] = partial(attention_kernel, recipe, kernel, runs)
    return {name: part for name, part in parts.items() if name in ("matmul", *what)}


def surroundings(*packages: str) -> Json:
    """Hardware, command, and versions, also of these packages."""
    return made_with("launch.bench", ("jax", "jaxlib", "flax", "optax", *packages)) | {
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def with_rates(results: list[bench.Result]) -> list[Json]:
    """Each result with TFLOP/s of one device, and the share of what the product of two matrices
    reaches there.
    """
    best = results[0].flops / results[0].seconds
    rows = []
    for r in results:
        devices = jax.device_count() if "step" in r.part else 1  # the others run on one
        rate = r.flops / r.seconds / devices
        rows.append(r._asdict() | {"tflops_per_second": rate / 1e12, "of_matmul": rate / best})
    return rows


def show(rows: list[Json]) -> str:
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
