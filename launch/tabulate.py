"""python -m launch.tabulate --dir=DIR

Prints every DIR/**/SEED/evaluation.json as Markdown tables, one row per run, mean and range over
seeds. Where DIR holds the sweep, draws its defect over training length in DIR/defect_lambda.png and
DIR/defect_stop.png.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
from absl import flags

from salt_jax.cli.app import run_main
from salt_jax.errors import UserError
from salt_jax.evaluate.report import curves
from salt_jax.io.files import write_whole
from salt_jax.keys import Json

DIR = flags.DEFINE_string("dir", None, "where launch/results.sh worked", required=True)
SCORES = ("all", "shape", "direction", "clean", "coverage_ratio", "off_grid", "sharpness", "motion")
LOOKS = ("saturation", "contrast", "brightness")
Read = Callable[[Json], Iterable[float]]  # a result -> its row's numbers


def cell(values: list[float], digits: int) -> str:
    """Mean, and half the range where there are several seeds."""
    spread = (max(values) - min(values)) / 2
    return f"{np.mean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def row(name: str, runs: Sequence[Json], read: Read, digits: int) -> str:
    columns = zip(*(read(run) for run in runs), strict=True)
    return (
        f"| {name} | {len(runs)} | "
        + " | ".join(cell(list(column), digits) for column in columns)
        + " |"
    )


def table(
    title: str,
    columns: Sequence[str],
    groups: Mapping[str, Sequence[Json]],
    read: Read,
    digits: int = 3,
) -> str:
    head = f"| run | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}"
    return "\n".join(
        (f"\n{title}\n", head, *(row(name, runs, read, digits) for name, runs in groups.items()))
    )


def defect_over_length(groups: dict[str, list[Json]], kind: str) -> dict[str, tuple]:
    """Per variant of the sweep: numbers of student updates, and the defect on the Euler path after
    each.
    """
    lines = defaultdict(list)
    for group, runs in groups.items():
        sweep, length, name = ("//" + group).split("/")[-3:]
        if sweep == "sweep" and name.startswith(kind):
            lines[name].append(
                (int(length), np.mean([r["student"]["euler"]["defect"]["mean"] for r in runs]))
            )
    # the legend reads as the plot does
    from_top = sorted(lines.items(), key=lambda line: -max(line[1])[1])
    return {name: tuple(zip(*sorted(points), strict=True)) for name, points in from_top}


def long_rows(groups: dict[str, list[Json]]) -> dict[str, list[Json]]:
    """Name of the run and cache policy -> the long videos of all its seeds."""
    rows = defaultdict(list)
    for name, runs in groups.items():
        for run in runs:
            for policy, result in run.get("long", {}).items():
                rows[f"{name}, memory {policy}"].append(result)
    return rows


def print_students(groups: dict[str, list[Json]], solver: str) -> None:
    """Scores by number of steps, then defect and distances, of the runs measured under one
    solver.
    """
    groups = {
        name: runs for name, runs in groups.items() if all(solver in run["student"] for run in runs)
    }
    if not groups:
        return
    students = {name: [run["student"][solver] for run in runs] for name, runs in groups.items()}
    first = next(iter(students.values()))[0]
    for k in first["score"]:
        scores = {name: [s["score"][k] for s in found] for name, found in students.items()}
        print(table(f"Shapes score, {k} steps, {solver}", SCORES, scores, itemgetter(*SCORES)))
    columns = (
        "defect",
        *(f"interval {i}" for i in (1, 2, 3, 4)),
        *(f"distance {p}" for p in first["cross_step"]),
    )
    title = f"Semigroup defect and cross-step distance, {solver}"
    print(table(title, columns, students, defect_and_distances, 4))


def defect_and_distances(student: Json) -> list[float]:
    defect = student["defect"]
    return [defect["mean"], *defect["per_interval"], *student["cross_step"].values()]


def print_long(groups: dict[str, list[Json]]) -> None:
    """How long videos hold: one column for each segment of a training clip, then the looks of both
    ends.
    """
    rows = long_rows(groups)
    if not rows:
        return
    segments = range(1, 1 + len(next(iter(rows.values()))[0]["segments"]))
    for name in ("all", "clean", "sharpness", "motion"):
        read = lambda result, name=name: [segment[name] for segment in result["segments"]]
        print(table(f"Long videos, {name}", [f"segment {i}" for i in segments], rows, read))
    columns = [f"{name}, {end} chunk" for name in LOOKS for end in ("first", "last")]
    print(table("Long videos, drift", columns, rows, looks_of_both_ends))


def looks_of_both_ends(result: Json) -> list[float]:
    return [result["looks"][i][name] for name in LOOKS for i in (0, -1)]


def main(_):
    root, groups = Path(DIR.value), defaultdict(list)
    for file in sorted(root.glob("**/evaluation.json")):
        groups[str(file.parent.parent.relative_to(root))].append(json.loads(file.read_text()))
    if not groups:
        raise UserError(
            f"no evaluation.json below {root}; run launch/results.sh first, or check --dir"
        )
    for solver in ("euler", "cm"):
        print_students(groups, solver)
    print_long(groups)
    for kind in ("lambda", "stop"):
        if lines := defect_over_length(groups, kind):
            write_whole(
                root / f"defect_{kind}.png", curves(lines, "student updates", "semigroup defect")
            )


if __name__ == "__main__":
    run_main(main)
