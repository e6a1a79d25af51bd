"""python -m launch.plan, as a user runs it."""

import json

import pytest

from tests.launch.programs import program

pytestmark = pytest.mark.slow  # each run starts a Python of its own
SALT = "--config=configs/self_forcing.py:wan,salt,paper"


def plan(*args):
    return program("plan", *args)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The plan of Salt on 64 devices, as printed and as JSON."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    done = plan(SALT, "--mesh=data:8,fsdp:8", f"--json={file}")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(file.read_text())


def test_everything_is_told_in_numbers_that_add_up(numbers):
    _, told = numbers
    assert told["devices"] == 64 and told["mesh"] == {
        "data": 8,
        "fsdp": 8,
        "context": 1,
        "tensor": 1,
    }
    rows = {row["name"]: row for row in told["memory"]}
    networks = {"student", "critic", "teacher", "average of the student", "base", "null text"}
    moments = {"student optimizer", "critic optimizer"}
    fleeting = {
        "gradients",
        "caches",
        "inputs of blocks",
        "heads of networks",
        "one block at work",
        "gathered blocks",
        "batch",
    }
    assert set(rows) == networks | moments | fleeting
    assert rows["student"]["count"] == 1_418_996_800 and rows["teacher"]["count"] == 14_288_491_584
    assert told["bytes_per_device"] == sum(row["device"] for row in rows.values())
    assert all(row["all_devices"] == 64 * row["device"] for row in rows.values())
    for who, updates in (("student", 1), ("critic", 5)):
        seconds = sum(told["updates"][who].values()) / (64 * 989e12 * 0.4)
        assert told["seconds"][who] == pytest.approx(seconds)
        told["seconds_per_iteration"] -= updates * seconds
    assert told["seconds_per_iteration"] == pytest.approx(0, abs=1e-9)


def test_the_table_says_the_same(numbers):
    table, told = numbers
    for name in [row["name"] for row in told["memory"]] + [
        p for u in told["updates"].values() for p in u
    ]:
        assert name in table
    assert ("does NOT fit" in table) == (not told["fits"]) and "14,288,491,584" in table


def test_what_is_told_decides_whether_it_fits(numbers, tmp_path):
    _, told = numbers
    for gigabytes in (
        told["bytes_per_device"] / 1e9 + 0.001,
        told["bytes_per_device"] / 1e9 - 0.001,
    ):
        args = ("--mesh=data:8,fsdp:8", f"--memory_gb={gigabytes:.6f}")
        done = plan(SALT, *args, f"--json={tmp_path / 'plan.json'}")
        fits = gigabytes * 1e9 > told["bytes_per_device"]
        assert json.loads((tmp_path / "plan.json").read_text())["fits"] == fits
        assert ("fits: " in done.stdout) == fits


def test_a_stage_without_a_critic_has_no_update_of_one(tmp_path):
    file = tmp_path / "plan.json"
    done = plan("--config=configs/consistency.py:wan", "--mesh=fsdp:8", f"--json={file}")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(file.read_text())
    assert list(told["updates"]) == list(told["seconds"]) == ["student"]
    assert told["seconds_per_iteration"] == pytest.approx(told["seconds"]["student"])
    assert not any("critic" in row["name"] for row in told["memory"])
    assert "student update, FLOPs" in done.stdout and "critic update, FLOPs" not in done.stdout


def test_what_cannot_be_planned_is_named():
    done = plan(SALT, "--mesh=data:3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "config.batch_size=64 must be a multiple of mesh data x fsdp = 3" in done.stderr
