"""The programs of launch.compile one after another, each in a process of its own, and what is
said of them.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from salt_jax.cli.app import made_with
from salt_jax.compile.buffers import Buffer, dump_flags
from salt_jax.compile.programs import parts
from salt_jax.compile.surroundings import last_line
from salt_jax.compile.target import GIB
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from salt_jax.io.files import as_path, write_whole
from salt_jax.keys import Config, Json
from salt_jax.stages import make_stage

PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13")
COLUMNS = ("argument", "temporary", "output", "alias", "peak", "beside")  # GiB of a device


def compile_all(config: Config, what: list[str], environment: Mapping[str, str]) -> list[Json]:
    """One row for each program of the named parts.

    Args:
      environment: of the processes that compile.

    Raises:
      UserError: the config has none of the parts, or does not fit the devices.
    """
    stage = make_stage(read_recipe(config))  # without a mesh: programs have names there already
    names = [(part, name) for part in what for name in parts(stage, part)]
    if not names:
        raise UserError(
            f"this config has no {' or '.join(what)}; see config.stage, .video and .teacher.kind"
        )
    rows = []
    with tqdm(names, unit="program") as bar:  # closed before an error is printed
        for part, name in bar:
            bar.set_description(name)
            rows.append({"part": part, "program": name} | compile_one(part, name, environment, bar))
    return rows


def compile_one(part: str, name: str, environment: Mapping[str, str], bar: tqdm) -> Json:
    """The row that a child process reports for one program; of one that died, the end of its log.

    Raises:
      UserError: the child refused its flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump, result, log = (Path(folder) / name for name in ("dump", "result.json", "log"))
        options = [f"--what={part}", f"--program={name}", f"--result={result}", f"--dump={dump}"]
        flags = " ".join([environment.get("XLA_FLAGS", ""), dump_flags(dump)]).strip()
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "salt_jax.cli.compile_child", *sys.argv[1:], *options],
                env={**environment, "XLA_FLAGS": flags},
                stdout=file,
                stderr=file,
            )
            try:
                while child.poll() is None:
                    time.sleep(0.2)
                    if sys.stderr.isatty():
                        bar.refresh()
            finally:
                child.kill()  # a compiler does not hear an interrupt
        output = log.read_text(errors="replace")
        if child.returncode == 2 and last_line(output).startswith("error: "):
            raise UserError(last_line(output).removeprefix("error: "))
        if child.returncode or not result.exists():
            code = child.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return {
                "problem": f"does not compile: its process ended with {how}: {last_line(output)}"
            }
        return json.loads(result.read_text())


def sentence(row: Json, target: str) -> str:
    """The problem of a program, and its largest buffers."""
    buffers = ", ".join(str(Buffer(**buffer)) for buffer in row.get("largest", ()))
    return f"{row['program']} for {target} {row['problem']}" + (
        f"; largest: {buffers}" if buffers else ""
    )


def show(rows: list[Json]) -> str:
    """The table."""
    head = "".join(f"{name:>11}" for name in ("compile s", *COLUMNS, "of device", "code MiB"))
    lines = [f"{'GiB a device':36}{head}"]
    for row in rows:
        if "peak_bytes" not in row:
            lines.append(f"{row['program']:36}{'does not compile':>22}")
            continue
        numbers = [row.get("compile_seconds"), *(row.get(f"{name}_bytes") for name in COLUMNS)]
        numbers[1:] = [size if size is None else size / GIB for size in numbers[1:]]
        cells = "".join(f"{'-':>11}" if n is None else f"{n:11.2f}" for n in numbers)
        share = f"{row['share']:11.1%}" if row["share"] else f"{'-':>11}"
        code = f"{row['code_bytes'] / 2**20:11.2f}" if row.get("code_bytes") else f"{'-':>11}"
        lines += [
            f"{row['program']:36}{cells}{share}{code}",
            *(f"  {line}" for line in details(row)),
        ]
    return "\n".join(lines)


def details(row: Json) -> list[str]:
    """Kernels, collectives and loops of a program that compiled."""
    if "kernels" not in row:
        return []
    kernels = ", ".join(f"{count} x {name}" for name, count in row["kernels"].items())
    lines = [f"attention kernels: {kernels or 'none'}; peak is {row['peak_is']}"]
    for kind, moved in row["collectives"].items():
        counts = f"{moved['calls']} in the program, {moved['runs']} in a run"
        lines.append(f"{kind}: {counts}, {moved['bytes'] / GIB:.3f} GiB sent by a device")
    if row["open_loops"] and row["collectives"]:
        lines.append(f"{row['open_loops']} loops of unknown length count once")
    return lines


def tell(rows: list[Json], target: str, file: str | None) -> int:
    """Prints the table and the problems, writes all figures; returns the exit code."""
    print(show(rows))
    if file:
        found = {"target": target, "programs": rows}
        figures = made_with("launch.compile", PACKAGES) | found
        write_whole(as_path(file), json.dumps(figures, indent=2))
    wrong = [row for row in rows if row["problem"]]
    for row in wrong:
        print(f"error: {sentence(row, target)}", file=sys.stderr)
    return 1 if wrong else 0
