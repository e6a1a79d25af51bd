"""A run that is killed and started again does what it would have done: same bits, same numbers in the log."""

import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs import base
from salt_jax.errors import UserError
from salt_jax.train.checkpoint import open_checkpoints, save
from salt_jax.train.loop import resume
from salt_jax.train.recipe import make_optimizer, read_recipe, to_json
from salt_jax.train.sharding import make_mesh
from salt_jax.train.state import init_learner, init_state

ROOT = Path(__file__).parents[2]
UPDATES, HALF = 12, 4


def start(workdir, data):
    """`python -m launch.train` of a distillation of the closed form by a fresh network, in another process."""
    options = {
        "weights": "",
        "teacher.kind": "closed_form",
        "batch_size": 4,
        "updates": UPDATES,
        "save_every": HALF,
    }
    options |= {"log_every": 1, "critic_updates": 2, "ema.start": 2, "data.dir": data}
    options |= {"data.num_train": 24, "data.num_test": 1}  # an epoch is two iterations
    command = [sys.executable, "-m", "launch.train", f"--config={ROOT}/configs/shapes_sc_dmd.py"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in options.items())]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def scalars(file):
    """{(name, update): value} of a TensorBoard file: records of length, checksum, event, checksum."""
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    return found


def arrays(workdir, step):
    """Every array of a checkpoint, as bytes."""
    with open_checkpoints(workdir, 2) as manager:
        assert manager.latest_step() == step
        names = ("student", "student_opt", "ema", "critic", "critic_opt")
        trees = {name: manager.restore(step)[name] for name in names}
    return {
        jax.tree_util.keystr(path): x.tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(trees))
    }


@pytest.mark.slow
def test_killed_and_started_again_is_never_killed(tmp_path):
    whole, killed, data = tmp_path / "whole", tmp_path / "killed", tmp_path / "data"
    assert start(whole, data).wait(timeout=500) == 0, Path(f"{whole}.log").read_text()

    process, committed = start(killed, data), killed / "checkpoints" / str(HALF) / "commit_success.txt"
    deadline = time.monotonic() + 500
    while not committed.exists():
        assert process.poll() is None and time.monotonic() < deadline, Path(f"{killed}.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "checkpoints" / str(UPDATES) / "commit_success.txt").exists(), (
        "killed too late to tell"
    )
    (before,) = killed.glob("events.*")
    assert start(killed, data).wait(timeout=500) == 0, Path(f"{killed}.log").read_text()

    wanted, found = arrays(whole, UPDATES), arrays(killed, UPDATES)
    assert wanted.keys() == found.keys() and len(wanted) > 100
    assert [path for path in wanted if wanted[path] != found[path]] == []
    (after,) = set(killed.glob("events.*")) - {before}
    (log,) = whole.glob("events.*")
    told, full = scalars(after), scalars(log)
    steps = {step for _, step in told}
    assert (
        max(steps) == UPDATES
        and min(steps) > HALF
        and {step for _, step in full} == set(range(1, UPDATES + 1))
    )
    assert {"dmd", "self_consistency", "critic", "student_grad_norm"} <= {name for name, _ in told}
    assert told == {key: value for key, value in full.items() if key[1] in steps}


def test_a_run_whose_learning_rate_decays_keeps_its_length(tmp_path):
    """Every update's learning rate depends on how many there are."""
    recipe = read_recipe(base.get_config())
    recipe = replace(recipe, critic_optimizer=replace(recipe.critic_optimizer, decay=True))
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    learner = init_learner({"w": jnp.arange(3.0)}, make_optimizer(recipe.student_optimizer, 10))
    state = init_state(learner, learner)
    with open_checkpoints(tmp_path, 2) as manager:
        save(manager, state, {"config": to_json(recipe), "mesh": {}})
        manager.wait_until_finished()
        resume(manager, state, mesh, replace(recipe, log_every=3))
        with pytest.raises(UserError, match=r"config\.updates = 60, not 200"):
            resume(manager, state, mesh, replace(recipe, updates=200))


def test_a_workdir_goes_on_with_the_same_config_only_but_may_be_longer_or_elsewhere(tmp_path):
    recipe = read_recipe(base.get_config())
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    learner = init_learner({"w": jnp.arange(3.0)}, make_optimizer(recipe.student_optimizer, 10))
    state = replace(init_state(learner, learner), step=jnp.int32(7))
    with open_checkpoints(tmp_path, 2) as manager:
        assert int(resume(manager, state, mesh, recipe).step) == 7
        save(manager, state, {"config": to_json(recipe), "mesh": {}})
        manager.wait_until_finished()
        fresh = replace(state, step=jnp.int32(0))
        same = replace(recipe, updates=200, log_every=3, data=replace(recipe.data, dir="elsewhere"))
        assert int(resume(manager, fresh, mesh, same).step) == 7
        for changed in (
            replace(recipe, batch_size=16),
            replace(recipe, data=replace(recipe.data, seed=1)),
            replace(recipe, loss=replace(recipe.loss, self_consistency=0.0)),
        ):
            with pytest.raises(UserError, match=r"config\.(batch_size|data|loss) = .*--workdir"):
                resume(manager, fresh, mesh, changed)
