"""Runs of several real processes on this machine, each with devices of its own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax

from tests.helpers import ROOT


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(workdir, options, processes=1, devices=1, **environment):
    """`launch.train` of configs/base.py as so many processes with so many CPU devices each.

    Their output goes to WORKDIR.0.log, ..; WORKDIR is not made.
    """
    args = [f"--config={ROOT}/configs/base.py", f"--workdir={workdir}"]
    args += [f"--config.{k}={v}" for k, v in options.items()]
    return launch("train", [args] * processes, workdir, devices, **environment)


def launch(name, args, logs, devices=1, **environment):
    """`launch.NAME` as one process for each list of arguments; output goes to LOGS.0.log, .."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what takes long here is compiling
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    env.pop("XLA_FLAGS", None)
    several, found = [f"--coordinator=localhost:{free_port()}", f"--num_processes={len(args)}"], []
    for i, mine in enumerate(args):
        more = [*several, f"--process_id={i}"] if len(args) > 1 else []
        command = [sys.executable, "-m", f"launch.{name}", *mine, *more]
        with open(f"{logs}.{i}.log", "a") as log:
            found.append(
                subprocess.Popen(command, cwd=ROOT, env=env | environment, stdout=log, stderr=log)
            )
    return found


def text(workdir, process=0):
    return Path(f"{workdir}.{process}.log").read_text()


def finish(found, workdir, codes=(0,)):
    """Waits for all of them, and for these exit codes."""
    ends = [process.wait(timeout=600) for process in found]
    for i, code in enumerate(ends):
        assert code in codes, f"process {i} ended with {code}: {text(workdir, i)[-3000:]}"


def train(workdir, options, processes=1, devices=1):
    finish(start(workdir, options, processes, devices), workdir)


def until(there, found, workdir, limit=500):
    """Waits for something that a run does. It fails where the run ends before."""
    deadline = time.monotonic() + limit
    while not there():
        assert all(process.poll() is None for process in found), text(workdir)[-3000:]
        assert time.monotonic() < deadline, text(workdir)[-3000:]
        time.sleep(0.01)
