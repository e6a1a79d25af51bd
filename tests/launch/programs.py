"""The programs as a user runs them, and the videos they write."""

import os
import subprocess
import sys

import av
import numpy as np

from tests.helpers import ROOT

# launch.compile of a recipe with every kind of program, on two devices
WAN_TINY = (
    *("--config=configs/self_forcing.py:wan,salt", "--config.model.preset=wan2.1-t2v-tiny"),
    *("--config.text_encoder=wan-tiny", "--config.data.clip=(3,4,4)", "--config.align.layers=1"),
    *(
        "--config.teacher.preset=",
        "--config.teacher.weights=",
        "--config.weights=",
        "--config.init_from=",
    ),
    *("--config.mesh.fsdp=2", "--config.batch_size=2"),
)


def program(name, *args, tree=ROOT):
    """Runs `python -m launch.NAME` in the root of the repository, or of another checkout, on one
    CPU device.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", f"launch.{name}", *map(str, args)]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def succeed(name, *args, tree=ROOT):
    done = program(name, *args, tree=tree)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def frames(path):
    with av.open(str(path)) as container:
        return np.stack(
            [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        ), container.streams.video[0].average_rate
