"""The programs one after another, as a user runs them: train, sample, evaluate, export, and train
from the export.
"""

import json

import pytest

from tests.launch.programs import frames, program, succeed

FRESH = ["--config.weights=", "--config.teacher.kind=closed_form", "--config.data.num_train=64"]
TINY = [
    *FRESH,
    "--config.iterations=2",
    "--config.save_every=1",
    "--config.batch_size=4",
    "--config.critic_ratio=1",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    data = f"--config.data.dir={folder / 'data'}"
    succeed("train", "--config=configs/sc_dmd.py", f"--workdir={folder / 'run'}", data, *TINY)
    return folder / "run"


@pytest.mark.slow
def test_sampling_writes_clips_that_depend_on_the_seed_alone(workdir):
    out = workdir / "samples"
    succeed("sample", f"--workdir={workdir}", "--num_steps=2", "--count=3", "--seed=5")
    clip, fps = frames(out / "2_001.mp4")
    assert (
        clip.shape[0] == 9
        and fps == 16
        and (out / "2_001.gif").stat().st_size
        and (out / "2_sheet.png").stat().st_size
    )
    before = [(out / f"2_{i:03d}.mp4").read_bytes() for i in range(3)]
    captions = workdir / "captions.txt"
    captions.write_text("\n".join(json.loads(succeed_captions())[:2]), encoding="utf-8")
    succeed(
        "sample", f"--workdir={workdir}", "--num_steps=2", f"--prompts_file={captions}", "--seed=5"
    )
    assert [(out / f"2_{i:03d}.mp4").read_bytes() for i in range(2)] == before[:2]
    assert "3 videos made" in succeed(
        "sample", f"--workdir={workdir}", "--num_steps=2", "--count=3", "--seed=6"
    )
    assert (out / "2_001.mp4").read_bytes() != before[1]


@pytest.mark.slow
def test_what_another_checkpoint_made_is_made_anew(workdir):
    """The averaged weights of the newest checkpoint, those of an earlier one, and those that are
    not averaged.
    """
    out = workdir / "chosen"
    args = ["sample", f"--workdir={workdir}", "--count=2", f"--out={out}"]
    seen, two = set(), "--num_steps=2"
    choices = ([two], [two, "--step=1"], [two, "--step=1", "--average=none"], [two, "--guidance=3"])
    for chosen in (*choices, ["--levels=1000,400"]):
        assert succeed(*args, *chosen).startswith("2 videos made")
        assert succeed(*args, *chosen).startswith("0 videos made")
        seen.add((out / "2_001.mp4").read_bytes())
    assert len(seen) >= 4  # before the average begins it is a copy
    told = [
        json.loads(line)["made_with"] for line in (out / "samples.jsonl").read_text().splitlines()
    ]
    assert {t["network"]["step"] for t in told if "network" in t} == {1, 2}
    assert (out / "2_sheet.png").stat().st_size


def succeed_captions():
    """The captions that `--count=3` spreads over the world, as launch.common makes them."""
    from salt_jax.moving_shapes import shapes

    scenes = shapes.scenes(shapes.World())
    return json.dumps([shapes.caption(scenes[i * len(scenes) // 3]) for i in range(3)])


@pytest.mark.slow
def test_evaluating_writes_numbers_and_a_report(workdir):
    table = succeed("evaluate", f"--workdir={workdir}", "--count=6", "--teacher_steps=2")
    numbers = json.loads((workdir / "evaluation.json").read_text())
    assert "direction" in table and (workdir / "report.html").stat().st_size > 10_000
    assert set(numbers["student"]) == {"euler", "cm"} and set(
        numbers["student"]["cm"]["score"]
    ) == {"2", "4", "8"}
    assert len(numbers["student"]["euler"]["defect"]["per_interval"]) == 4
    assert set(numbers["teacher"]["velocity_error"]) >= {"0.98", "0.3"} and numbers["commit"]


@pytest.mark.slow
def test_an_exported_network_is_weights_for_the_next_run(workdir, tmp_path):
    file = tmp_path / "new folder" / "student.safetensors"
    succeed("export", f"--workdir={workdir}", f"--dst={file}")
    data = f"--config.data.dir={workdir.parent / 'data'}"
    args = [a for a in TINY if a != "--config.weights="]
    succeed(
        "train",
        "--config=configs/sc_dmd.py",
        f"--workdir={tmp_path / 'next'}",
        data,
        *args,
        f"--config.weights={file}",
    )


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sample", ["--workdir=/nowhere"], "/nowhere/config.json does not exist"),
        ("evaluate", ["--workdir=/nowhere"], "/nowhere/config.json does not exist"),
        ("evaluate", [], "workdir"),
    ],
)
def test_what_is_missing_is_named(name, args, message):
    done = program(name, *args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_prompt_files_that_cannot_be_used_are_named(workdir, tmp_path):
    bad = tmp_path / "prompts.txt"
    for content, message in (
        (b"\n \n", "has no prompt"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"x" * 99, "shorten the text"),
    ):
        bad.write_bytes(content)
        done = program("sample", f"--workdir={workdir}", f"--prompts_file={bad}")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_tabulating_averages_seeds_and_draws_the_sweep(tmp_path):
    names = (
        "all",
        "shape",
        "direction",
        "clean",
        "coverage_ratio",
        "off_grid",
        "sharpness",
        "motion",
    )
    for run, defect in (
        ("sweep/30/lambda 1/0", 2.0),
        ("sweep/60/lambda 1/0", 1.0),
        ("main/x/0", 3.0),
        ("main/x/1", 5.0),
    ):
        solver = {
            "score": {"4": dict.fromkeys(names, 0.5)},
            "cross_step": {"2-4": 0.25},
            "defect": {"mean": defect, "per_interval": [1, 2, 3, 4]},
        }
        (tmp_path / run).mkdir(parents=True)
        numbers = json.dumps({"student": {"euler": solver, "cm": solver}})
        (tmp_path / run / "evaluation.json").write_text(numbers)
    table = succeed("tabulate", f"--dir={tmp_path}")
    assert (
        "| main/x | 2 | 4.0000 ± 1.0000 |" in table
        and "| sweep/60/lambda 1 | 1 | 1.0000 | 1.0000 |" in table
    )
    assert (tmp_path / "defect_lambda.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "defect_stop.png").exists()
