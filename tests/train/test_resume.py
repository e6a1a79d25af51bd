"""A run that is killed and started again does what it would have done: same bits, same numbers in
the log.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from configs import base
from salt_jax.checkpoint import open_checkpoints, save
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.errors import UserError
from salt_jax.optimizer import make_optimizer
from salt_jax.state import init_learner, init_state
from salt_jax.train.loop import resume, train
from tests.helpers import ROOT
from tests.same_bits import arrays, scalars

SMALL = {"weights": "", "batch_size": 4, "log_every": 1, "ema.start": 2}
SMALL |= {"data.num_train": 24, "data.num_test": 1}  # an epoch is two or three iterations
CAUSAL = {
    "world.frames": 6,
    "sample.num_steps": (2,),
    "schedule.train_levels": 4,
    "schedule.anchor_levels": 2,
}
ROLLOUT = {"video": "rollout", "teacher.kind": "closed_form", "critic_ratio": 1}
ROLLOUT |= {"rollout.num_steps": (2, 4), "rollout.probabilities": (0.5, 0.5)}
STREAM = {"memory.window": 9, "memory.sink": 3, "stream.max_frames": 21, "stream.switch": 1.0}


class Case(NamedTuple):
    """A run that is stopped after `half` of its updates: what it is, and what its log then tells
    of.
    """

    options: dict[str, Any]
    updates: int
    half: int
    terms: set[str]


CASES = {
    "noised": Case(
        {"teacher.kind": "closed_form", "critic_ratio": 2},
        12,
        4,
        {"dmd", "self_consistency", "critic"},
    ),
    # Seed 0: before and after the stop some updates have the one term, some the other.
    "rollout": Case(
        CAUSAL | ROLLOUT | {"align.weight": 0.5, "align.probability": 1.0},
        6,
        2,
        {"dmd", "self_consistency", "alignment", "critic"},
    ),
    # Six updates a sequence, of student and critic in turn. Seed 2: it changes its prompt, stops,
    # and goes on.
    "stream": Case(CAUSAL | ROLLOUT | STREAM | {"seed": 2}, 6, 2, {"dmd", "critic"}),
    "teacher_forcing": Case(CAUSAL | {"stage": "teacher_forcing"}, 12, 4, {"teacher_forcing"}),
    "consistency": Case(
        CAUSAL | {"stage": "consistency", "ode.num_steps": 8}, 12, 4, {"consistency"}
    ),
    "ode_regression": Case(
        CAUSAL | {"stage": "ode_regression", "ode.num_steps": 8, "ode.trajectories": 160},
        12,
        4,
        {"ode_regression"},
    ),
}


def start(case, workdir, data):
    """`python -m launch.train` of a fresh network in another process."""
    options = (
        SMALL
        | case.options
        | {"iterations": case.updates, "save_every": case.half, "data.dir": data}
    )
    command = [sys.executable, "-m", "launch.train", f"--config={ROOT}/configs/base.py"]
    command += [
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what takes long here is compiling
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def finish(process, workdir):
    assert process.wait(timeout=500) == 0, Path(f"{workdir}.log").read_text()


def kill_once_there_is(path, process, workdir):
    """kill -9 as soon as a file appears."""
    deadline = time.monotonic() + 500
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, Path(
            f"{workdir}.log"
        ).read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def commit(workdir, step):
    """The file that is written when a checkpoint is whole."""
    return workdir / "checkpoints" / str(step) / "commit_success.txt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(case) -> the workdir of a run that nobody killed, made once; they share a place for data."""
    root = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(name):
        finish(start(CASES[name], root / name, root / "data"), root / name)
        return root / name

    return run


def assert_same_end(whole, other, updates):
    wanted, found = arrays(whole, updates), arrays(other, updates)
    assert wanted.keys() == found.keys() and len(wanted) > 50
    assert [path for path in wanted if wanted[path] != found[path]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_and_started_again_is_never_killed(name, runs, tmp_path):
    case, whole, killed = CASES[name], runs(name), tmp_path / "killed"
    data = whole.parent / "data"
    kill_once_there_is(commit(killed, case.half), start(case, killed, data), killed)
    assert not commit(killed, case.updates).exists(), "killed too late to tell"
    (before,) = killed.glob("events.*")
    finish(start(case, killed, data), killed)

    assert_same_end(whole, killed, case.updates)
    (after,) = set(killed.glob("events.*")) - {before}
    (log,) = whole.glob("events.*")
    told, full = scalars(after), scalars(log)
    steps = {step for _, step in told}
    assert max(steps) == case.updates and min(steps) > case.half
    assert {step for _, step in full} == set(range(1, case.updates + 1))
    assert case.terms | {"student_grad_norm"} <= {tag for tag, _ in told}
    assert told == {key: value for key, value in full.items() if key[1] in steps}
    assert ("stream" in name) == (killed / "checkpoints" / str(case.updates) / "stream").is_dir()


@pytest.mark.slow
def test_killed_while_trajectories_are_made_it_keeps_those_that_are_done(runs, tmp_path):
    case, whole, killed = CASES["ode_regression"], runs("ode_regression"), tmp_path / "killed"
    data, parts = whole.parent / "data", 40
    first = killed / "trajectories" / "00000.safetensors"
    kill_once_there_is(first, start(case, killed, data), killed)
    done = {path: path.stat().st_mtime_ns for path in first.parent.glob("*.safetensors")}
    assert 1 <= len(done) < parts, "killed too late to tell"
    finish(start(case, killed, data), killed)

    names = sorted(path.name for path in first.parent.glob("*.safetensors"))
    assert len(names) == parts and all(
        path.stat().st_mtime_ns == time for path, time in done.items()
    )
    for name in names:
        assert (first.parent / name).read_bytes() == (whole / "trajectories" / name).read_bytes()
    assert_same_end(whole, killed, case.updates)


def test_a_run_whose_learning_rate_decays_keeps_its_length(tmp_path):
    """Every update's learning rate depends on how many there are."""
    recipe = read_recipe(base.get_config())
    recipe = replace(recipe, critic_optimizer=replace(recipe.critic_optimizer, decay=True))
    learner = init_learner({"w": jnp.arange(3.0)}, make_optimizer(recipe.student_optimizer, 10))
    state = init_state({"student": learner, "critic": learner})
    with open_checkpoints(tmp_path, 2) as manager:
        save(manager, state, {"config": to_json(recipe), "mesh": {}})
        manager.wait_until_finished()
        resume(manager, state, replace(recipe, log_every=3))
        with pytest.raises(UserError, match=r"config\.iterations = 60, not 200"):
            resume(manager, state, replace(recipe, iterations=200))


def test_a_workdir_goes_on_with_the_same_config_only_but_may_be_longer_or_elsewhere(tmp_path):
    recipe = read_recipe(base.get_config())
    learner = init_learner({"w": jnp.arange(3.0)}, make_optimizer(recipe.student_optimizer, 10))
    state = replace(init_state({"student": learner, "critic": learner}), iteration=jnp.int32(7))
    with open_checkpoints(tmp_path, 2) as manager:
        save(manager, state, {"config": to_json(recipe), "mesh": {}})
        manager.wait_until_finished()
        fresh = replace(state, iteration=jnp.int32(0))
        same = replace(
            recipe, iterations=200, log_every=3, data=replace(recipe.data, dir="elsewhere")
        )
        assert int(resume(manager, fresh, same).iteration) == 7
        for changed in (
            replace(recipe, batch_size=16),
            replace(recipe, data=replace(recipe.data, seed=1)),
            replace(recipe, loss=replace(recipe.loss, self_consistency=0.0)),
        ):
            with pytest.raises(
                UserError,
                match=r"config\.(batch_size|data\.seed|loss\.self_consistency) = .*--workdir",
            ):
                resume(manager, fresh, changed)


def test_a_workdir_that_cannot_be_written_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "file").write_text("I am no directory")
    config = base.get_config()
    config.weights = str(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="cannot write to the workdir"):
        train(read_recipe(config), tmp_path / "file" / "run")
