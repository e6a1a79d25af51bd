"""Who may write to a workdir."""

import json
import os
import subprocess
import sys
import threading

import pytest

from salt_jax.errors import UserError
from salt_jax.io import lock
from salt_jax.io.lock import locked

HOLDS = """
import sys, time
from salt_jax.io.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "LAPSE", 0.6)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(path, beat=0):
    """A lock that another machine has written."""
    entry = {"owner": "other", "host": "tpu-7 pid:[1]", "pid": 4, "born": "1", "beat": beat}
    path.write_text(json.dumps(entry))


def test_it_is_there_while_it_is_held(tmp_path):
    with locked(tmp_path) as held:
        found = json.loads((tmp_path / "lock.json").read_text())
        assert found["pid"] == os.getpid() and not held.lost
    assert list(tmp_path.iterdir()) == []


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / "lock.json").exists()


def test_a_second_run_is_refused_at_once_and_the_first_keeps_it(other, tmp_path):
    refusal = f"is in use by another run .process {other.pid} on .*pass another --workdir"
    with pytest.raises(UserError, match=refusal), locked(tmp_path):
        pass
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == other.pid


@pytest.mark.parametrize("reaped", [False, True])
def test_a_run_of_this_machine_that_was_killed_has_it_no_more(other, tmp_path, reaped):
    """Also where its parent has not asked how it ended."""
    other.kill()
    if reaped:
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path):
        pass


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
    with locked(tmp_path):
        entry = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(entry | {"born": "1"}))
    with locked(tmp_path):
        pass


def test_a_lock_of_another_machine_lapses(quick, tmp_path, capsys):
    elsewhere(tmp_path / "lock.json")
    with locked(tmp_path):
        pass
    assert "process 4 on tpu-7" in capsys.readouterr().out


def test_a_lock_of_another_machine_that_changes_is_held(quick, tmp_path):
    path = tmp_path / "lock.json"
    elsewhere(path)
    timer = threading.Timer(0.2, elsewhere, [path, 1])
    timer.start()
    with pytest.raises(UserError, match=r"in use by another run .process 4 on tpu-7"):
        with locked(tmp_path):
            pass
    timer.join()
    assert path.exists()


def test_it_is_written_anew_and_who_lost_it_is_told(quick, tmp_path):
    path = tmp_path / "lock.json"
    with locked(tmp_path) as held:
        beat = threading.Event()
        while json.loads(path.read_text())["beat"] < 3:
            beat.wait(0.01)
        held.refuse_lost()
        elsewhere(path)
        while not held.lost:
            beat.wait(0.01)
        with pytest.raises(UserError, match="another run has taken"):
            held.refuse_lost()
    assert json.loads(path.read_text())["owner"] == "other"  # it is not ours to remove


def test_a_damaged_lock_lapses(quick, tmp_path):
    (tmp_path / "lock.json").write_text('{"owner": ')
    with locked(tmp_path):
        pass


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    ready = "import sys; sys.stdin.readline()\n"
    command = [sys.executable, "-c", ready + HOLDS.replace("100", "3"), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    found = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for process in found:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in found]
    assert sum(out == "held\n" for out, _ in outputs) == 1, outputs
    assert sum("in use by another run" in err for _, err in outputs) == 3, outputs


def test_a_beat_that_fails_is_no_loss(quick, tmp_path, monkeypatch, caplog):
    path = tmp_path / "lock.json"
    with locked(tmp_path) as held:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "write_whole", lambda *_: 1 / 0)  # what buckets raise is no OSError
            wait = threading.Event()
            while "others see no beat" not in caplog.text:
                wait.wait(0.01)
            path.write_text("")  # as a reader sees a file that is being replaced
            wait.wait(0.2)
        before = json.loads(path.read_text() or '{"beat": 0}')["beat"]
        while json.loads(path.read_text() or '{"beat": 0}')["beat"] <= before:
            wait.wait(0.01)
        assert not held.lost
