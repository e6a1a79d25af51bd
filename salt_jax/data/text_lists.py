r"""Prompts and captions as people keep them: lines of a text, rows of a table. One reader for all
programs.

UTF-8, with or without a byte order mark. Only \n and \r\n end a line: language models write other
separators inside a prompt. Nothing is cut or made up: a row that does not fit its header, or whose
value is no text, has a problem.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path

TABLES = (".csv", ".tsv", ".jsonl", ".json")
FILE_COLUMNS = ("file", "path", "file_name", "video")  # the first one a table has counts
CAPTION_COLUMNS = ("caption", "text", "prompt")
MARKS = (
    ("UTF-32", b"\xff\xfe\0\0"),
    ("UTF-32", b"\0\0\xfe\xff"),
    ("UTF-16", b"\xff\xfe"),
    ("UTF-16", b"\xfe\xff"),
)
# What is taken off both ends: all that Unicode calls white space, marks without width, and the end
# of a DOS file.
BLANKS = "".join(chr(i) for i in range(0x3100) if chr(i).isspace()) + "\ufeff\u200b\u2060\x1a"
KINDS = {
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
}
LISTED = 10  # names in a message


class Row(NamedTuple):
    """A row of a table.

    `problem` says why its cells cannot be trusted; "" if nothing is known against it.
    """

    name: str  # where it stands, for a message
    cells: dict[str, object]
    problem: str


class Prompt(NamedTuple):
    """A prompt, or the reason why there is none in its place."""

    name: str
    text: str
    problem: str
    switch: str = ""  # to which its video changes: see `prompt_pairs`


class Entry(NamedTuple):
    """A line, or a cell of a row; a blank one has neither text nor problem."""

    place: str
    text: str
    problem: str


def clean(text: str) -> str:
    r"""Without blanks around it, and with \n for \r\n."""
    return text.replace("\r\n", "\n").strip(BLANKS)


def read_text(file: str | AnyPath) -> str:
    """A whole text, without the marks that files which were joined have at the beginning of a line.

    Raises:
      UserError: it is unreadable, not UTF-8, or has NUL characters.
    """
    try:
        data = as_path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file} ({getattr(error, 'strerror', None) or error}); check its name"
        ) from error
    seen = next((f"it is {name}" for name, mark in MARKS if data.startswith(mark)), "")
    if not seen and 3 * data.count(0) > len(data):
        seen = "every second byte is 0, as in UTF-16"
    text = ""
    try:
        text = "" if seen else data.decode("utf-8")
    except UnicodeDecodeError as error:
        seen = (
            f"byte {error.start} is {data[error.start]:#x}, as in Latin-1, Windows-1252 or another "
            "code page"
        )
    if seen:
        raise UserError(f"{file} is not UTF-8 ({seen}); save it as UTF-8")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"line {line} of {file} has a NUL character; is it a text? mend or delete the line"
        )
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")


def read_lines(file: str | AnyPath) -> list[str]:
    r"""Lines without blanks around them; empty ones are "", so that places are kept, but for those
    at the end.

    Raises:
      UserError: as `read_text`, or a line has a lone \r, an old end of line.
    """
    lines = [line.strip(BLANKS) for line in read_text(file).split("\n")]
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            raise UserError(
                f"line {number} of {file} has a carriage return inside; save it with line ends \\n "
                "or \\r\\n"
            )
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_prompts(file: str | AnyPath) -> list[Prompt]:
    """Prompts from a text with one a line, or from a table with a column of them. Blank ones are
    left out.

    Raises:
      UserError: the file is unreadable, or has no prompt.
    """
    file = as_path(file)
    return usable([entry for entry in read_entries(file) if entry.text or entry.problem], file)


def read_entries(file: AnyPath) -> list[Entry]:
    """Every line of a text, but for blank ones at its end, or of a table what is in its column of
    prompts. Raises UserError where it is unreadable.
    """
    if file.suffix.lower() in TABLES:
        rows = read_table(file)
        name = find_column(rows, CAPTION_COLUMNS, file)
        return [Entry(row.name, *cell(row, name)) for row in rows]
    return [Entry(f"line {i}", line, "") for i, line in enumerate(read_lines(file), 1)]


def usable(entries: Sequence[Entry], file: AnyPath) -> list[Prompt]:
    """Entries of a file as prompts, numbered. Raises UserError where none can be used."""
    prompts = [
        Prompt(f"prompt {i}", text, f"{place} of {file.name}: {problem}" if problem else "")
        for i, (place, text, problem) in enumerate(entries, 1)
    ]
    if all(prompt.problem for prompt in prompts):
        first = f" ({prompts[0].problem})" if prompts else ""
        raise UserError(
            f"{file} has no prompt{first}; write one a line, or a table with a column 'prompt'"
        )
    return prompts


def read_table(file: str | AnyPath) -> list[Row]:
    """Rows of a .csv or .tsv with a header, of a .jsonl, or of a .json with a list of objects.

    Names of columns are in lower case. Rows that are blank throughout are left out.

    Raises:
      UserError: it is none of these, is damaged, or has no row.
    """
    file = as_path(file)
    suffix = file.suffix.lower()
    if suffix not in TABLES:
        raise UserError(f"{file} is no table of captions; its name must end in {', '.join(TABLES)}")
    text = read_text(file)
    rows = list(_separated(text, file) if suffix in (".csv", ".tsv") else _objects(text, file))
    if not rows:
        raise UserError(f"{file} has no row; a table of captions has one for each")
    return rows


def find_column(rows: Iterable[Row], names: Sequence[str], file: AnyPath) -> str:
    """The first of `names` that a row has. Raises UserError if there is none."""
    found = sorted({key for row in rows for key in row.cells})
    for name in names:
        if name in found:
            return name
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    raise UserError(
        f"{file} has the columns {found[:LISTED]}{more}; one must be called {' or '.join(names)}"
    )


def cell(row: Row, column: str) -> tuple[str, str]:
    """(its text without blanks around it, "") or ("", why it has none); a blank text is no problem
    here.
    """
    value = row.cells.get(column)
    if row.problem:
        return "", row.problem
    if not isinstance(value, str):
        kind = KINDS.get(type(value), "null" if column in row.cells else "missing")
        return "", f"its '{column}' is {kind}, not a text"
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return "", f"its '{column}' has a NUL character or half a surrogate pair, which no text has"
    return clean(value), ""


def _separated(text: str, file: AnyPath) -> Iterator[Row]:
    """Rows of a .csv, whose separator is what splits its header into known columns, or of a
    .tsv.
    """
    lines = io.StringIO(text, newline="").readlines()  # which end as csv's do
    first = next((line.rstrip("\r\n") for line in lines if line.strip(BLANKS)), "")
    known = {*FILE_COLUMNS, *CAPTION_COLUMNS}
    marks = "\t" if file.suffix.lower() == ".tsv" else ",;\t"

    def columns(mark: str) -> set[str]:
        return {_key(name) for name in next(csv.reader([first], delimiter=mark), [])}

    number, header = 0, None
    try:
        mark = next((mark for mark in marks if known & columns(mark)), marks[0])
        # Strict: a quote that is not closed would make one caption of the rest of the file.
        for cells in csv.reader(lines, delimiter=mark, strict=True):
            if not any(value.strip(BLANKS) for value in cells):
                continue
            if header is None:
                header = [_key(name) for name in cells]
                _refuse_twice(header, f"the header of {file}")
                continue
            number += 1
            uneven = (
                f"it has {len(cells)} cells, the header {len(header)}; "
                f"quote captions that have a {mark!r}"
            )
            problem = "" if len(cells) == len(header) else uneven
            yield Row(f"row {number}", dict(zip(header, cells, strict=False)), problem)
    except csv.Error as error:
        where = f"near row {number + 1}"
        raise UserError(
            f"{file} cannot be read as csv {where} ({error}); mend it, or save it as .jsonl"
        ) from error


def _objects(text: str, file: AnyPath) -> Iterator[Row]:
    """Rows of a .jsonl, one a line, or of a .json."""
    if file.suffix.lower() == ".json":
        values = _json(text, str(file))
        if not isinstance(values, list):
            raise UserError(
                f'{file} is no list of JSON objects; write [{{"file": ..., "caption": ...}}, ...]'
            )
        entries = [(f"entry {i}", value) for i, value in enumerate(values, 1)]
    else:
        lines = [
            (f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip(BLANKS)
        ]
        entries = [(place, _json(line, f"{place} of {file}")) for place, line in lines]
    for place, value in entries:
        if not isinstance(value, dict):
            raise UserError(
                f'{place} of {file} is no JSON object; write {{"file": ..., "caption": ...}}'
            )
        if value:
            yield Row(place, {_key(name): field for name, field in value.items()}, "")


def _json(text: str, place: str) -> object:
    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        _refuse_twice([_key(name) for name, _ in items], place)
        return dict(items)

    try:
        return json.loads(text.strip(BLANKS), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        reason = (
            error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        )
        raise UserError(f"{place} is not JSON ({reason}); mend or delete it") from error


def _key(name: str) -> str:
    return name.strip(BLANKS).lower()


def _refuse_twice(names: Sequence[str], place: str) -> None:
    """A column of another name, or of none, may come as often as it likes: it is not read."""
    for name in (*FILE_COLUMNS, *CAPTION_COLUMNS):
        if names.count(name) > 1:
            raise UserError(f"{place} has '{name}' twice; which one is meant? rename the other")
