"""launch.measure on a CPU at the smallest size, and the section that is made of its file.

No time is judged.
"""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest

from launch import measure, measure_table
from tests.launch.programs import program


def test_every_part_has_a_time_and_a_process():
    choice = measure.Choice("a teacher", measure.ONE_DEVICE, 1)
    for platform in ("cpu", "gpu", "tpu"):
        tasks = measure.tasks(platform, choice)
        names = [task.name for task in tasks]
        assert len(set(names)) == len(names) and all(task.share > 0 for task in tasks)
        assert {"streaming", "critic_step", "student_step", "peer", "compile"} <= set(names)
        assert any("tiny" in word for task in tasks for word in task.command) == (platform == "cpu")
    assert "student_step" not in [task.name for task in measure.tasks("gpu", None)]


def test_the_teacher_is_the_first_that_fits_by_the_plan(monkeypatch):
    large = lambda _, changes: 50 if "teacher.preset" in changes else 100
    monkeypatch.setattr(measure, "planned_bytes", large)
    names = list(measure.CHOICES)
    for memory, index in ((112, 0), (111, 2), (56, 2)):  # nine tenths of a GPU may be filled
        assert measure.choose("gpu", memory).name == names[index]
    assert measure.choose("gpu", 55) is None and measure.choose("tpu", 50).name == names[2]
    assert measure.choose("cpu", 100).planned_bytes == 50  # the small networks


@pytest.fixture
def module(tmp_path, monkeypatch):
    """One for `python -m` that writes its file and fails, or sleeps."""
    (tmp_path / "fails.py").write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[-1].split('=')[1]).write_text('{}')\n"
        "time.sleep(60) if 'slowly' in sys.argv else sys.exit('error: no such thing')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fails"


def test_a_process_that_fails_is_told_in_its_words(module, tmp_path):
    told = measure.run_task(measure.Task("a", 1, (module,)), 60, tmp_path / "a.json")
    assert told["problem"] == "error: no such thing" and told["found"] == {}


def test_one_that_lasts_too_long_is_stopped_and_keeps_what_it_wrote(module, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MINUTES", FlagOf(0.1))
    told = measure.run_task(measure.Task("b", 1, (module, "slowly")), 5, tmp_path / "b.json")
    assert told["problem"] == "stopped after 5 s, its share of --minutes=0.1"
    assert told["found"] == {} and told["seconds"] < 50


class FlagOf(NamedTuple):
    """A flag that was given."""

    value: float


def test_a_child_that_ignores_an_interrupt_is_killed(monkeypatch):
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    monkeypatch.setattr(measure, "PATIENCE", 0.1)
    measure.stop(child)
    assert child.returncode == -9


FOUND = {
    "command": ["python", "-m", "launch.measure"],
    "commit": "abc1234",
    "device": "a GPU",
    "memory_bytes": 8e10,
    "versions": {"python": "3.11"},
    "config": "self_forcing.py:wan,salt",
    "chosen": {"name": "the 14B teacher", "planned_bytes": 5e10},
}
ROW = {"seconds": 0.5, "tflops_per_second": 400.0, "of_matmul": 0.5, "xla_bytes": 2e9, "more": {}}


def part(name, *rows, problem=None, **more):
    found = {"results": list(rows), **more} if rows or more else None
    return {"name": name, "command": ["python"], "problem": problem, "found": found}


def test_the_section_holds_what_was_found_and_why_the_rest_was_not():
    split = {"transformer_seconds": 3.0, "vae_seconds": 1.0, "frames_per_second": 16.0}
    told = {
        "part": "forward",
        "seconds": {"ours": [1.0, 2.0, 3.0], "diffusers": [2.0, 2.0, 2.0]},
        "ratios": {"ours": {"diffusers": [0.75, 1.0, 1.25]}},
    }
    parts = [
        part("attention_cudnn", ROW | {"part": "matmul"}, ROW | {"part": "cudnn 6 x 6"}),
        part("attention_tokamax", problem="error: tokamax cannot be loaded"),
        part("streaming", ROW | {"part": "streaming", "more": split}),
        part("critic_step", ROW | {"part": "critic step"}, peak_bytes=3e9, problem="stopped"),
        part("peer", told),
        part("compile", programs=[{"program": "critic step", "peak_bytes": 4e9}]),
    ]
    for each in parts[-1:]:
        each["found"].pop("results")
    lines = measure_table.document(FOUND | {"parts": parts}).splitlines()
    assert "| cudnn 6 x 6 | 500 | 400 | 50% | 2 |" in lines
    assert "| critic step | 0.5 | 400 | 50% | 2 | 3 | 4 | 50 |" in lines
    assert "| transformer, s | 3 |" in lines and "| frames per second | 16 |" in lines
    assert "| forward | ours | 2 | 1.00 of diffusers | 0.75 to 1.25 |" in lines
    assert "| forward | diffusers | 2 | - | - |" in lines
    assert "- attention_tokamax: error: tokamax cannot be loaded (`python`)" in lines
    assert "- critic_step: stopped (`python`)" in lines
    assert not any(line.startswith("| matmul") for line in lines)


def test_where_no_teacher_fits_that_is_told():
    text = measure_table.document(FOUND | {"chosen": None, "parts": []})
    assert "no choice of teacher fits" in text and "### Updates" not in text


@pytest.mark.slow
def test_the_whole_of_it_on_a_cpu(tmp_path):
    done = program("measure", f"--into={tmp_path}", "--minutes=10")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "measure.json").read_text())
    parts = {each["name"]: each for each in found["parts"]}
    assert list(parts) == [
        task.name for task in measure.tasks("cpu", measure.choose("cpu", 10**12))
    ]
    # what is no requirement may be absent, and is then told
    for name in set(parts) - {"attention_tokamax", "peer"}:
        assert parts[name]["problem"] is None, parts[name]
    assert found["chosen"]["planned_bytes"] > 0
    text = (tmp_path / "measure.md").read_text()
    assert text == measure_table.document(found)
    for title in ("Attention", "Updates", "Streaming"):
        assert f"### {title}" in text
    for name in ("attention_tokamax", "peer"):
        assert (parts[name]["problem"] is None) != (parts[name]["problem"] or "-") in text
