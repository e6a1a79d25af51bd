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

from absl import flags
from ml_collections import config_flags

from salt_jax.cli.app import name_files, read_config, run_main
from salt_jax.compile.target import GPU_SHARE, read_target
from salt_jax.config.reading import read_recipe
from salt_jax.config.sections import Mesh
from salt_jax.errors import UserError
from salt_jax.io.files import as_path, write_whole

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
name_files(JSON)
AXES = tuple(field.name for field in dataclasses.fields(Mesh))


def read_mesh(entries: list[str]) -> dict[str, int]:
    """["data:8", "fsdp:8"] -> the size of every axis.

    Raises:
      UserError: an axis is unknown or named twice, or a size is not a whole number >= 1.
    """
    sizes = dict.fromkeys(AXES, 1)
    pairs = [entry.partition(":")[::2] for entry in entries]
    names = [name for name, _ in pairs]
    if set(names) - set(AXES) or len(set(names)) < len(names):
        raise UserError(
            f"--mesh={','.join(entries)} must name each of {', '.join(AXES)} once at most"
        )
    for name, size in pairs:
        if not size.isdigit() or int(size) < 1:
            raise UserError(
                f"--mesh={','.join(entries)}: the size of {name} must be a whole number >= 1"
            )
    return sizes | {name: int(size) for name, size in pairs}


def main(_):
    recipe, target = read_recipe(read_config(CONFIG)), read_target(TARGET.value)
    chip = target.described
    if chip is None:
        raise UserError(
            "--target=here: name the devices, such as gpu:h100:8, or ask launch.compile about these"
        )
    mesh = None if MESH.value is None else read_mesh(MESH.value)
    memory = chip.memory * (GPU_SHARE if target.platform == "gpu" else 1)
    memory = memory if MEMORY.value is None else MEMORY.value * 1e9
    # jax comes here, after all that can be refused without it
    from salt_jax.cli.planning import make_plan, show

    plan = make_plan(recipe, target, mesh, memory, FLOPS.value or chip.flops, MFU.value)
    print(show(plan))
    if JSON.value:
        write_whole(as_path(JSON.value), json.dumps(plan, indent=2))


def run() -> None:
    """The program."""
    flags.mark_flag_as_required("config")
    run_main(main, __doc__)
