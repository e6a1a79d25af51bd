"""Run by test_for_tpu.py and test_for_gpu.py in a process of its own, in the environment of the
target.

    python -m tests.compile.described lower TARGET      student and critic of every Wan config
    python -m tests.compile.described compile TARGET    two programs of few layers
    python -m tests.compile.described fill TARGET       one that just fits a v5p, one that does not

Each line of stdout is a program: JSON with its name and what was found. Files of XLA go where
XLA_FLAGS say.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from configs import sc_dmd, self_forcing
from salt_jax import sharding
from salt_jax.compile.measure import compile_program, devices_of, one_line
from salt_jax.compile.programs import Program, parts
from salt_jax.compile.surroundings import surroundings
from salt_jax.compile.target import read_target
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.models.presets import PRESETS
from salt_jax.planning.memory import needed
from salt_jax.sharding import make_mesh
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel
from tests.every_config import WAN, form, get_config
from tests.helpers import ROOT

# what is told of a program
ROW = {
    "program": "student step",
    "problem": None,
    "compile_seconds": 12.5,
    "argument_bytes": 4 * 2**30,
    "temporary_bytes": 42 * 2**30,
    "output_bytes": 4 * 2**30,
    "alias_bytes": 3 * 2**30,
    "peak_bytes": 47 * 2**30,
    "beside_bytes": 2**30,
    "peak_is": "the compiler's own",
    "share": 0.5,
    "code_bytes": 165 * 2**20,
    "kernels": {"__cudnn$fmhaSoftmax": 3},
    "collectives": {"all-gather": {"calls": 2, "runs": 60, "bytes": 3 * 2**30}},
    "open_loops": 1,
    "largest": [{"shape": "bf16[30,4]", "bytes": 5 * 2**30, "source": "jit(run)/x/y/z/dot"}],
}


def covering(names: Iterable[str]) -> list[str]:
    """Some programs that show between them every term and every way to begin: LongLive with Salt
    has twelve.
    """
    kept, seen = [], set()
    for name in sorted(names, key=lambda name: -name.count("+")):
        if set(name.split(" + ")) - seen:
            kept.append(name)
            seen |= set(name.split(" + "))
    return kept


def wanted(platform: str) -> list[tuple[str, str]]:
    """All configs of Wan for a TPU; for a GPU each in one reading of Salt, as kernels are."""
    return [case for case in WAN if platform == "tpu" or "paper" not in case[1]]


def lowered(devices: list[Any]) -> Iterator[dict[str, Any]]:
    """At full size, on the mesh of each config, one clip a device.

    Programs of one form are lowered once.
    """
    problems: dict[str, str | None] = {}
    for config_name, options in wanted(devices[0].platform):
        config = get_config(config_name, options)
        config.batch_size = len(devices)
        recipe = read_recipe(config)
        stage = make_stage(recipe, make_mesh(dataclasses.asdict(recipe.mesh), devices))
        for part in ("student", "critic"):
            made = parts(stage, part)
            for name in covering(made):
                if (key := form(recipe, name)) not in problems:
                    problems[key] = None
                    try:
                        program = made[name]()
                        program.jitted.lower(*program.args)
                    except Exception as error:  # it is the test that judges it
                        problems[key] = f"{type(error).__name__}: {one_line(error)}"
                yield {
                    "case": f"{config_name}:{options}",
                    "program": name,
                    "problem": problems[key],
                }


def shallow(devices: int, causal: bool) -> Recipe:
    """DMD of whole clips, or Self Forcing, with two layers at full width, one clip of 480p a
    device.
    """
    PRESETS["wan2.1-t2v-1.3b"] = dataclasses.replace(PRESETS["wan2.1-t2v-1.3b"], num_layers=2)
    config = self_forcing.get_config("wan") if causal else sc_dmd.get_config("wan,dmd4")
    config.teacher.preset = config.teacher.weights = ""
    config.batch_size = config.mesh.fsdp = devices
    config.mesh.data = 1
    return read_recipe(config)


def compiled(devices: list[Any], memory: int | None) -> Iterator[dict[str, Any]]:
    """The teacher's forward and the student's update of `shallow`; for GPU the causal student's
    too.
    """
    platform = devices[0].platform
    for causal in (False, True)[: 1 + (platform == "gpu")]:
        recipe = shallow(len(devices), causal)
        stage = make_stage(recipe, make_mesh(dataclasses.asdict(recipe.mesh), devices))
        for part in ("student",) if causal else ("teacher", "student"):
            for name, make in parts(stage, part).items():
                row = compile_program(make(), platform, memory, Path())
                yield {"program": name, "causal": causal, **row}


def filling(devices: list[Any], memory: int | None) -> Iterator[dict[str, Any]]:
    """A loop that keeps 8 bfloat16 arrays, four float32 ones beside: 7 GiB for each 2**18 rows a
    device.
    """
    mesh = make_mesh(dict(data=1, fsdp=-1, context=1, tensor=1), devices)
    spread = sharding.NamedSharding(mesh, sharding.P("fsdp"))

    def loss(x, w):
        body = jax.checkpoint(lambda h, w: (jnp.sin(h @ w) + h, None))
        h = jax.lax.scan(body, x, w)[0]
        return (h @ h.T).sum()

    for times in (13, 14):
        rows = len(devices) * times * 2**18
        args = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread)
            for shape in ((rows, 1024), (8, 1024, 1024))
        )
        yield {
            "times": times,
            **compile_program(Program(jax.jit(jax.grad(loss, 1)), (*args,)), "tpu", memory, Path()),
        }


def run(what: str, target: str, cache: Path) -> list[dict[str, Any]]:
    """What a process of its own says. Skips where a part of the target's compiler is absent."""
    try:
        environment = surroundings(read_target(target), cache, os.environ)
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.compile.described", what, target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_lowered(rows: list[dict[str, Any]], platform: str) -> None:
    """Programs of every config have been there, and each lowers."""
    names = {f"{name}:{options}" for name, options in wanted(platform)}
    assert {row["case"] for row in rows} == names
    assert [row for row in rows if row["problem"]] == []


def check_compiled(rows: list[dict[str, Any]], devices: int, kernel: str, platform: str) -> None:
    """Arguments are those that the shardings say, launch.plan is near, and no scores of attention
    are kept.
    """
    teacher, *students = rows
    assert teacher["program"] == "teacher forward" and {row["program"] for row in students} == {
        "student step"
    }
    scores = 4 * 12 * 32760**2  # bytes of one clip, one layer: 51 GB
    for row, most in ((teacher, 3e9), *((student, 9e9) for student in students)):
        assert row["problem"] is None and row["argument_bytes"] < row["peak_bytes"] < most < scores
        assert (
            any(kernel in name for name in row["kernels"])
            and row["collectives"]["all-gather"]["calls"]
        )
    assert not any("backward" in name.lower() or "dkv" in name for name in teacher["kernels"])
    for row in students:
        with mock.patch.dict(PRESETS):
            recipe = shallow(devices, row["causal"])
            plan = needed(
                make_stage(recipe),
                dict(data=1, fsdp=devices, context=1, tensor=1),
                attention_kernel(recipe, recipe.wan, platform),
            )
        state = sum(held.device for held in plan if held.count and held.name != "gradients")
        # a rollout makes its videos itself
        video = 0 if row["causal"] else math.prod(recipe.clip_shape)
        clip = 4 * (video + recipe.wan.text_length * recipe.wan.text_dim)
        given, peak = (row[f"{name}_bytes"] + row["beside_bytes"] for name in ("argument", "peak"))
        assert given == pytest.approx(state + clip, rel=0.03)  # a TPU pads small arrays
        # So few layers weigh little: what one block holds is nearly all, and a TPU's compiler holds
        # less of it.
        assert (
            -0.15
            < sum(held.device for held in plan) / peak - 1
            < (0.15 if platform == "gpu" else 0.35)
        )


if __name__ == "__main__":
    what, target = sys.argv[1], read_target(sys.argv[2])
    devices = devices_of(target)
    modes = {"lower": lowered, "compile": partial(compiled, memory=target.memory)}
    modes["fill"] = partial(filling, memory=target.memory)
    for row in modes[what](devices):
        print(json.dumps(row), flush=True)
