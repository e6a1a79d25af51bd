"""python -m launch.measure [--minutes=10] [--into=runs/measure] [--parts=TEXT]

Everything that only an accelerator can tell, in one call: the kernels of attention beside each
other, the updates of Self Forcing with Salt, streaming, memory beside what compiler and plan say,
and diffusers beside ours. Random weights; Wan 2.1's own size on an accelerator, a small one on a
CPU. Each part is a process of its own with a share of the minutes; one that fails is told with its
sentence, and the others go on. Writes INTO/measure.json, and of it INTO/measure.md, a section for
docs/results.md. See launch/measure.sh.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from tqdm import tqdm

from configs import self_forcing
from launch.measure_table import document
from salt_jax.cli.app import made_with, name_files, run_main
from salt_jax.compile.surroundings import last_line
from salt_jax.compile.target import GPU_SHARE
from salt_jax.config.reading import read_recipe
from salt_jax.io.files import as_path, write_whole
from salt_jax.keys import Json
from salt_jax.planning.memory import needed
from salt_jax.sharding import AXES
from salt_jax.stages import make_stage
from salt_jax.stages.networks import attention_kernel

MINUTES = flags.DEFINE_float("minutes", 10.0, "for everything", lower_bound=0.1)
INTO = flags.DEFINE_string("into", "runs/measure", "where the two files are written")
PARTS = flags.DEFINE_string("parts", "", "parts with this in their name alone")
name_files(INTO)

CONFIG = "self_forcing.py:wan,salt"
ONE_DEVICE = {"batch_size": 1, "mesh.data": 1, "mesh.fsdp": -1}
SMALL = {  # on a CPU
    "model.preset": "wan2.1-t2v-tiny",
    "text_encoder": "wan-tiny",
    "teacher.preset": "wan2.1-t2v-tiny",
    "data.clip": (6, 4, 4),
    "align.layers": 1,
}
# The first that fits is measured.
CHOICES = {
    "the 14B teacher": {},
    "the 14B teacher, averages and moments on the host": {"host_state": True},
    "a teacher of 1.3B": {"teacher.preset": "wan2.1-t2v-1.3b"},
    "a teacher of 1.3B, averages and moments on the host": {
        "teacher.preset": "wan2.1-t2v-1.3b",
        "host_state": True,
    },
}
KERNELS = {
    "gpu": ("cudnn", "tokamax", "blocks", "plain"),
    "tpu": ("splash", "tokamax", "plain"),
    "cpu": ("tokamax", "blocks", "plain"),
}
PATIENCE = 10  # seconds in which a process that is interrupted may end its own
PROBE = (
    "import jax, json; d = jax.devices()[0]; m = (d.memory_stats() or {}).get('bytes_limit');"
    "print(json.dumps({'platform': d.platform, 'device': d.device_kind, 'memory_bytes': m}))"
)


class Task(NamedTuple):
    """One process."""

    name: str
    share: float  # of the time, beside the other tasks
    command: tuple[str, ...]  # behind `python -m`, without --json


class Choice(NamedTuple):
    """What the updates are measured with."""

    name: str
    changes: Json  # of the config
    planned_bytes: int  # by launch.plan


def tasks(platform: str, choice: Choice | None) -> list[Task]:
    """Everything to measure on such a device, in the order of what one would miss most."""
    changes = choice.changes if choice else changes_for(platform)
    options = [f"--config.{key}={value}" for key, value in changes.items()]
    config, small = [f"--config=configs/{CONFIG}", *options], ["--vae=tiny", "--runs=2"]
    bench = ["launch.bench", *config, *(small if platform == "cpu" else ())]
    one = lambda name, share, *more: Task(name, share, (*bench, f"--what={name}", *more))
    # an update takes seconds to minutes, so two tell enough
    updates = [one("critic_step", 5, "--runs=2"), one("student_step", 14, "--runs=2")]
    peer = Task("peer", 4, (*bench, "--peer=diffusers", "--what=forward,decode"))
    compiled = Task("compile", 3, ("launch.compile", *config, "--what=critic"))
    return [
        *(one(f"attention_{name}", 2) for name in KERNELS[platform]),
        one("streaming", 4),
        *(updates if choice else []),
        peer,
        *([compiled] if choice else []),
    ]


def changes_for(platform: str) -> Json:
    """Of the config, before it is known what fits."""
    return ONE_DEVICE | (SMALL if platform == "cpu" else {})


def choose(platform: str, memory: int) -> Choice | None:
    """The first of `CHOICES` that fits so many bytes by the account of launch.plan; None: none
    does. On a CPU everything is small.
    """
    for name, more in CHOICES.items() if platform != "cpu" else [("networks of the tests", {})]:
        changes = changes_for(platform) | more
        planned = planned_bytes(platform, changes)
        if planned <= (GPU_SHARE if platform == "gpu" else 1.0) * memory:
            return Choice(name, changes, planned)
    return None


def planned_bytes(platform: str, changes: Json) -> int:
    """What launch.plan counts for one device."""
    config = self_forcing.get_config(CONFIG.partition(":")[2])
    config.weights = config.init_from = config.teacher.weights = ""
    config.update_from_flattened_dict(changes)
    recipe = read_recipe(config)
    kernel = attention_kernel(recipe, recipe.wan, platform)
    rows = needed(make_stage(recipe), dict.fromkeys(AXES, 1), kernel)
    return sum(row.device for row in rows)


def run_task(task: Task, seconds: float, file: Path) -> Json:
    """What a process found in so many seconds, and the sentence of one that failed."""
    log, start = file.with_suffix(".log"), time.monotonic()
    command = [sys.executable, "-m", *task.command, f"--json={file}"]
    file.unlink(missing_ok=True)
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            problem = None if child.wait(max(seconds, 1)) == 0 else last_line(log.read_text())
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s, its share of --minutes={MINUTES.value:g}"
        finally:
            stop(child)
    return {
        "name": task.name,
        "command": ["python", "-m", *task.command],
        "seconds": time.monotonic() - start,
        "problem": problem,
        "found": json.loads(file.read_text()) if file.exists() else None,
    }


def stop(child: subprocess.Popen) -> None:
    """Ends a process, which may end its own first."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def probe() -> Json:
    """Platform, kind and memory of the first device, asked in a process that then gives it back."""
    told = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    found = json.loads(told.stdout.splitlines()[-1])
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found | {"memory_bytes": found["memory_bytes"] or here}


def main(_):
    end = time.monotonic() + 60 * MINUTES.value
    folder = as_path(INTO.value)
    folder.mkdir(parents=True, exist_ok=True)
    # or the driver's default share of a GPU would be all that is measured
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, as the plan counts
    device = probe()
    jax.config.update("jax_platforms", "cpu")  # here nothing runs; children have the device
    choice = choose(device["platform"], device["memory_bytes"])
    chosen = choice._asdict() if choice else None
    found = made_with("launch.measure", ("jax", "jaxlib", "torch", "diffusers", "tokamax")) | device
    found |= {"minutes": MINUTES.value, "config": CONFIG, "chosen": chosen, "parts": []}
    left = [t for t in tasks(device["platform"], choice) if PARTS.value in t.name]
    with tqdm(total=len(left), unit="part") as bar:
        while left:
            task, share = left[0], left[0].share / sum(t.share for t in left)
            bar.set_description(task.name)
            seconds = share * (end - time.monotonic())
            found["parts"].append(run_task(task, seconds, Path(folder / f"{task.name}.json")))
            # after each: the whole may be stopped too
            write_whole(folder / "measure.json", json.dumps(found, indent=2))
            write_whole(folder / "measure.md", document(found))
            left.pop(0)
            bar.update()
    print(document(found))


if __name__ == "__main__":
    run_main(main)
