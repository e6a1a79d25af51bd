"""How a program knows that it is one of several processes."""

import importlib.util
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from salt_jax.cli import processes
from salt_jax.cli.processes import Cluster
from salt_jax.errors import UserError
from tests.helpers import ROOT
from tests.launch.processes import free_port
from tests.launch.programs import program

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
SLURM |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def parsed():
    """Flags that nobody has given."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
    "env, found",
    [
        ({}, None),
        (SLURM, Cluster()),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, Cluster()),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, Cluster(devices=list(range(8)))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "3"}, Cluster()),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({key: SLURM[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")}, None),  # salloc alone
        (OMPI, Cluster()),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_schedulers_are_known_by_their_variables(env, found):
    assert processes._cluster(env) == found


@pytest.mark.parametrize(
    "platforms, library, found",
    [
        (None, True, Cluster()),
        ("tpu,cpu", True, Cluster()),
        ("cpu", True, None),
        (None, False, None),
    ],
)
def test_hosts_of_a_slice_are_known_by_their_chips(monkeypatch, platforms, library, found):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library or None)
    assert processes._cluster({"JAX_PLATFORMS": platforms} if platforms else {}) == found


def test_flags_say_it_elsewhere():
    with flagsaver.as_parsed(coordinator="10.0.0.1:12", num_processes="4", process_id="3"):
        assert processes._cluster({}) == Cluster("10.0.0.1:12", 4, 3)
    with flagsaver.as_parsed(coordinator="h:1", num_processes="1", process_id="0"):
        assert processes._cluster(SLURM) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "h:1"}, "belong together; give all"),
        ({"coordinator": "h", "num_processes": "2", "process_id": "0"}, "has to be HOST:PORT"),
        (
            {"coordinator": "h:1", "num_processes": "2", "process_id": "2"},
            "below --num_processes=2",
        ),
        ({"coordinator": "h:1", "num_processes": "2", "process_id": "-1"}, "0 or more"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given, message):
    with flagsaver.as_parsed(**given), pytest.raises(UserError, match=message):
        processes._cluster({})


def test_who_finds_nobody_says_so(monkeypatch):
    monkeypatch.setattr(processes, "JOIN", 2)
    with flagsaver.as_parsed(coordinator="localhost:1", num_processes="2", process_id="1"):
        with pytest.raises(UserError, match="did not find each other within 2 s"):
            with processes.joined(lambda: None):
                pass


@pytest.mark.slow
def test_who_waits_in_vain_ends_with_a_sentence(tmp_path):
    """JAX ends a process whose peers do not come: the sentence outlives it."""
    code = "from salt_jax.cli import export, processes; processes.JOIN = 3; export.run()"
    others = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    flags = [f"--workdir={tmp_path}", f"--dst={tmp_path}/x", *others, "--process_id=0"]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and time.monotonic() - begun < 60
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and " within 3 s" in last and "port of process 0" in last


def test_a_wrong_flag_is_refused_before_anything_runs(tmp_path):
    done = program(
        *("train", "--config=configs/sc_dmd.py", f"--workdir={tmp_path}/run"),
        *("--coordinator=localhost:9", "--num_processes=2"),
    )
    assert done.returncode == 2 and "belong together" in done.stderr
    assert not (tmp_path / "run").exists()
