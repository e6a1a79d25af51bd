"""SIGTERM, SIGINT, a second run and a full disk: a run ends with a sentence and a code, and what
was trained is saved.
"""

import os
import signal
import subprocess

import pytest

from salt_jax.checkpoint import restore_step
from salt_jax.errors import STOPPED
from tests.helpers import mesh_of
from tests.launch import processes

SMALL = {"stage": "denoising", "teacher.kind": "data", "weights": "", "batch_size": 2}
SMALL |= {"data.num_train": 4, "data.num_test": 1, "log_every": 1}


@pytest.fixture
def options(tmp_path_factory):
    """Of a run that takes very long."""
    data = tmp_path_factory.getbasetemp() / "data"
    return SMALL | {"data.dir": data, "iterations": 100000, "save_every": 100000}


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def is_at_work(workdir):
    return lambda: (
        "/100000 [" in processes.text(workdir) and "denoising=" in processes.text(workdir)
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_iteration_finish_and_be_saved(options, tmp_path, number):
    run = tmp_path / "run"
    (process,) = processes.start(run, options)
    processes.until(is_at_work(run), [process], run)
    process.send_signal(number)
    processes.finish([process], run, codes=(STOPPED,))
    (step,) = steps(run)
    assert restore_step(run, "ema", mesh_of())[0] == step
    said = processes.text(run)
    assert f"{number.name}: this iteration is finished and saved first" in said
    assert f"stopped at iteration {step} of 100000, which is saved; the same command" in said
    assert "Traceback" not in said
    assert not (run / "lock.json").exists()
    # and it goes on
    processes.train(run, options | {"iterations": step + 2})
    assert max(steps(run)) == step + 2


def test_while_the_first_program_is_compiled_a_run_ends_at_once(options, tmp_path):
    """It has nothing to lose, and the compiler would take long."""
    run = tmp_path / "run"
    # with all effort and no cache it takes longer than `stop` is patient
    slow = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    (process,) = processes.start(run, options, **slow)
    processes.until(lambda: "0/100000" in processes.text(run), [process], run)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == STOPPED, processes.text(run)
    assert "before the first iteration" in processes.text(run)
    assert steps(run) == [] and not (run / "lock.json").exists()


def test_a_second_signal_ends_it_at_once(options, tmp_path):
    run = tmp_path / "run"
    (process,) = processes.start(run, options)
    processes.until(is_at_work(run), [process], run)
    # it cannot come to the end of its iteration
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == STOPPED
    assert not (run / "lock.json").exists()


def test_a_second_run_on_the_workdir_is_refused_and_the_first_goes_on(options, tmp_path):
    run = tmp_path / "run"
    (first,) = processes.start(run, options)
    processes.until(is_at_work(run), [first], run)
    second = processes.start(run, options)
    processes.finish(second, run, codes=(2,))
    said = processes.text(run)
    assert f"is in use by another run (process {first.pid} on " in said and "Traceback" not in said
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    processes.finish([first], run, codes=(STOPPED,))
    assert len(steps(run)) == 1


def test_checkpoints_by_the_minute(options, tmp_path):
    often = {"iterations": 3, "save_every_minutes": 1e-6, "keep": 9}
    processes.train(tmp_path / "run", options | often)
    assert steps(tmp_path / "run") == [1, 2, 3]


def test_a_full_disk_is_a_sentence_and_what_was_saved_is_whole(options, tmp_path):
    """A file system of 45 MB has room for one checkpoint of 31 MB."""
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    run.symlink_to(disk)  # what is said goes to another disk
    command = ["mount", "-t", "tmpfs", "-o", "size=45m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        (process,) = processes.start(run, options | {"save_every": 2, "log_every": 1})
        processes.finish([process], run, codes=(2,))
        said = processes.text(run)
        assert "the disk is full" in said and "Traceback" not in said.split("error: ")[-1]
        assert "step 2 is whole" in said
        assert restore_step(run, "ema", mesh_of())[0] == 2
        assert not (run / "lock.json").exists()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
