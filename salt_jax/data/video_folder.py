"""A user's videos, captions and prompts as they lie in files: found, decoded, resampled in time, resized.

A file that is no use has a reason and never stops the others; what is wrong with the request is a UserError.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from salt_jax.errors import UserError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
FILE_COLUMNS = ("file", "path", "file_name", "video")  # the first one a table has counts
CAPTION_COLUMNS = ("caption", "text", "prompt")

T = TypeVar("T")


class Video(NamedTuple):
    """A video that was asked for. `problem` says why it cannot be used; "" if nothing is known against it."""

    name: str  # as the user names it: the path inside the folder
    file: Path
    caption: str
    problem: str


def find_videos(folder: str | Path, captions: str | Path | None) -> list[Video]:
    """Every video under `folder` with its caption, in a fixed order; hidden files are not looked at.

    `captions` is a .csv or .jsonl with a column of paths, relative to the folder, and one of captions; a video may
    have several rows. Without it the caption of a.mp4 stands in a.txt beside it.

    Raises:
      UserError: there is no such folder, nothing in it can be used, or the table is unreadable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the videos")
    shown = lambda path: not any(part.startswith(".") for part in path.relative_to(folder).parts)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and shown(f))
    videos = _from_table(folder, files, Path(captions)) if captions else [_beside(folder, f) for f in files]
    if all(video.problem for video in videos):
        first = f" ({videos[0].name}: {videos[0].problem})" if videos else ""
        raise UserError(
            f"{folder} has no video with a caption{first}; it needs files ending in {', '.join(SUFFIXES)}, "
            "each with a .txt of the same name beside it or a row in a table of captions"
        )
    return videos


def read_prompts(file: str | Path) -> list[str]:
    """Prompts from a .txt with one a line, or from a .csv or .jsonl with a column of them. Blank ones are left out.

    Raises:
      UserError: the file is unreadable, not UTF-8, or has no prompt.
    """
    file = Path(file)
    if file.suffix.lower() in (".csv", ".jsonl"):
        rows = _read_table(file)
        column = _column(rows, CAPTION_COLUMNS, file)
        lines = [str(row.get(column) or "") for row in rows]
    else:
        lines = _read_text(file).split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            f"{file} has no prompt; write one per line, or a .csv or .jsonl with a column 'prompt'"
        )
    return prompts


def read_clip(file: str | Path, max_frames: int, height: int, width: int, fps: int) -> np.ndarray:
    """The beginning of a video: its longest 4k + 1 frames up to `max_frames`, uint8 [T, height, width, 3].

    Frames are those nearest in time, by their timestamps, to 0, 1/fps, 2/fps, ... after the first one. Pictures are
    turned as the file's rotation says, and `fit_picture` sees to the size.

    Raises:
      ValueError: the reason why this file cannot be used.
    """
    frames = []
    for frame, pixel_aspect in resample(_decode(file), fps):
        frames.append(_upright(frame, pixel_aspect, height, width))
        if len(frames) == max_frames:
            break
    if not frames:
        raise ValueError("it has no frame")
    return np.stack(frames[: (len(frames) - 1) // 4 * 4 + 1])


def resample(frames: Iterable[tuple[Fraction, Fraction, T]], fps: int) -> Iterator[T]:
    """From (time, duration, frame) in order of time, the frame nearest to each of start + i/fps, the earlier of two.

    The last one is shown for its duration, or, where that is not known (0), for as long as the one before.
    Frames whose time does not grow are left out.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        return
    (start, duration, held), gap, count = first, Fraction(1, fps), 0
    before = start
    for time, shown, frame in frames:
        if time <= before:
            continue
        while 2 * (start + Fraction(count, fps)) <= before + time:
            yield held
            count += 1
        before, gap, duration, held = time, time - before, shown, frame
    while start + Fraction(count, fps) < before + (duration or gap):
        yield held
        count += 1


def fit_picture(picture: np.ndarray, height: int, width: int, pixel_aspect: Fraction) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3]: scaled with its aspect kept until it covers, the middle cut out.

    One antialiased bicubic resize (PIL) of the middle, so no row is lost to rounding. `pixel_aspect` is the width of
    a stored pixel over its height.
    """
    h, w = picture.shape[:2]
    scale = min(w * pixel_aspect / width, Fraction(h, height))  # of the wanted pixels, in stored rows
    cut_w, cut_h = float(width * scale / pixel_aspect), float(height * scale)
    left, top = (w - cut_w) / 2, (h - cut_h) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + cut_w, w), min(top + cut_h, h))
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def _decode(file: str | Path) -> Iterator[tuple[Fraction, Fraction, tuple[av.VideoFrame, Fraction]]]:
    """(time, duration, (frame, width of a pixel over its height)) of the first video stream.

    Raises ValueError with the reason where it cannot go on.
    """
    count = 0
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise ValueError(f"it is damaged after {count} frames")
                if frame.pts is None or frame.time_base is None:
                    raise ValueError(f"frame {count} has no timestamp")
                yield frame.pts * frame.time_base, frame.duration * frame.time_base, (frame, aspect)
                count += 1
    except (FFmpegError, OSError) as error:
        told = getattr(error, "strerror", None) or error
        raise ValueError(f"it cannot be decoded after {count} frames ({told})") from error


def _upright(frame: av.VideoFrame, pixel_aspect: Fraction, height: int, width: int) -> np.ndarray:
    """A frame as it is meant to be seen, in the wanted size."""
    quarters = round(frame.rotation / 90)  # counter-clockwise
    if abs(frame.rotation - 90 * quarters) > 1:  # the matrix of the file is rounded
        raise ValueError(f"it is to be turned by {frame.rotation} degrees, which is no multiple of 90")
    picture = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
    return fit_picture(picture, height, width, 1 / pixel_aspect if quarters % 2 else pixel_aspect)


def _beside(folder: Path, file: Path) -> Video:
    """A video whose caption stands in a .txt of the same name."""
    name, text = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
    try:
        caption = text.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return Video(name, file, "", f"no caption: there is no {text.name} beside it")
    except (OSError, UnicodeDecodeError) as error:
        return Video(name, file, "", f"{text.name} cannot be read as UTF-8 ({error})")
    return Video(name, file, caption, "" if caption else f"no caption: {text.name} is empty")


def _from_table(folder: Path, files: Sequence[Path], table: Path) -> list[Video]:
    """The videos that a table lists, then those under the folder that it does not list."""
    rows = _read_table(table)
    file_column, caption_column = (_column(rows, names, table) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
    videos, listed = [], set()
    for number, row in enumerate(rows, 1):
        name, caption = (str(row.get(column) or "").strip() for column in (file_column, caption_column))
        file = folder / name
        problem = ""
        if not name:
            name, problem = f"row {number} of {table.name}", f"its '{file_column}' is empty"
        elif not file.is_file():
            problem = f"{file} does not exist"
        elif not caption:
            problem = f"no caption: its '{caption_column}' in {table.name} is empty"
        videos.append(Video(name, file, caption, problem))
        listed.add(file.resolve())
    rest = [file for file in files if file.resolve() not in listed]
    unlisted = [
        Video(f.relative_to(folder).as_posix(), f, "", f"no caption: not in {table.name}") for f in rest
    ]
    return videos + unlisted


def _read_table(file: Path) -> list[dict[str, Any]]:
    """The rows of a .csv with a header, or of a .jsonl."""
    text = _read_text(file)
    if file.suffix.lower() == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"{file} cannot be read as csv ({error}); save it as .jsonl") from error
    if file.suffix.lower() != ".jsonl":
        raise UserError(f"{file} is no table of captions; its name must end in .csv or .jsonl")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise UserError(
                f"line {number} of {file} is not JSON ({error.msg}); mend or delete it"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f'line {number} of {file} is no JSON object; write {{"file": ..., "caption": ...}}'
            )
        rows += [row] if row else []
    return rows


def _column(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> str:
    found = {key for row in rows for key in row if key}
    for name in names:
        if name in found:
            return name
    raise UserError(f"{file} has the columns {sorted(found)}; one must be called {' or '.join(names)}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); check its name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
