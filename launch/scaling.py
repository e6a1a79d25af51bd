"""python -m launch.scaling [--dir=docs/scaling] [--only=TEXT]

Compiles what docs/scaling.md has in its tables and is not in DIR yet, one file of launch.compile
each, and writes the tables from the files. A row whose file is gone is made again. See
launch/scaling.sh.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from salt_jax.cli.app import run_main
from salt_jax.compile.target import GIB, GPU_SHARE, read_target
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.keys import Json
from salt_jax.planning.memory import needed
from salt_jax.sharding import axis_sizes
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel

DIR = flags.DEFINE_string("dir", "docs/scaling", "the files that the tables are made of")
ONLY = flags.DEFINE_string("only", "", "compile rows with this in their name alone")
DOCUMENT = Path("docs/scaling.md")
MARK = "<!-- rows: launch/scaling.sh writes them -->"


class Row(NamedTuple):
    """One call of launch.compile."""

    name: str  # of its file
    config: str
    target: str
    clips: int | None  # in a batch; None: as the config says
    # GiB that no program may exceed, what waits beside it included; None: that it fits
    most: float | None
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Without --json."""
        batch = [f"--config.batch_size={self.clips}"] if self.clips else []
        config = f"--config=configs/{self.config}"
        return [
            "python",
            "-m",
            "launch.compile",
            config,
            f"--target={self.target}",
            *batch,
            *self.options,
        ]


STEPS = "--what=student,critic"
# The mesh of the configs is for several hosts; here all devices share one copy of the parameters.
TOGETHER = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
SHARED = (STEPS, *TOGETHER)
MAKING = (f"{STEPS},teacher", *TOGETHER)  # the trajectories beside the update that learns from them
OWN = {
    "ode": MAKING,
    # compiled before a window's first latent was encoded anew in the step
    "longlive": (*SHARED, "--config.stream.reencode=0"),
}
SALT = {  # Causal Forcing's programs are those of Self Forcing
    "self_forcing": "self_forcing.py:wan,salt,paper",
    "longlive": "longlive.py:wan,salt,paper",
    "causvid": "causvid.py:wan,salt,paper",
}
STAGES = {
    "teacher_forcing": "teacher_forcing.py:wan",
    "ode": "ode_regression.py:wan",
    "consistency": "consistency.py:wan",
    "longlive_init": "longlive_init.py:wan,salt,paper",
}
MACHINES = {"8h100": ("gpu:h100:8", 8), "v5p_16": ("tpu:v5p:2x2x4", 16)}
FIRST = {"h200": ("gpu:h200:1", 1), **MACHINES, "v6e_32": ("tpu:v6e:4x8", 32)}
MOST = {"h200": 125.0, "8h100": 36.0}
STREAM = ("--what=stream,vae", *TOGETHER)
CHUNKS = "self_forcing.py:wan,salt,paper"
CUT = (
    STEPS,
    "--config.mesh.data=1",
    "--config.mesh.fsdp=16",
    "--config.mesh.context=4",
)  # 16 clips on 64 chips
I2V = "sc_dmd.py:wan,i2v"
ROWS = (
    *(
        Row(
            f"self_forcing_{machine}", SALT["self_forcing"], target, devices, MOST.get(machine),
            SHARED,
        )
        for machine, (target, devices) in FIRST.items()
    ),
    *(
        Row(f"{name}_{machine}", config, target, devices, None, OWN.get(name, SHARED))
        for name, config in (
            {"longlive": SALT["longlive"], "causvid": SALT["causvid"], **STAGES}.items()
        )
        for machine, (target, devices) in MACHINES.items()
    ),
    Row("t2v_h200", "sc_dmd.py:wan", "gpu:h200:1", 1, None, SHARED),
    Row("t2v_8h100", "sc_dmd.py:wan", "gpu:h100:8", 8, None, SHARED),
    Row("i2v_16h200", I2V, "gpu:h200:2x8", 16, None, SHARED),
    Row("i2v_v5p_64", I2V, "tpu:v5p:4x4x4", 16, None, CUT),
    Row("stream_h100", CHUNKS, "gpu:h100:1", None, 20.0, STREAM),
    Row("stream_v6e", CHUNKS, "tpu:v6e:1x1", None, 20.0, STREAM),
)  # fmt: skip


def compile_row(row: Row, file: Path) -> None:
    """Writes the row's file, also where programs do not fit.

    Raises:
      UserError: launch.compile could not begin.
    """
    print(f"== {row.name}", file=sys.stderr)
    command = [sys.executable, *row.command[1:], f"--json={file}"]
    done = subprocess.run(command)
    if done.returncode not in (0, 1) or not file.exists():
        raise UserError(f"{' '.join(command)} ended with {done.returncode}; see above")


def lines(row: Row, file: Json) -> list[str]:
    """One line of a table for each program."""
    return [
        f"| {row.config} | {row.target} | {cells(row, program)} |" for program in file["programs"]
    ]


def cells(row: Row, p: Json) -> str:
    """What was found of a program, between bars."""
    if "peak_bytes" not in p:
        return f"{p['program']} | **{p['problem']}**" + " | " * 8
    limit = row.most or p["memory_bytes"] / GIB * (GPU_SHARE if row.target.startswith("gpu") else 1)
    over, most = in_all(p) - limit, f"{limit:.1f}"
    verdict = "yes" if over <= 0 and not p["problem"] else f"**no, by {over:.1f}**"
    sent = sum(moved["bytes"] for moved in p.get("collectives", {}).values()) / GIB
    seconds = f"{p['compile_seconds']:.0f}" if "compile_seconds" in p else "-"
    sizes = [p.get(f"{name}_bytes") for name in ("argument", "temporary", "peak", "beside")]
    numbers = ["-" if size is None else f"{size / GIB:.2f}" for size in sizes]
    return " | ".join(
        [p["program"], *numbers, f"{p['share']:.0%}", most, verdict, f"{sent:.2f}", seconds]
    )


def in_all(p: Json) -> float:
    """GiB of a device at a program's peak, with what waits beside it; 0 where it did not
    compile.
    """
    return (p.get("peak_bytes", 0) + p.get("beside_bytes", 0)) / GIB


def plan_line(row: Row, file: Json) -> list[str]:
    """Its largest update beside what launch.plan counts; none where no update compiled."""
    largest = max((p for p in file["programs"] if " step" in p["program"]), key=in_all, default={})
    if not in_all(largest):
        return []
    found, plan = in_all(largest), planned(row) / GIB
    return [
        f"| {row.name} | {largest['program']} | {found:.2f} | {plan:.2f} | {plan / found:.2f} |"
    ]


def planned(row: Row) -> int:
    """Bytes of a device by the model of launch.plan."""
    recipe, target = recipe_of(row), read_target(row.target)
    mesh = axis_sizes(dataclasses.asdict(recipe.mesh), target.devices)
    kernel = attention_kernel(recipe, recipe.wan, target.platform)
    return sum(held.device for held in needed(make_stage(recipe), mesh, kernel))


def recipe_of(row: Row) -> Recipe:
    """The recipe that the command of a row trains."""
    module, _, variant = row.config.partition(":")
    config = importlib.import_module(f"configs.{module.removesuffix('.py')}").get_config(
        *variant.split()
    )
    changed = (
        o.removeprefix("--config.").split("=") for o in row.command if o.startswith("--config.")
    )
    config.update_from_flattened_dict({name: int(value) for name, value in changed})
    return read_recipe(config)


HEAD = (
    *(
        "recipe",
        "target",
        "program",
        "arguments",
        "temporaries",
        "peak",
        "beside",
        "of device",
        "must",
    ),
    *("fits", "sent", "compile s"),
)


def document(found: dict[Row, Json]) -> str:
    """The tables, how each row is made, and the largest buffers of programs that do not fit."""
    table = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    table += [line for row, file in found.items() for line in lines(row, file)]
    absent = [row.name for row in ROWS if row not in found]
    table += [f"\nNot compiled yet: {', '.join(absent)}."] if absent else []
    table += [
        "\n| row | its largest update | by the compiler | by launch.plan | ratio |",
        "|---|---|---|---|---|",
    ]
    table += [line for row, file in found.items() for line in plan_line(row, file)]
    table += ["\n| file | commit | command |", "|---|---|---|"]
    table += [
        f"| [{row.name}](scaling/{row.name}.json) | {file['commit']} | `{' '.join(row.command)}` |"
        for row, file in found.items()
    ]
    for row, file in found.items():
        for p in file["programs"]:
            if p["problem"] or (row.most and in_all(p) > row.most):
                buffers = [
                    f"{b['shape']} {b['bytes'] / GIB:.2f} GiB (`{b['source']}`)"
                    for b in p.get("largest", ())
                ]
                table.append(
                    f"\n- {row.name}, {p['program']}: {p['problem'] or 'over'}. "
                    f"{'; '.join(buffers)}"
                )
    return "\n".join(table)


def main(_):
    folder, found = Path(DIR.value), {}
    folder.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        file = folder / f"{row.name}.json"
        if not file.exists() and ONLY.value in row.name:
            compile_row(row, file)
        if file.exists():
            found[row] = json.loads(file.read_text())
            # a row may take an hour
            DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), document(found)))


def with_tables(text: str, tables: str, mark: str = MARK) -> str:
    """The document with other tables between its two marks.

    Raises UserError where it has not two.
    """
    parts = text.split(mark)
    if len(parts) != 3:
        raise UserError(f"{DOCUMENT} must have two lines {mark}, between which the tables stand")
    return f"{parts[0]}{mark}\n{tables}\n{mark}{parts[2]}"


if __name__ == "__main__":
    run_main(main)
