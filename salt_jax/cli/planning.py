"""What launch.plan says of a run: the numbers, and the table."""

import dataclasses
import math

import jax.numpy as jnp

from salt_jax.compile.target import GIB, Target
from salt_jax.config.schema import Recipe
from salt_jax.keys import Json
from salt_jax.models.attention import choose_kernel, is_flash
from salt_jax.models.presets import Kernel
from salt_jax.planning.flops import update_flops
from salt_jax.planning.memory import needed
from salt_jax.sharding import axis_sizes
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel


def make_plan(
    recipe: Recipe,
    target: Target,
    mesh: dict[str, int] | None,
    memory: float,
    flops: float,
    mfu: float,
) -> Json:
    """Everything the table says.

    Args:
      mesh: the size of every axis; None: the recipe's on the target.
      memory: bytes of a device that may be filled.
      flops: of a device at its best, a second.
      mfu: the share of it that is reached.

    Raises:
      UserError: the stage or the mesh cannot do what the recipe asks.
    """
    stage = make_stage(recipe)
    mesh = mesh or axis_sizes(dataclasses.asdict(recipe.mesh), target.devices)
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


def show(plan: Json) -> str:
    """The plan as text."""
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


def gb(size: float) -> str:
    """Bytes as a cell of the table."""
    return f"{size / 1e9:12.3f}"
