"""One program of launch.compile, in the process that it starts for it: the same flags, and which
program.
"""

import dataclasses
import json
from pathlib import Path

import jax
from absl import flags

from salt_jax.cli.app import read_config, run_main
from salt_jax.cli.compile_flags import CONFIG, read_flags
from salt_jax.compile.measure import compile_program, devices_of
from salt_jax.compile.programs import parts
from salt_jax.config.reading import read_recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.sharding import make_mesh
from salt_jax.stages import make_stage

PROGRAM = flags.DEFINE_string("program", None, "its name", required=True)
RESULT = flags.DEFINE_string("result", None, "the file for what is found", required=True)
DUMP = flags.DEFINE_string("dump", None, "the folder that XLA writes to", required=True)


def main(_):
    # its programs would have taken no time
    jax.config.update("jax_enable_compilation_cache", False)
    (target, (part,)), recipe = read_flags(), read_recipe(read_config(CONFIG))
    devices = devices_of(target)
    mesh = make_mesh(dataclasses.asdict(recipe.mesh), devices)
    if part in ("student", "critic", "teacher"):
        refuse_uneven(recipe, mesh.shape["data"] * mesh.shape["fsdp"])
    program = parts(make_stage(recipe, mesh), part)[PROGRAM.value]()
    # None where a device does not say, as a CPU
    memory = target.memory or (devices[0].memory_stats() or {}).get("bytes_limit")
    row = compile_program(program, devices[0].platform, memory, Path(DUMP.value))
    row |= {
        "mesh": dict(mesh.shape),
        "batch_size": recipe.batch_size,
        "device": devices[0].device_kind,
    }
    Path(RESULT.value).write_text(json.dumps(row))


if __name__ == "__main__":
    run_main(main)
