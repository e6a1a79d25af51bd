"""The scripts that start a run on a TPU slice, on SLURM and on GKE: what they print in a dry run,
and what they do where gcloud, srun and scontrol are stand-ins. No cloud and no cluster is here.
"""

import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jsonschema
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from salt_jax.cli import app
from salt_jax.errors import STOPPED
from tests.helpers import ROOT
from tests.launch.pods_schema import JOBSET
from tests.launch.programs import succeed

POD, SLURM = ROOT / "launch" / "tpu_pod.sh", ROOT / "launch" / "slurm.sbatch"
SLICE = {"NAME": "salt", "ZONE": "us-east5-a"}
RUN = {"CONFIG": "configs/sc_dmd.py:wan", "WORKDIR": "gs://bucket/runs/mine"}
OVERRIDES = ["--config.mesh.fsdp=16", "--config.sample.num_steps=(2,4)"]
GKE = "cloud.google.com/gke-"
CHECK = jsonschema.Draft202012Validator(JOBSET)
WORDS = {"create", "install", "run", "logs", "stop", "delete"}


def shell(script: Path, *args: str, path: Path | str = "", **settings: str):
    """Runs a script where `path` has the only programs, beside those of any Linux."""
    there = f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(script), *args],
        env={"PATH": there, "HOME": os.environ.get("HOME", "/")} | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands that a script printed, in words."""
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def config_of(words: list[str]) -> dict:
    """The config that a command line of launch.train resolves to; refused if a flag is unknown."""
    start = words.index("launch.train")
    assert words[start - 1] == "-m" and words[start - 2].endswith("python")
    return json.loads(succeed("train", *words[start + 1 :], "--print_config"))


def programs(folder: Path, **scripts: str) -> Path:
    """A folder with stand-ins for programs that are not here."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def test_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install -r requirements-dev.txt"
    scripts = sorted((ROOT / "launch").glob("*.s[hb]*")) + [ROOT / ".ci" / "run"]
    assert {POD, SLURM} < set(scripts)
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("word", sorted(WORDS))
def test_a_dry_run_of_a_slice_prints_commands_of_gcloud_and_runs_none(word, tmp_path):
    left = dict.fromkeys(("gcloud", "git", "mkdir"), f"echo called >>{tmp_path}/called")
    path = programs(tmp_path / "bin", **left)
    found = commands(shell(POD, "--dry-run", word, path=path, **SLICE, **RUN))
    assert not (tmp_path / "called").exists()
    assert commands(shell(POD, word, path=path, DRY_RUN="1", **SLICE, **RUN)) == found
    for words in found:
        if words[0] == "gcloud":
            assert words[1:4] == ["compute", "tpus", "tpu-vm"] and "--zone=us-east5-a" in words
        for word in words:
            if word.startswith("--command="):
                check = ["bash", "-n", "-c", word.removeprefix("--command=")]
                assert subprocess.run(check).returncode == 0


@pytest.mark.parametrize(
    "kind, image",
    [("v5p-32", "v2-alpha-tpuv5"), ("v6e-32", "v2-alpha-tpuv6e"), ("v4-32", "")],
)
def test_the_image_goes_with_the_kind_of_tpu(kind, image):
    done = shell(POD, "--dry-run", "create", TYPE=kind, SPOT="1", **SLICE)
    if image:
        (words,) = commands(done)
        assert {f"--accelerator-type={kind}", f"--version={image}", "--spot"} < set(words)
    else:
        assert done.returncode == 2 and f"TYPE={kind}" in done.stderr


@pytest.mark.parametrize(
    "script, args, settings, missing",
    [
        (POD, ["create"], {}, "NAME is not set"),
        (POD, ["create"], {"NAME": "salt"}, "ZONE is not set"),
        (POD, ["run"], SLICE, "CONFIG is not set"),
        (POD, ["run"], {**SLICE, "CONFIG": "configs/sc_dmd.py"}, "WORKDIR is not set"),
        (POD, ["run"], {**SLICE, **RUN, "WORKDIR": "runs/mine"}, "is on the disk of each host"),
        (POD, ["rnu"], SLICE, "say what to do"),
        (POD, [], SLICE, "say what to do"),
        (SLURM, [], {}, "CONFIG is not set"),
        (SLURM, [], {"CONFIG": "configs/sc_dmd.py"}, "WORKDIR is not set"),
    ],
)
def test_a_missing_setting_is_one_sentence(script, args, settings, missing):
    done = shell(script, "--dry-run", *args, **settings)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and missing in line


def test_the_run_on_a_slice_is_a_command_of_launch_train():
    cache = {"JAX_COMPILATION_CACHE_DIR": "gs://bucket/jax cache"}
    (words,) = commands(shell(POD, "--dry-run", "run", *OVERRIDES, **SLICE, **RUN, **cache))
    assert "--worker=all" in words
    remote = next(word for word in words if word.startswith("--command="))
    words = shlex.split(remote)
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/jax cache" in words
    config = config_of(words[: words.index("</dev/null")])
    assert config["mesh"]["fsdp"] == 16 and config["sample"]["num_steps"] == [2, 4]


@pytest.mark.parametrize("program", ["sample", "encode"])
def test_other_programs_run_on_every_host_too(program):
    where = {"WORKDIR": RUN["WORKDIR"]} if program == "sample" else {}
    args = ["--prompts=gs://bucket/prompts.txt"]
    (words,) = commands(shell(POD, "--dry-run", "run", *args, PROGRAM=program, **SLICE, **where))
    remote = shlex.split(next(word for word in words if word.startswith("--command=")))
    start = remote.index(f"launch.{program}")
    told = remote[start + 1 : remote.index("</dev/null")]
    assert told == [f"--workdir={value}" for value in where.values()] + args


# A host of a slice: a command runs there in a home of its own.
HOST = (
    'for word; do case $word in --command=*) cd "$HOME" && exec bash -c "${word#*=}" ;; esac; done'
)
# A run that saves when it is asked to.
TRAINS = 'echo "$JAX_PLATFORMS $*"; trap "echo saved; exit 75" TERM; while :; do sleep .1; done'


def until(text: str, file: Path) -> str:
    for _ in range(100):
        if file.exists() and text in file.read_text():
            return file.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{text!r} is not in {file}")


def test_a_run_on_a_slice_starts_once_and_is_stopped_by_a_signal(tmp_path):
    path, log = programs(tmp_path / "bin", gcloud=HOST), tmp_path / "salt_jax" / "train.log"
    (log.parent / ".venv").mkdir(parents=True)
    programs(log.parent / ".venv" / "bin", python=TRAINS)
    around = {"path": path, "HOME": str(tmp_path), **SLICE, **RUN}
    assert shell(POD, "run", *OVERRIDES, **around).returncode == 0
    try:
        assert "tpu,cpu -m launch.train --config=" in until(OVERRIDES[-1], log)
        second = shell(POD, "run", **around)
        assert second.returncode == 2 and "a run is under way" in second.stderr
    finally:
        assert shell(POD, "stop", **around).returncode == 0
    assert until("== exit code 75", log).splitlines()[-2:] == ["saved", "== exit code 75"]
    assert shell(POD, "run", **around).returncode == 0  # and goes on
    until("launch.train", log)
    assert shell(POD, "stop", **around).returncode == 0
    until("== exit code 75", log)


def test_a_dry_run_of_slurm_prints_the_command_of_the_step():
    (words,) = commands(shell(SLURM, "--dry-run", *OVERRIDES, **RUN))
    assert words[0] == "srun" and "--kill-on-bad-exit=0" in words
    assert config_of(words)["mesh"]["fsdp"] == 16


def test_options_of_sbatch_are_what_the_document_says():
    text = SLURM.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "requeue" in options
    signal, seconds = options["signal"].split("@")
    assert signal == "TERM" and int(seconds) >= 120  # of the tasks: B: would signal the shell alone
    # SLURM reads them up to the first command.
    assert text.rindex("\n#SBATCH") < text.index("\nset -e")


@pytest.mark.parametrize(
    "code, state, restarts, requeued",
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),  # a mistake in the command comes again
        (STOPPED, "RUNNING", 99, True),
        (STOPPED, "CANCELLED", 0, False),
        (134, "RUNNING", 4, True),
        (134, "RUNNING", 5, False),
    ],
)
def test_a_job_of_slurm_is_requeued_where_it_can_go_on(code, state, restarts, requeued, tmp_path):
    path = programs(
        tmp_path / "bin",
        srun=f'echo "$*" >{tmp_path}/step; exit {code}',
        squeue=f"echo {state}",
        scontrol=f'echo "$*" >{tmp_path}/requeued',
    )
    copy = shutil.copy(SLURM, tmp_path / "slurm_script")  # as sbatch does
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "SLURM_RESTART_COUNT": str(restarts)}
    settings = {"SCRIPT": str(copy), "PYTHON": sys.executable, **RUN, **job}
    inside = f'cd {ROOT} && bash "$SCRIPT" {" ".join(map(shlex.quote, OVERRIDES))}'
    (tmp_path / "submit").write_text(inside)
    done = shell(tmp_path / "submit", path=path, **settings)
    assert done.returncode == code and f"== exit code {code}" in done.stdout
    assert "--cpus-per-task=4" in (tmp_path / "step").read_text()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_run_needs_no_git(monkeypatch):
    """The image of launch/Dockerfile has none."""
    monkeypatch.setenv("PATH", "")
    assert app.commit() is None


def jobset() -> tuple[dict, dict, dict]:
    told = yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())
    CHECK.validate(told)
    job = told["spec"]["replicatedJobs"][0]["template"]["spec"]
    return told, job, job["template"]["spec"]


def test_gke_has_as_many_chips_as_its_topology():
    _, job, pod = jobset()
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"][f"{GKE}tpu-topology"].split("x")))
    each = container["resources"]
    assert each["limits"] == each["requests"] == {"google.com/tpu": 4}
    assert job["parallelism"] == job["completions"] == chips // 4
    config = config_of([*container["command"], *container["args"]])
    assert config["mesh"]["data"] == -1  # the rest, which is 1:
    assert math.prod(config["mesh"].values()) == -chips
    assert config["batch_size"] % chips == 0


def test_gke_sets_what_jax_reads():
    told, job, pod = jobset()
    assert told["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": f"{GKE}nodepool"
    }
    assert set(pod["nodeSelector"]) == {f"{GKE}tpu-accelerator", f"{GKE}tpu-topology"}
    names = {entry["name"] for entry in pod["containers"][0]["env"]}
    for name in names - {"PYTHONUNBUFFERED"}:
        assert name.lower() in jax.config.values, name
    # What GKE sets is set by nobody else: for an indexed job, by these names of its own.
    assert job["completionMode"] == "Indexed"
    for name in re.findall(r"TPU_WORKER_\w+", (ROOT / "launch" / "gke.yaml").read_text()):
        assert name in inspect.getsource(cloud_tpu_cluster) and name not in names


def test_gke_restarts_all_hosts_of_a_run_that_was_stopped():
    told, job, pod = jobset()
    (rule,) = told["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    exits = [r["onExitCodes"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r]
    assert [e["values"] for e in exits] == [[STOPPED]]
    assert pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize(
    "right, wrong",
    [("maxRestarts:", "maxRestart:"), ("backoffLimit: 0", "backoffLimit: 3"), ("args:", "arg:")],
)
def test_a_mistake_in_a_jobset_is_found_without_a_cluster(right, wrong):
    text = (ROOT / "launch" / "gke.yaml").read_text()
    assert text.count(right) == 1
    with pytest.raises(jsonschema.ValidationError):
        CHECK.validate(yaml.safe_load(text.replace(right, wrong)))
