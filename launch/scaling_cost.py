"""python -m launch.scaling_cost [--dir=docs/scaling] [--only=TEXT]

What an iteration costs on 8 to 1,024 devices: compiles the programs whose files are not in DIR yet,
then writes the second tables of docs/scaling.md and assets/scaling.png from the files. An iteration
is an update of the student and `critic_ratio` of the critic, in the mean of a run's draws. See
launch/scaling.sh.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launch import scaling
from launch.scaling import DIR, DOCUMENT, ONLY, STEPS, Row, compile_row, recipe_of, with_tables
from salt_jax.cli.app import run_main
from salt_jax.compile.target import GIB, read_target
from salt_jax.compile.traffic import seconds
from salt_jax.evaluate.report import curves
from salt_jax.io.files import write_whole
from salt_jax.keys import Json
from salt_jax.models.attention import is_flash
from salt_jax.planning.flops import update_flops
from salt_jax.planning.updates import ITERATIONS, update_name
from salt_jax.rollout.draws import as_reference
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel

MARK = "<!-- costs: launch/scaling.sh writes them -->"
PLOT = Path("assets/scaling.png")
MFU = 0.4  # the share of a device's best rate that products are assumed to reach
AXES = ("data", "fsdp", "context", "tensor")


def row(name: str, config: str, target: str, clips: int, *sizes: int) -> Row:
    """`sizes` of data, fsdp, context and tensor."""
    mesh = tuple(f"--config.mesh.{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
    return Row(name, config, target, clips, None, (STEPS, *mesh))


SF, SC = "self_forcing.py:wan,salt,paper", "sc_dmd.py:wan"
BEFORE = {row.name: row for row in scaling.ROWS}  # those of the first tables
# line of the plot -> its rows, by devices
LINES = {
    "Self Forcing, 64 clips": (
        BEFORE["self_forcing_8h100"],
        row("cost_sf_64", SF, "gpu:h100:8x8", 64, 8, 8, 1, 1),
        row("cost_sf_256", SF, "gpu:h100:32x8", 64, 32, 2, 4, 1),
        row("cost_sf_512", SF, "gpu:h100:64x8", 64, 64, 1, 4, 2),
        row("cost_sf_1024", SF, "gpu:h100:128x8", 64, 64, 1, 4, 4),
    ),
    "SC-DMD, 16 clips": (
        row("cost_sc_16", SC, "gpu:h100:2x8", 16, 2, 8, 1, 1),
        row("cost_sc_64", SC, "gpu:h100:8x8", 16, 16, 1, 4, 1),
        row("cost_sc_128", SC, "gpu:h100:16x8", 16, 16, 1, 4, 2),
        row("cost_sc_256", SC, "gpu:h100:32x8", 16, 16, 1, 4, 4),
        row("cost_sc_512", SC, "gpu:h100:64x8", 16, 16, 1, 8, 4),
    ),
    "SC-DMD, v5p": (
        row("cost_sc_v5p_16", SC, "tpu:v5p:2x2x4", 16, 1, 16, 1, 1),
        row("cost_sc_v5p_64", SC, "tpu:v5p:4x4x4", 16, 1, 16, 4, 1),
    ),
    "I2V 14B, v5p": (BEFORE["i2v_v5p_64"],),
}
# a clip a device for 1,024, adapters alone, and the same devices as another mesh
OTHERS = (
    row("cost_lora_64", "longlive.py:wan,lora", "gpu:h100:8x8", 64, 8, 8, 1, 1),
    row("cost_sc_1024_clips", SC, "gpu:h100:128x8", 1024, 128, 8, 1, 1),
    row("cost_sf_1024_context", SF, "gpu:h100:128x8", 64, 64, 1, 8, 2),
    row("cost_sc_256_context", SC, "gpu:h100:32x8", 16, 16, 1, 8, 2),
)
ROWS = (*(row for rows in LINES.values() for row in rows), *OTHERS)


class Cost(NamedTuple):
    """Of an iteration, on each device."""

    flops: float  # of its products
    computing: float  # seconds of them
    sent: dict[str, float]  # bytes by axes of the mesh
    kinds: dict[str, float]  # the same bytes by kind of collective
    sending: float  # seconds, if nothing else is sent at the time


@functools.cache
def turns_of(row: Row) -> dict[str, tuple[float, float]]:
    """Program -> how often it runs in an iteration, and the turns of its loops of unknown length,
    those over the steps of a rollout: means of a run's draws, with cache alignment.
    """
    stage = make_stage(recipe_of(row))
    times, turns = Counter[str](), defaultdict[str, float](float)
    for i in range(ITERATIONS):
        for update, draw in stage.updates(stage.recipe.iterations + i):
            name = update_name(update)
            times[name] += 1
            if draw is not None:
                drawn = [draw]
                if update.terms.alignment:
                    drawn.append(as_reference(draw, stage.recipe))
                turns[name] += sum(int(d.exit_step) + 1 for d in drawn) / len(drawn)
    return {name: (n / ITERATIONS, turns[name] / n) for name, n in times.items()}


def sent_by(row: Row, file: Json, axes: bool) -> dict[str, float]:
    """Bytes that one device sends in an iteration, by axes of the mesh or by kind of collective."""
    turns, sent = turns_of(row), defaultdict[str, float](float)
    for program in file["programs"]:
        times, length = turns.get(program["program"], (0.0, 0.0))
        for kind, moved in program["collectives"].items():
            for along, size in moved["over"].items():
                size += moved["open"].get(along, 0) * (length - 1)
                sent[along if axes else kind] += times * size
    return dict(sent)


def cost(row: Row, file: Json) -> Cost:
    """From the programs that were compiled, the closed forms of launch.plan for products, and rates
    that vendors name.
    """
    recipe, target = recipe_of(row), read_target(row.target)
    stage = make_stage(recipe)
    flash = is_flash(attention_kernel(recipe, recipe.wan, target.platform))
    flops = {
        who: sum(update_flops(recipe, stage.mean_passes(who), flash).values())
        for who in stage.learners
    }
    each = sum(flops[update.moves] for update, _ in stage.updates(0)) / target.devices
    chip, sent = target.described, sent_by(row, file, axes=True)
    assert chip
    sending = seconds(target, file["programs"][0]["mesh"], sent)
    return Cost(each, each / (chip.flops * MFU), sent, sent_by(row, file, axes=False), sending)


HEAD = (
    *("recipe", "devices", "data x fsdp x context x tensor", "clips", "of device"),
    *("PFLOP a device", "sent along each, GiB"),
    *("computing s", "sending s", "iteration s", "computing"),
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def cells(row: Row, file: Json) -> list[str]:
    """A line of the first table."""
    found, programs = cost(row, file), file["programs"]
    mesh, most = programs[0]["mesh"], max(p["share"] for p in programs)
    sent = " + ".join(
        f"{size / GIB:.1f} {axes}" for axes, size in found.sent.items() if size > 0.05 * GIB
    )
    least, in_turn = max(found.computing, found.sending), found.computing + found.sending
    return [
        row.config,
        f"{read_target(row.target).devices} {row.target.split(':')[1]}",
        " x ".join(str(mesh[axis]) for axis in AXES),
        str(row.clips),
        f"{most:.0%}",
        f"{found.flops / 1e15:.2f}",
        sent,
        f"{found.computing:.2f}",
        f"{found.sending:.2f}",
        f"{least:.2f} to {in_turn:.2f}",
        f"{found.computing / in_turn:.0%}",
    ]


def kind_cells(row: Row, file: Json) -> list[str]:
    """A line of the second table."""
    kinds = cost(row, file).kinds
    link = f"[{row.name}](scaling/{row.name}.json)"
    sent = [f"{kinds.get(kind, 0) / GIB:.2f}" for kind in KINDS]
    return [link, *sent, file["commit"], f"`{' '.join(row.command)}`"]


def table(head: tuple[str, ...], lines: list[list[str]]) -> str:
    """As Markdown."""
    rows = (f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))
    return "\n".join(rows)


def document(found: Mapping[str, Json]) -> str:
    """Both tables. `found`: what files say, by the name of their row."""
    there = [row for row in ROWS if row.name in found]
    absent = [row.name for row in ROWS if row.name not in found]
    told = table(HEAD, [cells(row, found[row.name]) for row in there])
    told += f"\n\nNot compiled yet: {', '.join(absent)}." if absent else ""
    head = ("file", *KINDS, "commit", "command")
    return f"{told}\n\n{table(head, [kind_cells(row, found[row.name]) for row in there])}"


def plot(found: Mapping[str, Json]) -> bytes:
    """A PNG: how much of an iteration is computing, over devices."""
    lines = {}
    for name, rows in LINES.items():
        points = []
        for row in rows:
            if row.name in found:
                c = cost(row, found[row.name])
                share = 100 * c.computing / (c.computing + c.sending)
                points.append((float(read_target(row.target).devices), share))
        if points:
            lines[name] = tuple(zip(*points, strict=True))
    return curves(lines, "devices", "computing, % of an iteration", octaves=True)


def read_files(folder: Path) -> dict[str, Json]:
    """What is there, by the name of its row. Older files do not say along which axes; programs that
    did not compile say nothing.
    """
    files = {row.name: folder / f"{row.name}.json" for row in ROWS}
    read = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    return {name: file for name, file in read.items() if _tells_axes(file)}


def _tells_axes(file: Json) -> bool:
    found = [p.get("collectives") for p in file["programs"]]
    return all(kinds and all("over" in m for m in kinds.values()) for kinds in found)


def main(_):
    folder = Path(DIR.value)
    for row in ROWS:
        file = folder / f"{row.name}.json"
        if not file.exists() and ONLY.value in row.name:
            compile_row(row, file)
    found = read_files(folder)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), document(found), MARK))
    write_whole(PLOT, plot(found))


if __name__ == "__main__":
    run_main(main)
