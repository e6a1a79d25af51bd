"""A folder of a user's videos and their captions: what is asked for, found before anything is
decoded.

A source that is no use has a reason and never stops the others; what is wrong with the request is a
UserError.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from salt_jax.data.text_lists import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    cell,
    clean,
    find_column,
    read_table,
    read_text,
)
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, below, in_bucket, real

SUFFIXES = tuple(
    ".mp4 .m4v .mov .mkv .webm .avi .gif .ts .mts .m2ts .wmv .asf .flv .f4v .mpg .mpeg .m2v .vob "
    ".3gp .3g2 .ogv .ogg "
    ".mxf .dv .rm .rmvb .divx .qt .h264 .264 .hevc .h265 .265 .y4m .ivf .nut .apng".split()
)
ABOUT = (
    ".txt",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".srt",
    ".vtt",
    ".ass",
    ".nfo",
    ".md",
    ".xml",
    ".yaml",
)


class Video(NamedTuple):
    """A video that was asked for.

    `problem` says why it cannot be used; "" if nothing is known against it.
    """

    name: str  # as the user names it: the path inside the folder
    file: AnyPath
    caption: str
    problem: str
    switch: str = ""  # of a prompt, the one to which its video changes


def find_videos(folder: str | AnyPath, captions: str | AnyPath | None) -> list[Video]:
    """Every source under `folder` with its caption, in a fixed order; hidden files are not looked
    at.

    Sources are all files with a video's suffix; with a table also whatever it names; without one
    also whatever else has a caption beside it where no video has that name, and captions that stand
    alone.

    `captions` is a table with a column of paths, relative to the folder, and one of captions; a
    video may have several rows. Without it the caption of a.mp4 stands in a.txt beside it.

    Raises:
      UserError: there is no such folder, nothing in it can be used, or the table is unreadable.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the videos")
    files, unread = _walk(folder)
    videos = unread + (
        _from_table(folder, files, as_path(captions)) if captions else _beside(folder, files)
    )
    if all(video.problem for video in videos):
        first = f" ({videos[0].name}: {videos[0].problem})" if videos else ""
        raise UserError(
            f"{folder} has no video with a caption{first}; it needs files ending in "
            f"{', '.join(SUFFIXES[:8])} or the like, each with a .txt "
            "of the same name beside it or a row in a table of captions"
        )
    return videos


def _walk(folder: AnyPath) -> tuple[list[AnyPath], list[Video]]:
    """What lies under the folder, sorted, folders themselves not; and the folders that are not
    looked into.
    """
    if not isinstance(folder, Path):
        hidden = lambda path: any(p.startswith(".") for p in path.relative_to(folder).parts)
        return [path for path in below(folder) if not hidden(path)], []
    files: list[AnyPath] = []
    unread: list[Video] = []

    def leave_out(path: AnyPath, problem: str) -> None:
        unread.append(Video(path.relative_to(folder).as_posix(), path, "", problem))

    def failed(error: OSError) -> None:
        leave_out(Path(error.filename), f"the folder cannot be listed ({error.strerror})")

    for place, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        for link in (Path(place, name) for name in folders):
            if link.is_symlink():  # it may lead in a circle
                leave_out(
                    link,
                    "it is a link to a folder, which is not followed; put the videos themselves "
                    "there",
                )
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files), unread


def _beside(folder: AnyPath, files: Sequence[AnyPath]) -> list[Video]:
    """Videos whose captions stand in a .txt of the same name, and what else such a caption seems to
    be meant for.
    """
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    sources = [file for file in files if file.suffix.lower() in SUFFIXES]
    named = {file.with_suffix("") for file in sources}
    for file in files:
        stem = file.with_suffix("")
        if stem in texts and stem not in named and file.suffix.lower() not in ABOUT:
            sources.append(file)
    named = {file.with_suffix("") for file in sources}
    sources += [text for stem, text in texts.items() if stem not in named]
    return [
        _with_caption(folder, file, texts.get(file.with_suffix(""))) for file in sorted(sources)
    ]


def _with_caption(folder: AnyPath, file: AnyPath, text: AnyPath | None) -> Video:
    name = file.relative_to(folder).as_posix()
    if file == text:
        return Video(
            name, file, "", "it is a caption without a video: none of that name is beside it"
        )
    if not text:
        return Video(
            name, file, "", f"no caption: there is no {file.with_suffix('.txt').name} beside it"
        )
    try:
        caption = clean(read_text(text)).replace("\r", "\n")
    except UserError as error:
        return Video(name, file, "", f"no caption: {error}")
    return Video(
        name,
        file,
        caption,
        _no_file(file) or ("" if caption else f"no caption: {text.name} is empty"),
    )


def _from_table(folder: AnyPath, files: Sequence[AnyPath], table: AnyPath) -> list[Video]:
    """The videos that a table lists, then those under the folder that it does not list."""
    rows = read_table(table)
    file_column, caption_column = (
        find_column(rows, names, table) for names in (FILE_COLUMNS, CAPTION_COLUMNS)
    )
    videos, listed = [], set()
    for row in rows:
        place = f"{row.name} of {table.name}"
        name, wrong = cell(row._replace(problem=""), file_column)
        caption, no_caption = cell(row, caption_column)
        file = folder / name
        if not name:
            problem = wrong or f"its '{file_column}' is empty"
        elif not inside(folder, file):
            problem = f"{place}: it lies outside {folder}"
        else:
            problem = _no_file(file)
            listed |= set() if problem else {real(file)}
        if not problem and not caption:
            problem = (
                f"{place}: {no_caption}"
                if no_caption
                else f"no caption: its '{caption_column}' in {table.name} is empty"
            )
        videos.append(Video(name or place, file, caption, problem))
    rest = [f for f in files if f.suffix.lower() in SUFFIXES and real(f) not in listed]
    return videos + [
        Video(f.relative_to(folder).as_posix(), f, "", f"no caption: not in {table.name}")
        for f in rest
    ]


def inside(folder: AnyPath, file: AnyPath) -> bool:
    """Whether a name does not lead out of a folder; a link in it may."""
    if in_bucket(folder):
        return real(file).is_relative_to(real(folder))
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))


def _no_file(file: AnyPath) -> str:
    if in_bucket(file):
        return "" if file.is_file() else f"{file} does not exist"
    if os.path.isfile(file):
        return ""
    if not os.path.lexists(file):
        return f"{file} does not exist"
    return f"{file} is a link to nothing" if not os.path.exists(file) else f"{file} is no file"
