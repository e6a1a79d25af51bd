"""From numbers to tables, plots and the report of an evaluated student of Wan 2.1."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from salt_jax.evaluate.report import Plot, Report, Table, VideoRow, curves
from salt_jax.evaluate.shapes_summary import LOOKS, defect_plot, defect_tables, four
from salt_jax.evaluate.wan_suite import VideoNumbers
from salt_jax.models.latent_size import FPS

Evaluation = Mapping[str, Any]
"""What evaluation.json holds: `student` by solver, see `wan_suite`; `long` by memory, each a
`VideoNumbers`; and texts about all of it.
"""


def video_rows(numbers: Evaluation) -> Iterator[tuple[list[str], VideoNumbers]]:
    """What clips were made with, as words of a table, and what was measured of them."""
    for solver, result in numbers["student"].items():
        for k, videos in result["videos"].items():
            yield [str(k), solver], videos
    for memory, videos in numbers["long"].items():
        yield ["long", memory], videos


def video_table(numbers: Evaluation) -> Table:
    """A row for each number of steps and solver, and for each memory of long videos."""
    rows = []
    for head, found in video_rows(numbers):
        still = found["motion"]
        ends = found["looks"][:1] + found["looks"][-1:]
        changes = [" -> ".join(f"{end[name]:.3f}" for end in ends) or "-" for name in LOOKS]
        moves = [*four([still["latents"]]), f"{still['pixels']:.4f}" if "pixels" in still else "-"]
        rows.append([*head, *moves, *four(found["drift"][-1:]), *changes])
    header = ["steps", "solver", "motion, latents", "motion, pixels", "drift, last chunk", *LOOKS]
    explanation = (
        "Means over the prompts. motion: mean absolute difference of neighbouring frames. drift: "
        "statistics of the last chunk's latents against the first one's, in the first one's "
        "variance. Looks of the pixels from the first chunk to the last. Long videos are named by "
        "their memory."
    )
    return Table("Videos", header, rows, explanation)


def tables(numbers: Evaluation) -> list[Table]:
    student = numbers["student"]
    found = [video_table(numbers), *defect_tables({s: r["defect"] for s, r in student.items()})]
    cross = [
        [f"{solver}, {kind}", *four(distances.values())]
        for solver, result in student.items()
        for kind, distances in result["cross_step"].items()
    ]
    if cross:
        first = next(iter(student.values()))["cross_step"]["latents"]
        explanation = "Mean squared difference of clips from the same noise; pixels in [0, 1]."
        found.append(Table("Cross-step distance", ["solver", *first], cross, explanation))
    return found


def make_report(
    numbers: Evaluation, prompts: Sequence[str], shown: Sequence[Mapping[int, np.ndarray]]
) -> Report:
    """The report of one run; `shown` has clips of the first prompts by number of steps, uint8
    [T, H, W, 3].
    """
    videos = [
        VideoRow(prompt, [(f"{k} steps", clip) for k, clip in clips.items()])
        for prompt, clips in zip(prompts, shown, strict=False)
    ]
    plots = [defect_plot({s: r["defect"] for s, r in numbers["student"].items()})]
    lines = {
        ", ".join(head): (range(1, len(found["drift"]) + 1), found["drift"])
        for head, found in video_rows(numbers)
        if len(found["drift"]) > 1
    }
    if lines:
        explanation = "A flat line is no drift."
        plots.append(Plot("Drift by chunk", curves(lines, "chunk", "drift"), explanation))
    about = {name: value for name, value in numbers.items() if isinstance(value, str)}
    return Report("A student of Wan 2.1", about, videos, tables(numbers), plots, FPS)
