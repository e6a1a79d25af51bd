"""Two real processes compute what one does, in every family of recipes and on meshes whose batch
axes cover the processes or not; they are stopped, killed and resumed.
"""

import signal
import time

import numpy as np
import pytest

from tests.launch import processes
from tests.same_bits import numbers, scalars

SMALL = {"weights": "", "batch_size": 8, "log_every": 1, "ema.start": 1}
SMALL |= {"data.num_train": 24, "data.num_test": 1, "iterations": 2, "critic_ratio": 1}
SMALL |= {"teacher.kind": "closed_form"}
CAUSAL = {"world.frames": 6, "sample.num_steps": (2,)}
CAUSAL |= {"schedule.train_levels": 4, "schedule.anchor_levels": 2}
ROLLOUT = CAUSAL | {"video": "rollout", "rollout.num_steps": (2, 4)}
ROLLOUT |= {"rollout.probabilities": (0.5, 0.5)}
ALIGNED = {"align.weight": 0.5, "align.probability": 1.0}
STREAM = {"memory.window": 9, "memory.sink": 3, "stream.max_frames": 21, "stream.switch": 1.0}
ODE = {"stage": "ode_regression", "weights": "shapes_teacher", "ode.num_steps": 8}
ODE |= {"ode.trajectories": 16, "teacher.kind": "network"}
COVERED = {"mesh.data": 2, "mesh.fsdp": 4}
UNCOVERED = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8}
HALF = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
CASES = {  # what is trained on which mesh of 8 devices
    "whole clips, batch axes in one process": UNCOVERED,
    "rollout with mixed steps and alignment": ROLLOUT | ALIGNED | HALF,
    "streaming with LoRA": ROLLOUT
    | STREAM
    | {"seed": 2, "lora.rank": 2, "lora.alpha": 2}
    | COVERED,
    "trajectories": CAUSAL | ODE | HALF,
}
# An all-reduce over two processes adds in another order than one inside a process, and Adam makes
# a step of 2e-4 also of a gradient that is little more than rounding. Measured: 9e-7 of DMD, 1.1e-5
# of trajectories. Of another batch nearly every number would differ by the step.
BOUND = 4e-5


def scalars_of(workdir):
    (file,) = workdir.glob("events.*")
    return scalars(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_of_four_devices_are_one_of_eight(name, tmp_path):
    options = SMALL | CASES[name] | {"data.dir": tmp_path / "data"}
    processes.train(tmp_path / "one", options, 1, 8)
    processes.train(tmp_path / "two", options, 2, 4)
    one, two = (numbers(tmp_path / workdir, 2) for workdir in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 50
    for path, wanted in one.items():
        np.testing.assert_allclose(two[path], wanted, rtol=1e-4, atol=BOUND, err_msg=path)
    wanted, found = (scalars_of(tmp_path / workdir) for workdir in ("one", "two"))
    assert wanted.keys() == found.keys()
    assert len({step for _, step in wanted}) == 2
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-3, atol=1e-5)
    assert all(value != 0 for (tag, _), value in wanted.items() if tag.startswith("ode"))
    assert not list((tmp_path / "two").glob("*.partial"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes that nobody stopped: the options, and its workdir."""
    root = tmp_path_factory.mktemp("pair")
    options = {
        "stage": "denoising",
        "teacher.kind": "data",
        "weights": "",
        "batch_size": 2,
        "log_every": 1,
    }
    options |= {"data.num_train": 24, "data.num_test": 1, "data.dir": root / "data"}
    options |= {"iterations": 16, "save_every": 8, "mesh.data": 1, "mesh.fsdp": 2}
    processes.train(root / "whole", options, 2, 1)
    return options, root / "whole"


def assert_same_bits(whole, other):
    wanted, found = numbers(whole, 16), numbers(other, 16)
    assert wanted.keys() == found.keys()
    for path, x in wanted.items():
        assert x.tobytes() == found[path].tobytes(), path


@pytest.mark.slow
def test_with_one_device_each_the_bits_are_those_of_one_process(pair, tmp_path):
    """A sum of two numbers has one order."""
    options, whole = pair
    processes.train(tmp_path / "one", options, 1, 2)
    assert_same_bits(whole, tmp_path / "one")


@pytest.mark.slow
def test_a_stopped_run_is_saved_once_and_goes_on_bit_for_bit(pair, tmp_path):
    options, whole = pair
    run = tmp_path / "run"
    found = processes.start(run, options, 2, 1)
    processes.until(lambda: "denoising=" in processes.text(run), found, run)
    for process in found:
        process.send_signal(signal.SIGTERM)
    processes.finish(found, run, codes=(75,))
    steps = {int(path.name) for path in (run / "checkpoints").iterdir()}
    step = max(steps)
    assert 1 <= step < 16 and steps <= {8, step}
    assert f"stopped at iteration {step} of 16, which is saved" in processes.text(run, 1)
    assert not (run / "lock.json").exists()
    processes.train(run, options, 2, 1)
    assert_same_bits(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_who_loses_another_ends_with_a_sentence_and_both_resume(victim, pair, tmp_path):
    options, whole = pair
    run = tmp_path / "run"
    found = processes.start(run, options, 2, 1)
    saved = run / "checkpoints" / "8" / "commit_success.txt"
    processes.until(saved.exists, found, run)
    found[victim].kill()
    begun = time.monotonic()
    assert found[1 - victim].wait(timeout=100) != 0
    assert time.monotonic() - begun < 60
    time.sleep(1)  # the sentence comes from a process that outlives it
    assert "start all of them again with the same command" in processes.text(run, 1 - victim)
    processes.train(run, options, 1, 2)  # on another number of processes
    assert_same_bits(whole, run)
