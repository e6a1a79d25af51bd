"""Prompts that each have a second one, to which the video changes under way (LongLive's long
stage): in a column of their table, or line by line in a second file.
"""

from salt_jax.data.text_lists import (
    TABLES,
    Entry,
    Prompt,
    cell,
    read_entries,
    read_prompts,
    read_table,
    usable,
)
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path

SWITCH_COLUMNS = ("switch_prompt", "switch")  # the first one a table has counts


def read_pairs(file: str | AnyPath, switches: str | AnyPath = "") -> list[Prompt]:
    """Prompts as `text_lists.read_prompts` reads them, each with its switch prompt where the table
    has a column of them or `switches` is the file of them; a pair of blanks is left out.

    Raises:
      UserError: as `read_prompts`, or there are both, or not as many of one as of the other.
    """
    file = as_path(file)
    column, second = _column(file)
    if switches and column:
        raise UserError(
            f"{file} has a column '{column}' and --switch_prompts={switches} names others; leave "
            "one of them out"
        )
    if not switches and not column:
        return read_prompts(file)
    other = as_path(switches) if switches else file
    first = read_entries(file)
    second = read_entries(other) if switches else second
    if len(first) != len(second):
        raise UserError(
            f"{file} has {len(first)} prompts and {other} has {len(second)}; give each prompt its "
            "switch prompt, in the same place"
        )
    pairs = [_pair(*both) for both in zip(first, second, strict=True) if any(map(_is_there, both))]
    prompts = usable([prompt for prompt, _ in pairs], file)
    return [p._replace(switch=text) for p, (_, text) in zip(prompts, pairs, strict=True)]


def _column(file: AnyPath) -> tuple[str, list[Entry]]:
    """The name of a table's column of switch prompts and what is in it; "" where it has none."""
    rows = read_table(file) if file.suffix.lower() in TABLES else []
    there = {name for row in rows for name in row.cells}
    column = next((name for name in SWITCH_COLUMNS if name in there), "")
    return column, [Entry(row.name, *cell(row, column)) for row in rows] if column else []


def _is_there(entry: Entry) -> bool:
    return bool(entry.text or entry.problem)


def _pair(first: Entry, second: Entry) -> tuple[Entry, str]:
    """A prompt, with a problem where one of the two has one or is blank, and its switch prompt."""
    blank = "" if first.text else "it has no prompt, but a switch prompt"
    blank = blank if second.text else "it has no switch prompt"
    return first._replace(problem=first.problem or second.problem or blank), second.text
