"""python -m launch.compile, as a user runs it, on the devices that are here."""

import json
import os
import subprocess
import sys

import jax
import pytest

from salt_jax.cli import compiling
from tests.compile.described import ROW
from tests.helpers import ROOT
from tests.launch.programs import WAN_TINY as TINY


def run(*args, **environment):
    """On two devices of a CPU."""
    around = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **environment,
    }
    around["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count=2 {environment.get('XLA_FLAGS', '')}"
    )
    command = [sys.executable, "-m", "launch.compile", *TINY, *args]
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)


@pytest.mark.slow
def test_programs_are_compiled_each_by_itself_and_told(tmp_path):
    done = run("--what=critic,teacher,text", f"--json={tmp_path / 'told.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert set(told) == {"command", "commit", "target", "host", "versions", "programs"}
    assert told["target"] == "here" and told["versions"]["jax"] == jax.__version__
    assert (
        told["command"][:3] == ["python", "-m", "launch.compile"]
        and "--what=critic,teacher,text" in told["command"]
    )
    rows = {row["program"]: row for row in told["programs"]}
    assert list(rows) == ["critic step", "teacher forward", "text encoder"]
    for name, row in rows.items():
        assert name in done.stdout and name in done.stderr  # in the table, and beside the bar
        assert row["problem"] is None and row["mesh"] == {
            "data": 1,
            "fsdp": 2,
            "context": 1,
            "tensor": 1,
        }
        assert (
            row["peak_bytes"]
            == sum(row[f"{k}_bytes"] for k in ("argument", "output", "temporary"))
            - row["alias_bytes"]
        )
        assert row["collectives"] and len(row["largest"]) == 4 and row["largest"][0]["bytes"] > 0
        assert "?" not in {buffer["shape"] for buffer in row["largest"]}
    # The state is taken and given back; the teacher keeps nothing.
    assert rows["critic step"]["alias_bytes"] > 0 and rows["teacher forward"]["alias_bytes"] == 0
    assert "all-gather: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--what=student", "--config.mesh.fsdp=4"],
         "config.mesh (data=-1, fsdp=4, context=1, tensor=1) does not"),
        (["--what=critic", "--config.batch_size=3"],
         "config.batch_size=3 must be a multiple of mesh data x fsdp = 2"),
        (["--what=stream", "--config.video=noised", "--config.align.weight=0"],
         "this config has no stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_at_all_is_named(args, message):
    done = run(*args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_compiler_that_aborts_is_a_sentence():
    """An unknown flag ends the process that reads it, from within XLA."""
    done = run("--what=text", XLA_FLAGS="--xla_no_such_flag=1")
    assert done.returncode == 1 and "does not compile" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: text encoder for here does not compile: its process ended with")
    assert "--xla_no_such_flag=1" in last


def test_the_table_holds_what_was_found(capsys, tmp_path):
    file = tmp_path / "told.json"
    assert compiling.tell([ROW], "gpu:h100:8", str(file)) == 0
    table = capsys.readouterr().out
    numbers = table.splitlines()[1].removeprefix("student step").split()
    assert numbers == ["12.50", "4.00", "42.00", "4.00", "3.00", "47.00", "1.00", "50.0%", "165.00"]
    assert "3 x __cudnn$fmhaSoftmax" in table and "1 loops of unknown length count once" in table
    assert "all-gather: 2 in the program, 60 in a run, 3.000 GiB sent by a device" in table
    assert json.loads(file.read_text())["programs"] == [ROW]


def test_what_does_not_fit_is_named_with_what_stands_in_the_way(capsys):
    wrong = {
        "program": "student step",
        "peak_bytes": 98 * 2**30,
        "share": 1.02,
        "largest": ROW["largest"],
    }
    wrong["problem"] = "does not fit: 98.00 GiB at its peak, 95.73 GiB may be filled"
    crash = {
        "program": "critic step",
        "problem": "does not compile: its process ended with signal 6: F12 no",
    }
    assert compiling.tell([wrong, ROW, crash], "tpu:v5p:2x2x4", None) == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "error: student step for tpu:v5p:2x2x4 does not fit: 98.00 GiB at its peak, 95.73 GiB may "
        "be filled; "
        "largest: bf16[30,4] 5.00 GiB (x/y/z/dot)",
        "error: critic step for tpu:v5p:2x2x4 does not compile: its process ended with signal 6: "
        "F12 no",
    ]
    assert "102.0%" in told.out
