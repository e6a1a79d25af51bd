"""What two real processes make of a workdir, of prompts and of a mistake is what one makes."""

import json
import shutil
import time

import numpy as np
import pytest

from salt_jax.data.latents import open_records
from salt_jax.evaluate import vbench
from tests.launch import processes

OPTIONS = {"weights": "", "teacher.kind": "closed_form", "iterations": 1, "batch_size": 4}
OPTIONS |= {"data.num_train": 24, "data.num_test": 1, "critic_ratio": 1}


def run(name, args, logs, count, codes=(0,)):
    """What each of so many processes printed."""
    each = args if isinstance(args[0], list) else [args] * count
    processes.finish(processes.launch(name, each, logs), logs, codes)
    return [processes.text(logs, i) for i in range(count)]


def files(folder):
    """The content of each file but MP4 and records: one clip now and then has other bytes there,
    and the same features another order.
    """
    skipped = lambda path: path.suffix == ".mp4" or "array_record" in path.name
    return {
        path.relative_to(folder).as_posix(): skipped(path) or path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    processes.train(root / "run", OPTIONS | {"data.dir": root / "data"})
    return root / "run"


@pytest.mark.slow
def test_videos_of_two_processes_are_those_of_one(workdir, tmp_path):
    made = {}
    for count in (1, 2):
        out = tmp_path / f"made{count}"
        args = [f"--workdir={workdir}", "--num_steps=1,2", "--count=2", f"--out={out}"]
        told = run("sample", args, tmp_path / f"sample{count}", count)
        assert [f"4 videos made in {out}" in text for text in told] == [True, False][:count]
        made[count] = files(out)
    lines = {}
    for count, found in made.items():
        index = [json.loads(line) for line in found.pop("samples.jsonl").splitlines()]
        lines[count] = {line["file"]: line["made_with"] for line in index}
        assert len(index) == len(lines[count]) == 10
    assert made[1] == made[2] and lines[1] == lines[2]
    args[-2:-1] = ["--count=2", "--seed=0"]
    (tmp_path / "made2" / "1_001.mp4").unlink()
    again = run("sample", args, tmp_path / "again", 2)
    assert "1 videos made" in again[0] and "3 were there already" in again[0]
    assert files(tmp_path / "made2").keys() == made[2].keys() | {"samples.jsonl"}


@pytest.mark.slow
def test_one_of_two_processes_evaluates_and_exports(workdir, tmp_path):
    numbers, exported = [], []
    for count in (1, 2):
        there = [f"--workdir={workdir}"]
        small = ["--count=2", "--teacher_steps=1", "--solvers=cm"]
        told = run("evaluate", there + small, tmp_path / f"evaluate{count}", count)
        assert ["report.html" in text for text in told] == [True, False][:count]
        numbers.append(json.loads((workdir / "evaluation.json").read_text()) | {"command": ""})
        file = tmp_path / f"{count}.safetensors"
        told = run("export", [*there, f"--dst={file}"], tmp_path / f"export{count}", count)
        assert ["wrote " in text for text in told] == [True, False][:count]
        exported.append(file.read_bytes())
    assert numbers[0] == numbers[1] and exported[0] == exported[1]


@pytest.mark.slow
def test_results_of_vbench_are_told_once_and_refused_by_both(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(dict.fromkeys(vbench.DIMENSIONS, 0.5)))
    bad.write_text('{"color": 85.0}')
    args = [[f"--vbench_results={path}"] for path in (good, bad)]
    told = run("evaluate", args[0], tmp_path / "told", 2)
    assert ["Quality" in text for text in told] == [True, False]
    for text in run("evaluate", args, tmp_path / "refused", 2, codes=(2,)):
        assert "'color' is 85.0" in text and "Quality" not in text


@pytest.mark.slow
def test_two_processes_share_the_parts_of_a_data_set(tmp_path):
    prompts, made = tmp_path / "prompts.txt", []
    prompts.write_text("".join(f"A cat walks {i} times.\n" for i in range(5)))
    for count in (1, 2):
        data = tmp_path / f"data{count}"
        args = ["--preset_size=tiny", f"--prompts={prompts}", f"--dst={data}", "--per_part=2"]
        told = run("encode", args, tmp_path / f"encode{count}", count)
        sums = ["5 sources = 5 records + 0 left out\n" in text for text in told]
        assert sums == [True, False][:count]
        made.append(files(data))
    assert made[0] == made[1] and len([name for name in made[1] if "array_record" in name]) == 3
    one, two = (open_records(tmp_path / f"data{i}", (1, 2, 2, 16), 512).records for i in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first["caption"] == second["caption"]
        np.testing.assert_array_equal(first["text"], second["text"])
    both = [*args, "--process_index=0", "--process_count=2"]
    for text in run("encode", both, tmp_path / "both", 2, codes=(2,)):
        assert "--process_index and --process_count are for processes that cannot reach" in text


@pytest.mark.slow
def test_bench_times_updates_over_the_devices_of_both(tmp_path):
    file = tmp_path / "bench.json"
    args = ["--preset=wan2.1-t2v-tiny", "--frames=3", "--height=4", "--width=4", "--vae=tiny"]
    args += ["--runs=1", "--what=student_step", "--matmul=64", f"--json={file}"]
    told = run("bench", args, tmp_path / "bench", 2)
    assert ["student step" in text for text in told] == [True, False]
    found = json.loads(file.read_text())
    assert found["devices"] == 2 and found["results"][1]["more"]["clips"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_of_one_process_ends_both_with_its_sentence(wrong, workdir, tmp_path):
    args = [[f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--count=2"] for _ in range(2)]
    args[wrong] = [*args[wrong], "--step=9"]
    for text in run("sample", args, tmp_path / "flag", 2, codes=(2,)):
        assert "error: --step=9 is not in" in text and "Traceback" not in text
    (tmp_path / "file").write_text("")
    args[wrong] = [*args[wrong][:1], f"--out={tmp_path / 'file' / 'out'}", "--count=2"]
    ends = processes.launch("sample", args, tmp_path / "disk")
    assert all(process.wait(timeout=60) for process in ends)
    assert "NotADirectoryError" in processes.text(tmp_path / "disk", 1 - wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wrong", "mistake", "told"),
    [
        ("sample", 0, "--cuont=2", "Unknown command line flag 'cuont'"),
        ("sample", 1, "--count=two", "flag --count=two"),
        ("export", 1, "no_flag", "unknown argument 'no_flag'"),
        ("train", 0, "--config.no_such_key=1", "unknown config key 'no_such_key'"),
    ],
)
def test_flags_one_process_cannot_read_end_both(name, wrong, mistake, told, workdir, tmp_path):
    """Although the flags that say who the others are were not read either."""
    line = {"export": [f"--dst={tmp_path}/x"], "train": ["--config=configs/base.py"]}
    run_of = f"--workdir={tmp_path / 'run' if name == 'train' else workdir}"
    args = [[run_of, *line.get(name, [])] for _ in range(2)]
    args[wrong] = [*args[wrong], mistake]
    begun = time.monotonic()
    for text in run(name, args, tmp_path / "log", 2, codes=(2,)):
        (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert told in error and "Traceback" not in text
    assert time.monotonic() - begun < 100
    assert not (tmp_path / "run").exists() and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_checkpoint_that_only_one_cannot_read_ends_both(workdir, tmp_path):
    other = shutil.copytree(workdir, tmp_path / "other")
    (data, *_) = (other / "checkpoints" / "1" / "student").glob("**/d/*")
    data.write_bytes(data.read_bytes()[:100])
    options = OPTIONS | {"data.dir": workdir.parent / "data", "iterations": 2}
    args = [[f"--config.{k}={v}" for k, v in options.items()] for _ in range(2)]
    for mine, folder in zip(args, (workdir, other), strict=True):
        mine[:0] = [f"--workdir={folder}", "--config=configs/base.py"]
    for text in run("train", args, tmp_path / "train", 2, codes=(2,)):
        # Orbax's threads may say before it that their loop is closed
        assert text.splitlines()[-1].startswith("error: no checkpoint in")
