"""One HTML file that shows a run: what it is, its videos side by side, its numbers, its plots.

The file stands alone: videos and pictures are inside it, and its content policy forbids the browser
to load anything else. It knows nothing of training; the caller brings strings, clips and pictures.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from salt_jax.io.files import AnyPath, write_whole
from salt_jax.io.video import encode_mp4, visible_scale

CLIP_PIXELS = 144  # small clips are enlarged up to this height
PALETTE = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#64748b")
Values = Sequence[float] | np.ndarray
GREY = "#808080"  # legible on white and on black: plots have no background


class VideoRow(NamedTuple):
    """Clips to compare, for instance of one prompt and one noise."""

    caption: str
    clips: Sequence[tuple[str, np.ndarray]]  # (label, uint8 [F, H, W, 3])


class Table(NamedTuple):
    """Numbers, already formatted. The first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    explanation: str


class Plot(NamedTuple):
    """A picture, from `bars`, `curves` or elsewhere."""

    title: str
    png: bytes
    explanation: str


@dataclass(frozen=True)
class Report:
    """All that a report shows, in order."""

    title: str
    facts: Mapping[str, str]  # command, commit, hardware, seed, settings
    videos: Sequence[VideoRow]
    tables: Sequence[Table]
    plots: Sequence[Plot]
    fps: int


def write_report(path: AnyPath, report: Report) -> None:
    """Writes the report, whole or not at all."""
    write_whole(path, render(report))


def render(report: Report) -> str:
    """The HTML text. Everything the caller gave is escaped. Sections without content are left out.

    Raises ValueError when a row of a table has more or fewer cells than its header.
    """
    videos = "".join(_videos(row, report.fps) for row in report.videos)
    sections = (
        ("What this run is", _facts(report.facts)),
        ("Videos", videos and SPEED + videos),
        ("Numbers", "".join(map(_table, report.tables))),
        ("Plots", "".join(map(_plot, report.plots))),
    )
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content
    )
    return PAGE.substitute(title=escape(report.title), body=body)


def bars(groups: Sequence[str], series: Mapping[str, Values], ylabel: str) -> bytes:
    """A PNG of grouped bars: one group per name in `groups`, one bar in it per series."""
    figure, axes = _axes(ylabel)
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        axes.bar(x, values, 0.92 * width, label=name, color=PALETTE[i % len(PALETTE)])
    axes.set_xticks(np.arange(len(groups)), groups)
    return _png(figure, axes)


def curves(
    lines: Mapping[str, tuple[Values, Values]], xlabel: str, ylabel: str, octaves: bool = False
) -> bytes:
    """A PNG of lines over x, each given as (x, y).

    `octaves`: x is a few powers of two, each point is shown, and y begins at 0.
    """
    figure, axes = _axes(ylabel)
    for i, (name, (x, y)) in enumerate(lines.items()):
        look = {"label": name, "color": PALETTE[i % len(PALETTE)], "linewidth": 1.6}
        axes.plot(x, y, marker="o" if octaves else "", **look)
    if octaves:
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(xlabel, color=GREY)
    return _png(figure, axes)


def _axes(ylabel: str):
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(ylabel, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    return figure, axes


def _png(figure: Figure, axes) -> bytes:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=4, frameon=False, labelcolor=GREY
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, transparent=True)
    return file.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    return items and f"<dl>{items}</dl>"


def _videos(row: VideoRow, fps: int) -> str:
    figures = ""
    for label, clip in row.clips:
        scale = visible_scale(clip.shape[1], CLIP_PIXELS)
        height, width = scale * clip.shape[1], scale * clip.shape[2]
        source, spoken = (
            _data_url("video/mp4", encode_mp4(clip, fps, scale)),
            escape(f"{label}: {row.caption}"),
        )
        figures += (
            f'<figure><video src="{source}" width="{width}" height="{height}" '
            f'aria-label="{spoken}" autoplay loop muted playsinline></video>'
            f"<figcaption>{escape(label)}</figcaption></figure>"
        )
    return f'<h3>{escape(row.caption)}</h3><div class="clips scroll">{figures}</div>'


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(
                f"table {table.title!r}: row {list(row)} needs one cell for each of "
                f"{list(table.header)}"
            )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = ""
    for first, *rest in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        rows += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    return (
        f"<h3>{escape(table.title)}</h3><p>{escape(table.explanation)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _plot(plot: Plot) -> str:
    return (
        f"<h3>{escape(plot.title)}</h3><p>{escape(plot.explanation)}</p>"
        f'<img src="{_data_url("image/png", plot.png)}" alt="{escape(plot.title)}">'
    )


SPEED = """<p><label>Speed
<select onchange="for (const video of document.querySelectorAll('video')) {
video.currentTime = 0; video.playbackRate = this.value;
this.value > 0 ? video.play() : video.pause() }">
<option value="1">normal</option><option value="0.5">1/2</option><option value="0.25">1/4</option>
<option value="0">paused, first frame</option></select></label></p>"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark;
  --ink: #1c2430; --soft: #5b6675; --line: #dfe3e8; --page: #f5f6f8; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #2c333d; --page: #101419; --card: #181d24 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 0 0 .75rem; font-size: 1.2rem }
h3 { margin: 1.75rem 0 .4rem; font-size: 1rem; overflow-wrap: anywhere }
p { margin: 0 0 .75rem; max-width: 46rem; color: var(--soft) }
section { margin-bottom: 1.25rem; padding: 1.25rem 1.5rem 1.5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .75rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.5rem; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0; font: .9rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
.clips { display: flex; gap: .75rem; padding-bottom: .25rem }
figure { flex: none; margin: 0 }
video { display: block; max-width: 20rem; height: auto; background: #000; border-radius: .2rem;
  image-rendering: pixelated }
figcaption { margin-top: .25rem; font-size: .85rem; color: var(--soft); text-align: center }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .9rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child { padding-left: 0; text-align: left }
thead th { font-weight: 600; color: var(--soft) }
tbody th { font-weight: 500 }
img { display: block; width: 100%; max-width: 46rem; height: auto }
@media (max-width: 40rem) {
  section { padding: 1rem } dl { display: block } dd { margin-bottom: .5rem }
}
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
