"""python -m launch.plan --config=configs/X.py --mesh=data:8,fsdp:8 [--memory_gb=80] [--flops=989e12] [--mfu=0.4]

Says what a run costs before anything is allocated: numbers and bytes of every network, of moments, gradients, caches
and activations, in all and on each device; FLOPs of an update by network and part; the time they take; whether it fits.
Needs no accelerator. Means are over the run's draws, once cache alignment has begun.
"""

import json
import math
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch.cli import read_config, run_main
from salt_jax.errors import UserError
from salt_jax.train.cost import critic_flops, mean_mix, student_flops
from salt_jax.train.footprint import kept, passing
from salt_jax.train.recipe import Recipe, read_recipe
from salt_jax.train.setup import runs_flash
from salt_jax.train.sharding import AXES

CONFIG = config_flags.DEFINE_config_file("config", None, "which run; see configs/", lock_config=True)
MESH = flags.DEFINE_list("mesh", None, "devices per axis, such as data:8,fsdp:8; others are 1", required=True)
MEMORY = flags.DEFINE_float("memory_gb", 80.0, "of a device, in 1e9 bytes", lower_bound=0)
FLOPS = flags.DEFINE_float(
    "flops", 989e12, "of a device at its best, a second; 989e12 is H100 and H200 in bfloat16", lower_bound=1
)
MFU = flags.DEFINE_float(
    "mfu", 0.4, "share of it that is reached, recomputation counted as work", lower_bound=1e-3, upper_bound=1
)
FLASH = flags.DEFINE_bool(
    "flash", None, "attention keeps no scores; default: by config.model.attention, for a GPU"
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
            raise UserError(f"--mesh={','.join(told)}: the size of {name} must be a whole number >= 1")
    return sizes | {name: int(size) for name, size in pairs}


def make_plan(
    recipe: Recipe,
    mesh: dict[str, int],
    memory: float,
    flops: float,
    mfu: float,
    flash: bool,
) -> dict[str, Any]:
    """Everything the table says, as values for JSON."""
    rows = kept(recipe, mesh)
    rows += passing(recipe, mesh, flash, rows)
    mix = mean_mix(recipe)
    updates = {"student": student_flops(recipe, mix, flash), "critic": critic_flops(recipe, mix, flash)}
    devices = math.prod(mesh.values())
    seconds = {who: sum(parts.values()) / (devices * flops * mfu) for who, parts in updates.items()}
    iteration = seconds["student"] + seconds["critic"] * recipe.critic_updates
    needed = sum(row.device for row in rows)
    return {
        "mesh": mesh,
        "devices": devices,
        "batch_size": recipe.batch_size,
        "memory": [row._asdict() | {"all_devices": row.device * devices} for row in rows],
        "bytes_per_device": needed,
        "memory_per_device": memory,
        "fits": needed <= memory,
        "flash": flash,
        "updates": {who: parts for who, parts in updates.items() if parts},
        "seconds": {who: s for who, s in seconds.items() if s},
        "seconds_per_iteration": iteration,
        "hours_of_run": iteration * recipe.updates / 3600,
    }


def show(plan: dict[str, Any]) -> str:
    """The plan as text."""
    gb = lambda n: f"{n / 1e9:12.3f}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [f"{plan['devices']} device(s): {mesh}; batch of {plan['batch_size']}", ""]
    lines += [f"{'memory, GB':28}{'numbers':>16}{'one copy':>12}{'each device':>12}{'all devices':>12}"]
    for row in plan["memory"]:
        count = f"{row['count']:16,}" if row["count"] else " " * 16
        lines.append(
            f"{row['name']:28}{count}{''.join(gb(row[k]) for k in ('whole', 'device', 'all_devices'))}"
        )
    total, limit = plan["bytes_per_device"], plan["memory_per_device"]
    lines += [f"{'sum':28}{' ' * 28}{gb(total)}{gb(total * plan['devices'])}"]
    verdict = "fits" if plan["fits"] else "does NOT fit"
    lines += [
        f"{verdict}: {total / 1e9:.1f} of {limit / 1e9:.1f} GB on each device ({total / limit:.0%})",
        "",
    ]
    for who, parts in plan["updates"].items():
        lines.append(f"{f'{who} update, FLOPs':44}{sum(parts.values()):12.4g}")
        lines += [
            f"  {name:42}{flops:12.4g}{flops / sum(parts.values()):8.1%}" for name, flops in parts.items()
        ]
        lines.append(f"  {'seconds':42}{plan['seconds'][who]:12.4g}")
    lines.append(f"{'one iteration, with all critic updates, s':44}{plan['seconds_per_iteration']:12.4g}")
    lines.append(f"{'the whole run, hours':44}{plan['hours_of_run']:12.4g}")
    return "\n".join(lines)


def main(_):
    recipe = read_recipe(read_config(CONFIG))
    on_gpu = runs_flash(recipe, "gpu")
    flash = on_gpu if FLASH.value is None else FLASH.value
    numbers = (MEMORY.value * 1e9, FLOPS.value, MFU.value, flash)
    plan = make_plan(recipe, read_mesh(MESH.value), *numbers)
    print(show(plan))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(plan, indent=2))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
