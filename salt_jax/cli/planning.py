"""python -m launch.plan --config=configs/X.py [--target=gpu:h100:8] [--mesh=data:8,fsdp:8]
                      [--mfu=0.4]

Says what a run costs before anything is allocated: numbers and bytes of every network, of moments,
gradients, caches and activations, in all and on each device; FLOPs of an update by network and
part; the time they take; whether it fits. Needs no accelerator. Means are over the run's draws,
once cache alignment has begun. What XLA plans for the same run says launch.compile; docs/scaling.md
has both.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from salt_jax.cli.app import read_config, run_main
from salt_jax.compile.target import GIB, GPU_SHARE, Target, read_target
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.models.attention import choose_kernel, is_flash
from salt_jax.models.presets import Kernel
from salt_jax.planning.flops import update_flops
from salt_jax.planning.memory import needed
from salt_jax.sharding import AXES, axis_sizes
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel
from salt_jax.stages.stage import Stage

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "which run; see configs/", lock_config=True
)
TARGET = flags.DEFINE_string(
    "target",
    "gpu:h100:8",
    "the devices, as for launch.compile: tpu:v5p:2x2x4, gpu:h100:2x8 (hosts x devices)",
)
MESH = flags.DEFINE_list(
    "mesh",
    None,
    "any number of such devices per axis, as data:8,fsdp:8; default: config.mesh on the target",
)
MEMORY = flags.DEFINE_float(
    "memory_gb",
    None,
    "usable memory of a device, in 1e9 bytes; default: the target's",
    lower_bound=0,
)
FLOPS = flags.DEFINE_float(
    "flops",
    None,
    "peak FLOP/s of a device in bfloat16; default: the target's",
    lower_bound=1,
)
MFU = flags.DEFINE_float(
    "mfu",
    0.4,
    "share of the peak that is reached, recomputation counted as work",
    lower_bound=1e-3,
    upper_bound=1,
)
JSON = flags.DEFINE_string("json", None, "a file to write the same numbers to")


def read_mesh(told: list[str]) -> dict[str, int]:
    """["data:8", "fsdp:8"] -> the size of every axis.

    Raises:
      UserError: an axis is unknown or named twice, or a size is not a whole number >= 1.
    """
    sizes = dict.fromkeys(AXES, 1)
    pairs = [entry.partition(":")[::2] for entry in told]
    names = [name for name, _ in pairs]
    if set(names) - set(AXES) or len(set(names)) < len(names):
        raise UserError(f"--mesh={','.join(told)} must name each of {', '.join(AXES)} once at most")
    for name, size in pairs:
        if not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh={','.join(told)}: the size of {name} must be a whole number >= 1"
            )
    return sizes | {name: int(size) for name, size in pairs}


def make_plan(
    stage: Stage, target: Target, mesh: dict[str, int], memory: float, flops: float, mfu: float
) -> dict[str, Any]:
    """Everything the table says, as values for JSON.

    `memory`: bytes of a device that may be filled.
    """
    recipe = stage.recipe
    kernel = attention_kernel(recipe, recipe.wan, target.platform)
    rows, flash = needed(stage, mesh, kernel), is_flash(kernel)
    updates = {who: update_flops(recipe, stage.mean_passes(who), flash) for who in stage.learners}
    devices = math.prod(mesh.values())
    seconds = {who: sum(parts.values()) / (devices * flops * mfu) for who, parts in updates.items()}
    iteration = sum(seconds[update.moves] for update, _ in stage.updates(0))
    total = sum(row.device for row in rows)
    return {
        "mesh": mesh,
        "devices": devices,
        "batch_size": recipe.batch_size,
        "memory": [row._asdict() | {"all_devices": row.device * devices} for row in rows],
        "bytes_per_device": total,
        "memory_per_device": memory,
        "fits": total <= memory,
        "chip": f"{target.platform}:{target.chip}",
        "flops": flops,
        "attention": kernel,
        "absent": absent(recipe, target, kernel),
        "updates": updates,
        "seconds": seconds,
        "seconds_per_iteration": iteration,
        "hours_of_run": iteration * recipe.iterations / 3600,
    }


def show(plan: dict[str, Any]) -> str:
    """The plan as text."""
    gb = lambda n: f"{n / 1e9:12.3f}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [f"{plan['devices']} x {plan['chip']}: {mesh}; batch of {plan['batch_size']}"]
    may = f"{plan['memory_per_device'] / GIB:.1f} GiB of a device may be filled"
    lines += [f"{may}; {plan['flops'] / 1e12:.0f} TFLOP/s at best; attention: {plan['attention']}"]
    lines += [plan["absent"], ""] if plan["absent"] else [""]
    lines += [
        f"{'memory, GB':28}{'numbers':>16}{'one copy':>12}{'each device':>12}{'all devices':>12}"
    ]
    for row in plan["memory"]:
        count = f"{row['count']:16,}" if row["count"] else " " * 16
        sizes = "".join(gb(row[k]) for k in ("whole", "device", "all_devices"))
        lines.append(f"{row['name']:28}{count}{sizes}")
    total, limit = plan["bytes_per_device"], plan["memory_per_device"]
    lines += [f"{'sum':28}{' ' * 28}{gb(total)}{gb(total * plan['devices'])}"]
    verdict = "fits" if plan["fits"] else "does NOT fit"
    lines += [
        f"{verdict}: {total / 1e9:.1f} of {limit / 1e9:.1f} GB on each device "
        f"({total / limit:.0%})",
        "",
    ]
    for who, parts in plan["updates"].items():
        lines.append(f"{f'{who} update, FLOPs':44}{sum(parts.values()):12.4g}")
        lines += [
            f"  {name:42}{flops:12.4g}{flops / sum(parts.values()):8.1%}"
            for name, flops in parts.items()
        ]
        lines.append(f"  {'seconds':42}{plan['seconds'][who]:12.4g}")
    lines.append(
        f"{'one iteration, with all critic updates, s':44}{plan['seconds_per_iteration']:12.4g}"
    )
    lines.append(f"{'the whole run, hours':44}{plan['hours_of_run']:12.4g}")
    return "\n".join(lines)


def absent(recipe: Recipe, target: Target, kernel: Kernel) -> str | None:
    """What to know where the target's own attention kernel does not run."""
    dtype, c = recipe.compute.dtype, recipe.wan
    own = {"gpu": "cudnn", "tpu": "splash"}[target.platform]
    if kernel == own:
        return None
    best = choose_kernel(target.platform, dtype, c.head_width)
    why = (
        f"config.model.attention={recipe.model.attention}"
        if best == own
        else f"it does not know heads of {c.head_width} in {jnp.dtype(dtype).name}"
    )
    return (
        f"attention runs without the kernel of a {target.platform} ({own}): {why}; it will be "
        "slower than counted"
    )


def main(_):
    stage, target = make_stage(read_recipe(read_config(CONFIG))), read_target(TARGET.value)
    chip = target.described
    if chip is None:
        raise UserError(
            "--target=here: name the devices, such as gpu:h100:8, or ask launch.compile about these"
        )
    sizes = (
        axis_sizes(dataclasses.asdict(stage.recipe.mesh), target.devices)
        if MESH.value is None
        else read_mesh(MESH.value)
    )
    memory = chip.memory * (GPU_SHARE if target.platform == "gpu" else 1)
    memory = memory if MEMORY.value is None else MEMORY.value * 1e9
    plan = make_plan(stage, target, sizes, memory, FLOPS.value or chip.flops, MFU.value)
    print(show(plan))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(plan, indent=2))


def run() -> None:
    """The program."""
    flags.mark_flag_as_required("config")
    run_main(main, __doc__)
