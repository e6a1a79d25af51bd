"""Run by test_described.py in a process of its own, whose environment is that of the target: see `surroundings`.

    python -m tests.compile.described lower TARGET             every student and critic program of every Wan config
    python -m tests.compile.described compile TARGET FOLDER    two programs of few layers; XLA writes to the folder

Each line of stdout is a program: JSON with its config, its name, and what was found.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import wan_t2v
from salt_jax.compile.measure import compile_program, devices_of, memory_of, one_line
from salt_jax.compile.programs import programs
from salt_jax.compile.target import read_target
from salt_jax.models.presets import PRESETS
from salt_jax.train.recipe import read_recipe
from salt_jax.train.sharding import make_mesh
from tests.test_configs import WAN, load


def lowered(devices: list[Any]) -> Iterator[dict[str, Any]]:
    """Every program at full size, on the mesh and at the batch of its config."""
    for path, variant in (case.values for case in WAN):
        recipe = read_recipe(load(path).get_config(*variant))
        mesh = make_mesh(dataclasses.asdict(recipe.mesh), devices)
        for part in ("student", "critic"):
            for name, make in programs(recipe, part, "bfloat16").items():
                start, told = time.perf_counter(), None
                try:
                    program = make(mesh)
                    program.jitted.lower(*program.args)
                except Exception as error:  # it is the test that judges it
                    told = f"{type(error).__name__}: {one_line(error)}"
                seconds = time.perf_counter() - start
                yield {
                    "config": path.stem,
                    "variant": [*variant],
                    "program": name,
                    "problem": told,
                    "s": seconds,
                }


def compiled(devices: list[Any], memory: int, folder: Path) -> Iterator[dict[str, Any]]:
    """SC-DMD at the width of 1.3B and with two layers: the critic's update, and the teacher's forward."""
    shallow = dataclasses.replace(PRESETS["wan2.1-t2v-1.3b"], num_layers=2)
    PRESETS["wan2.1-t2v-1.3b"] = shallow
    config = wan_t2v.get_config("dmd4")
    config.batch_size, config.data.clip, config.mesh.fsdp = len(devices), (5, 60, 104), len(devices)
    recipe = read_recipe(config)
    mesh = make_mesh(dataclasses.asdict(recipe.mesh), devices)
    for part in ("critic", "teacher"):
        for name, make in programs(recipe, part, "bfloat16").items():
            row = compile_program(make(mesh), devices[0].platform, memory, folder)
            yield {"config": "wan_t2v", "program": name, **row}


if __name__ == "__main__":
    what, told, *rest = sys.argv[1:]
    target = read_target(told)
    devices = devices_of(target)
    rows = (
        lowered(devices)
        if what == "lower"
        else compiled(devices, memory_of(target, devices[0]), Path(rest[0]))
    )
    for row in rows:
        print(json.dumps(row), flush=True)
