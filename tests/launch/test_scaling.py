"""The tables of docs/scaling.md from files of launch.compile."""

import json
import re

import pytest

from configs import causal_forcing, self_forcing
from launch import scaling
from salt_jax.compile.target import read_target
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from tests.compile.described import ROW
from tests.every_config import form
from tests.helpers import ROOT

TOLD = {"commit": "abc1234", "programs": [ROW | {"memory_bytes": 94 * 2**30}]}


def test_rows_have_names_of_their_own_and_machines_that_exist():
    assert len({row.name for row in scaling.ROWS}) == len(scaling.ROWS)
    for row in scaling.ROWS:
        assert (
            read_target(row.target).devices >= 1
            and (ROOT / "configs" / row.config.split(":")[0]).is_file()
        )


def test_causal_forcing_has_the_programs_of_self_forcing():
    """So the tables have them once. They start from other weights."""
    for program in ("student step + self_consistency + alignment", "critic step"):
        one, other = (
            form(read_recipe(module.get_config("wan,salt,paper")), program)
            for module in (causal_forcing, self_forcing)
        )
        assert one == other


def test_a_program_is_a_line_that_says_whether_it_is_what_must_be():
    row = next(row for row in scaling.ROWS if row.name == "self_forcing_8h100")
    (line,) = scaling.lines(row, TOLD)
    told = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(told) == len(scaling.HEAD)
    assert told[2:] == [
        *(
            "student step",
            "4.00",
            "42.00",
            "47.00",
            "1.00",
            "50%",
            "36.0",
            "**no, by 12.0**",
            "3.00",
            "12",
        )
    ]
    tables = scaling.document({row: TOLD})
    assert (
        "- self_forcing_8h100, student step: over. bf16[30,4] 5.00 GiB (`jit(run)/x/y/z/dot`)"
        in tables
    )
    command = " ".join(row.command)
    assert (
        f"| [self_forcing_8h100](scaling/self_forcing_8h100.json) | abc1234 | `{command}` |"
        in tables
    )
    assert (
        "--config=configs/self_forcing.py:wan,salt,paper --target=gpu:h100:8 --config.batch_size=8"
        in command
    )


def test_what_did_not_compile_has_a_line_too():
    broken = {
        "commit": "a",
        "programs": [{"program": "critic step", "problem": "does not compile: x"}],
    }
    (line,) = scaling.lines(scaling.ROWS[0], broken)
    assert line.count("|") == len(scaling.HEAD) + 1 and "**does not compile: x**" in line


def test_tables_go_between_the_marks():
    text = f"a\n{scaling.MARK}\nold\n{scaling.MARK}\nb\n"
    once = scaling.with_tables(text, "| new |")
    assert (
        once
        == f"a\n{scaling.MARK}\n| new |\n{scaling.MARK}\nb\n"
        == scaling.with_tables(once, "| new |")
    )
    with pytest.raises(UserError, match="two lines"):
        scaling.with_tables("a", "b")


@pytest.fixture(scope="module")
def tables():
    """Those of the files that are there; to plan all rows takes half a minute."""
    files = {row: ROOT / "docs" / "scaling" / f"{row.name}.json" for row in scaling.ROWS}
    found = {row: json.loads(file.read_text()) for row, file in files.items() if file.exists()}
    return scaling.document(found)


def test_launch_plan_is_near_the_compilers(tables):
    line = r"^\| (\w+) \| [^|]* step[^|]* \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$"
    ratios = {name: float(ratio) for name, ratio in re.findall(line, tables, re.M)}
    assert len(ratios) >= 8 and all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_the_document_says_what_its_files_say(tables):
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert text.count(scaling.MARK) == 2
    assert scaling.with_tables(text, tables) == text
