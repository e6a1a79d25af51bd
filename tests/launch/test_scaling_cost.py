"""The tables of an iteration's cost in docs/scaling.md, from files of launch.compile."""

import pytest

from launch import scaling_cost
from launch.scaling import with_tables
from salt_jax.compile.target import GIB, read_target
from tests.helpers import ROOT

ROW = scaling_cost.row("two", "self_forcing.py:wan,salt,paper", "gpu:h100:2x8", 16, 2, 8, 1, 1)


def program(name: str, fsdp: int, data: int, waits: int) -> dict:
    """As launch.compile says it; sizes in GiB, `waits` of `fsdp` in a loop of unknown length."""
    gathered = {"over": {"fsdp": fsdp * GIB}, "open": {"fsdp": waits * GIB} if waits else {}}
    summed = {"over": {"data": data * GIB}, "open": {}}
    collectives = {"all-gather": gathered, "all-reduce": summed}
    return {"program": name, "collectives": collectives, "share": 0.5, "mesh": MESH}


MESH = {"data": 2, "fsdp": 8, "context": 1, "tensor": 1}
FILE = {"commit": "abc1234", "programs": [program("critic step", 10, 2, 4)]}


def test_rows_have_names_of_their_own_and_meshes_that_fill_the_machine():
    assert len({row.name for row in scaling_cost.ROWS}) == len(scaling_cost.ROWS)
    for row in scaling_cost.ROWS:
        sizes = [int(o.split("=")[1]) for o in row.options if "mesh." in o]
        assert -1 in sizes or read_target(row.target).devices == sizes[0] * sizes[1] * (
            sizes[2] * (sizes[3] if len(sizes) == 4 else 1)
        )


def test_loops_of_unknown_length_turn_as_often_as_a_rollout_steps():
    """The critic's update is made five times; its rollout takes K / 2 + 1 / 2 steps in the mean,
    K of 2, 4 and 8.
    """
    times, turns = scaling_cost.turns_of(ROW)["critic step"]
    assert times == 5 and turns == pytest.approx(0.2 * 1.5 + 0.4 * 2.5 + 0.4 * 4.5, rel=0.05)
    found = scaling_cost.cost(ROW, FILE)
    along = 5 * (10 + 4 * (turns - 1)) * GIB
    assert found.sent == pytest.approx({"fsdp": along, "data": 10 * GIB})
    assert found.kinds == pytest.approx({"all-gather": along, "all-reduce": 10 * GIB})
    assert found.sending == pytest.approx(along / 450e9 + 10 * GIB / 50e9)  # NVLink; one port


def test_a_line_bounds_an_iteration():
    cells = dict(zip(scaling_cost.HEAD, scaling_cost.cells(ROW, FILE), strict=True))
    assert cells["devices"] == "16 h100" and cells["of device"] == "50%"
    least, most = map(float, cells["iteration s"].split(" to "))
    computing, sending = float(cells["computing s"]), float(cells["sending s"])
    assert least == max(computing, sending) and most == pytest.approx(computing + sending, abs=0.02)


def test_the_document_says_what_its_files_say():
    found = scaling_cost.read_files(ROOT / "docs" / "scaling")
    text, mark = (ROOT / "docs" / "scaling.md").read_text(), scaling_cost.MARK
    assert text.count(mark) == 2
    assert with_tables(text, scaling_cost.document(found), mark) == text
    assert scaling_cost.plot(found)[:4] == b"\x89PNG"


def test_what_is_sent_follows_the_mesh():
    """From 2 x 8 to 128 x 8: gathers along fsdp stay as they are; sums along data are of gradients
    in eight parts, 2 (n - 1) / n of them.
    """
    found = scaling_cost.read_files(ROOT / "docs" / "scaling")
    two, many = (
        scaling_cost.cost(row, found[row.name]).sent
        for row in scaling_cost.ROWS
        if row.name in ("cost_sc_16", "cost_sc_1024_clips")
    )
    assert many["fsdp"] == pytest.approx(two["fsdp"], rel=0.01)
    assert many["data"] / two["data"] == pytest.approx((127 / 128) / (1 / 2), rel=0.02)
