"""The section of docs/results.md that launch.measure makes of its file."""

from collections.abc import Iterator

from salt_jax.keys import Json

GB = 1e9


def document(found: Json) -> str:
    """Everything that was measured as tables, and the sentences of what was not."""
    parts = {part["name"]: part for part in found["parts"]}
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"## Measured on {found['device']}",
        "",
        f"`{' '.join(found['command'])}` at {found['commit']}: {found['device']}, "
        f"{found['memory_bytes'] / GB:.1f} GB, {versions}. Random weights, "
        f"`configs/{found['config']}`. TFLOP are counted, seconds are medians; `of matmul` is the "
        "share of what one product of two matrices reaches in the same process.",
    ]
    for title, table in (
        ("Attention", attention(parts)),
        ("Updates", updates(parts, found["chosen"])),
        ("Streaming", streaming(parts)),
        ("Beside diffusers", peer(parts)),
    ):
        rows = list(table)
        lines += ["", f"### {title}", "", *rows] if rows[2:] else []
    failed = [
        f"- {name}: {part['problem']} (`{' '.join(part['command'])}`)"
        for name, part in parts.items()
        if part["problem"]
    ]
    failed += [] if found["chosen"] else ["- updates: no choice of teacher fits this device"]
    return "\n".join(lines + (["", "### Not measured", "", *failed] if failed else [])) + "\n"


def results(part: Json | None, *but: str) -> list[Json]:
    """The rows of a part of launch.bench, without those of these names; none where it failed."""
    rows = part["found"]["results"] if part and part["found"] else []
    return [row for row in rows if row["part"] not in but]


def head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def size(count: int | float | None) -> str:
    """Bytes as a cell."""
    return "-" if count is None else f"{count / GB:.3g}"


def attention(parts: dict[str, Json]) -> Iterator[str]:
    """One row for each kernel, shape and direction."""
    yield from head("kernel, queries x keys", "ms", "TFLOP/s", "of matmul", "temporaries etc., GB")
    for name, part in parts.items():
        if name.startswith("attention_"):
            for row in results(part, "matmul"):
                yield line(row["part"], f"{1e3 * row['seconds']:.4g}", *rates(row))


def rates(row: Json) -> tuple[str, ...]:
    """TFLOP/s, the share of the matrix product's, and XLA's bytes."""
    return f"{row['tflops_per_second']:.4g}", f"{row['of_matmul']:.0%}", size(row["xla_bytes"])


def updates(parts: dict[str, Json], chosen: Json | None) -> Iterator[str]:
    """Time of each update; memory as measured in its process, and as three accounts say.

    A process that times several programs has one peak, that of the largest.
    """
    yield from head(
        *("update", "s", "TFLOP/s", "of matmul", "XLA, GB", "measured peak, GB"),
        *("launch.compile, GB", "launch.plan, GB"),
    )
    compiled = parts.get("compile", {}).get("found") or {"programs": []}
    peaks = {p["program"]: p.get("peak_bytes") for p in compiled["programs"]}
    rows = [
        (name, row)
        for name in ("critic_step", "student_step")
        for row in results(parts.get(name), "matmul")
    ]
    for name, row in rows:
        measured, planned = parts[name]["found"]["peak_bytes"], (chosen or {})["planned_bytes"]
        accounts = map(size, (measured, peaks.get(row["part"]), planned))
        yield line(row["part"], f"{row['seconds']:.4g}", *rates(row), *accounts)
    if chosen and rows:
        yield f"\nWith {chosen['name']}, the first choice that fits by launch.plan's account."


def streaming(parts: dict[str, Json]) -> Iterator[str]:
    """Frames a second, what a viewer waits for, and where the time goes."""
    yield from head("streaming", "value")
    for row in results(parts.get("streaming"), "matmul"):
        if row["part"] == "text encoder":
            yield line("text encoder, once a prompt, s", f"{row['seconds']:.4g}")
        for name, value in row["more"].items():
            unit = ", s" if name.endswith("_seconds") else ""
            shown = name.removesuffix("_seconds").replace("_", " ") + unit
            yield line(shown, f"{value:.4g}")


def peer(parts: dict[str, Json]) -> Iterator[str]:
    """Ours beside theirs, in turns."""
    yield from head("part", "who", "median, s", "of the peer's time", "quartiles")
    for row in results(parts.get("peer")):
        for who, taken in row["seconds"].items():
            middle = sorted(taken)[len(taken) // 2]
            told = row["ratios"].get(who) or {"": None}
            for to, spread in told.items():
                ratio = f"{spread[1]:.2f} of {to}" if spread else "-"
                quartiles = f"{spread[0]:.2f} to {spread[2]:.2f}" if spread else "-"
                yield line(row["part"], who, f"{middle:.4g}", ratio, quartiles)
