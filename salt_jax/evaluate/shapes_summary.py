"""From numbers to tables, plots and the report of one evaluated run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.evaluate.report import Plot, Report, Table, VideoRow, bars, curves
from salt_jax.evaluate.shapes_suite import DriftNumbers, StudentNumbers, Task
from salt_jax.evaluate.suite import DEFECT_STEPS, DefectNumbers
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.latents import to_pixels

SHOWN = (
    "all",
    "shape",
    "colour",
    "direction",
    "clean",
    "coverage_ratio",
    "off_grid",
    "sharpness",
    "flicker",
    "motion",
)
INTERVALS = [f"interval {i + 1}" for i in range(DEFECT_STEPS)]


Evaluation = Mapping[str, Any]
"""What evaluation.json holds: `student` by solver and `long` by memory, see `shapes_suite`, what
`teacher` scores, and texts about all of it.
"""


def score_table(numbers: Evaluation) -> Table:
    """One row per network, number of steps and solver."""
    teacher = numbers["teacher"]
    rows = [["teacher", teacher["num_steps"], "euler", teacher["score"]]] if teacher else []
    for solver, result in numbers["student"].items():
        rows += [["student", k, solver, score] for k, score in result["score"].items()]
    explanation = (
        "Read off the pixels by matching exact renderings. all: everything the caption states, by "
        "a clean object. "
        "coverage_ratio: 1 is no mode dropping. off_grid: no start and speed of the data; lower is "
        "better."
    )
    body = [[*map(str, head), *(f"{score[name]:.3f}" for name in SHOWN)] for *head, score in rows]
    return Table("Shapes score", ["network", "steps", "solver", *SHOWN], body, explanation)


def student_tables(student: Mapping[str, StudentNumbers]) -> list[Table]:
    """Defect, curvature and cross-step distance by solver."""
    cross = [[s, *four(r["cross_step"].values())] for s, r in student.items()]
    pairs = list(next(iter(student.values()))["cross_step"])
    return [
        *defect_tables({s: r["defect"] for s, r in student.items()}),
        Table(
            "Cross-step distance", ["solver", *pairs], cross, "Mean squared difference, same noise."
        ),
    ]


def defect_tables(found: Mapping[str, DefectNumbers]) -> list[Table]:
    """Defect and curvature by solver."""
    defects = [[s, *four([d["mean"], *d["per_interval"]])] for s, d in found.items()]
    bends = [[s, *four(d["curvature"])] for s, d in found.items()]
    return [
        Table(
            "Semigroup defect",
            ["solver", "mean", *INTERVALS],
            defects,
            "Salt Eq. 16 on the student's own path.",
        ),
        Table(
            "Velocity curvature",
            ["solver", *INTERVALS],
            bends,
            "The defect without the factor of the grid.",
        ),
    ]


def defect_plot(found: Mapping[str, DefectNumbers]) -> Plot:
    series = {solver: d["per_interval"] for solver, d in found.items()}
    picture = bars(INTERVALS, series, "defect")
    return Plot("Defect per interval", picture, "From noise (1) to clean (4).")


def four(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


LOOKS = ("saturation", "contrast", "brightness")
SEGMENT = ("all", "shape", "colour", "direction", "clean", "sharpness", "motion")


def long_tables(long: Mapping[str, DriftNumbers]) -> list[Table]:
    """How long videos hold, by memory and segment of one training clip, and how their looks drift
    over the chunks.
    """
    segments = [
        [memory, segment, *(f"{score[name]:.3f}" for name in SEGMENT)]
        for memory, result in long.items()
        for segment, score in _segments(result)
    ]
    ends = {memory: (result["looks"][0], result["looks"][-1]) for memory, result in long.items()}
    drifts = [
        [memory, *(f"{first[name]:.3f} -> {last[name]:.3f}" for name in LOOKS)]
        for memory, (first, last) in ends.items()
    ]
    return [
        Table(
            "Long videos",
            ["memory", "segment", *SEGMENT],
            segments,
            "Longer than in training, in segments of a training clip. Memory is "
            "WINDOW:SINK:POSITIONS in latent "
            "frames; window 0 forgets nothing.",
        ),
        Table(
            "Drift, first to last chunk", ["memory", *LOOKS], drifts, "Means over pixels and clips."
        ),
    ]


def _segments(result: DriftNumbers) -> Iterator[tuple[str, dict[str, float]]]:
    for i, score in enumerate(result["segments"]):
        yield f"{i + 1}", score
    if "whole" in result:
        yield "whole", result["whole"]


def make_report(
    numbers: Evaluation,
    task: Task,
    columns: Sequence[tuple[str, np.ndarray]],
    long: Mapping[str, np.ndarray],
    rows: int,
) -> Report:
    """The report of one run.

    Args:
      columns: (label, latents [N, F, H, W, C]) of networks to show side by side; clip i has the
        same noise in all.
      long: by memory, long videos of the same captions.
      rows: how many captions to show, spread evenly.
    """
    scenes = shapes.scenes(task.world)
    columns = [*columns, *((f"{memory}, {v.shape[1]} frames", v) for memory, v in long.items())]
    videos = [
        VideoRow(
            shapes.caption(scenes[task.scene[i]]),
            [(label, to_pixels(clips[i], task.world)) for label, clips in columns],
        )
        for i in np.linspace(0, len(task.scene) - 1, rows).astype(int)
    ]
    tables, plots, student = [score_table(numbers)], [], numbers["student"]
    if student:
        tables += student_tables(student)
        plots = [defect_plot({solver: result["defect"] for solver, result in student.items()})]
    if numbers["long"]:
        tables += long_tables(numbers["long"])
        count = len(next(iter(numbers["long"].values()))["looks"])
        lines = {
            m: (range(1, count + 1), [x["saturation"] for x in r["looks"]])
            for m, r in numbers["long"].items()
        }
        explanation = "A flat line is no drift. Lines are memories, WINDOW:SINK:POSITIONS."
        plots.append(Plot("Saturation by chunk", curves(lines, "chunk", "saturation"), explanation))
    errors = numbers["teacher"].get("velocity_error")
    if errors:
        row = [f"{e:.4f}" for e in errors.values()]
        tables.append(
            Table(
                "Teacher's velocity error",
                list(errors),
                [row],
                "Against the closed form, by noise level.",
            )
        )
    about = {name: value for name, value in numbers.items() if isinstance(value, str)}
    return Report("Moving Shapes: student beside teacher", about, videos, tables, plots, shapes.FPS)
