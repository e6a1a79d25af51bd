"""python -m launch.evaluate --workdir=DIR [--count=96] [--seed=0]
python -m launch.evaluate --vbench_results=FILE_OR_DIR

Measures the averaged student of a workdir beside its teacher and writes DIR/evaluation.json and DIR/report.html. On a
teacher's workdir (stage denoising) it measures the teacher alone. The teacher makes its clips with 32 guided Euler
updates; its velocity error is against the closed form. A student that works chunk by chunk also makes long videos,
under each memory of --memory. All of that is of Moving Shapes; videos of Wan 2.1 are scored by VBench, of whose results
the second form computes Quality, Semantic and Total.
"""

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from launch.cli import refuse_flags, run_main
from launch.common import Trained, open_workdir
from launch.parsing import read_memory, read_workdir, refuse_not_finite
from salt_jax.choices import Solver
from salt_jax.data import shapes
from salt_jax.errors import UserError
from salt_jax.evaluate import suite, summary, vbench
from salt_jax.evaluate.report import write_report
from salt_jax.models.denoiser import guided
from salt_jax.train.setup import closed_form
from salt_jax.video import write_bytes

WORKDIR = flags.DEFINE_string("workdir", None, "what launch.train wrote")
STEP = flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", lower_bound=1)
AVERAGE = flags.DEFINE_enum("average", "ema", ["ema", "none"], "of the student's weights")
VBENCH = flags.DEFINE_string("vbench_results", None, "a file or a folder of VBench's *_eval_results.json")
COUNT = flags.DEFINE_integer("count", 96, "clips per number of updates", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
TEACHER_UPDATES = flags.DEFINE_integer(
    "teacher_updates", 32, "guided Euler updates of the teacher, 0 leaves it out", lower_bound=0
)
GUIDANCE = flags.DEFINE_float("guidance", None, "of the teacher; default as in the config")
LONG = flags.DEFINE_integer(
    "long",
    4,
    "length of the long videos of a student that works chunk by chunk, in clips; 0 leaves them out",
    lower_bound=0,
)
MEMORY = flags.DEFINE_list(
    "memory", [], "WINDOW:SINK:POSITIONS of long videos, with commas; default as in the config"
)
SOLVERS = flags.DEFINE_list("solvers", list(get_args(Solver)), "of the student")
LONG_UPDATES = 4
MODES = {
    "vbench": "results of VBench",
    "teacher": "the workdir of a teacher",
    "clips": "the workdir of a student of whole clips",
    "chunks": "the workdir of a student that works chunk by chunk",
}
WORKDIRS = ("teacher", "clips", "chunks")
BELONGS = {
    "vbench_results": ["vbench"],
    **dict.fromkeys(("workdir", "step", "average", "count", "seed", "teacher_updates", "guidance"), WORKDIRS),
    "solvers": ["clips", "chunks"],
    "long": ["chunks"],
    "memory": ["chunks"],
}
LEVELS = (0.995, 0.98, 0.95, 0.9, 0.7, 0.3)  # noise levels of the velocity error


def make_task(run: Trained, count: int, seed: int) -> suite.Task:
    """`count` captions of the world, spread evenly over its scenes."""
    world, scenes = run.recipe.world, shapes.scenes(run.recipe.world)
    scene = np.array(shapes.spread(world, count))
    text = run.embed([shapes.caption(scenes[i]) for i in scene])
    recipe = run.recipe
    return suite.Task(
        world,
        scene,
        text,
        recipe.clip_shape,
        recipe.schedule.shift,
        seed,
        min(count, 48),
        recipe.memory if recipe.causal else None,
        recipe.rollout.first_updates if recipe.causal else 0,
        recipe.schedule.levels,
    )


def measure_teacher(run: Trained, task: suite.Task) -> tuple[dict, np.ndarray]:
    """The teacher's numbers and its clips."""
    guidance = run.recipe.teacher.guidance if GUIDANCE.value is None else GUIDANCE.value
    denoise, wan = run.network.denoise, run.weights["wan"]
    network = run.network._replace(denoise=guided(denoise, jnp.asarray(run.embed([""])), guidance))
    task = task._replace(policy=None, levels=())
    clips = suite.clips(network, wan, task, TEACHER_UPDATES.value, "euler")
    numbers = {
        "updates": TEACHER_UPDATES.value,
        "guidance": guidance,
        "score": suite.shapes_score(clips, task),
    }
    if not task.world.pair:
        exact = closed_form(run.recipe, run.embed)
        real, text = suite.real_clips(task.world, COUNT.value, SEED.value, run.embed)
        errors = suite.velocity_errors(denoise, wan, exact, real, text, LEVELS, SEED.value)
        numbers["velocity_error"] = errors
    return numbers, clips


def measure_long(run: Trained, task: suite.Task) -> tuple[dict, dict[str, np.ndarray]]:
    """By memory: how videos of several times the training length hold, and the videos."""
    numbers, made = {}, {}
    m, updates = run.recipe.memory, len(task.levels) or LONG_UPDATES
    for told in MEMORY.value or [f"{m.window}:{m.sink}:{m.positions}"]:
        longer = (LONG.value * task.shape[0], *task.shape[1:])
        this = task._replace(policy=read_memory(told, m), shape=longer)
        try:
            made[told] = suite.clips(run.network, run.params, this, updates, run.recipe.sample.solver)
        except ValueError as error:
            raise UserError(f"{error}; check --memory and --long") from error
        numbers[told] = suite.drift(made[told], this)
    return numbers, made


def read_solvers() -> list[Any]:
    """--solvers. Raises UserError for one that does not exist, or for none."""
    if not SOLVERS.value:
        raise UserError(f"--solvers is empty; choose from {', '.join(get_args(Solver))}")
    for name in SOLVERS.value:
        if name not in get_args(Solver):
            raise UserError(f"--solvers names {name!r}; choose from {', '.join(get_args(Solver))}")
    return SOLVERS.value


def origin(run: Trained) -> dict[str, str]:
    """Where the numbers come from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": shlex.join(["python", "-m", "launch.evaluate", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "checkpoint": "step {step}, average {average}, sha256 {sha256}".format(**run.checkpoint),
        "seeds": f"training {run.recipe.seed}, evaluation {SEED.value}",
        "clips": str(COUNT.value),
    }


def print_vbench(path: str) -> None:
    """VBench's scores and what they come to, in percent."""
    scores = vbench.read_results(Path(path))
    try:
        totals = vbench.totals(scores)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    for name, value in scores.items():
        print(f"{name:28}{100 * value:8.2f}")
    for name, value in totals.items():
        print(f"{name.capitalize():28}{value:8.2f}")


def main(_):
    if bool(VBENCH.value) == bool(WORKDIR.value):
        raise UserError("give either --workdir=DIR or --vbench_results=FILE")
    if VBENCH.value:
        refuse_flags("vbench", MODES, BELONGS)
        print_vbench(VBENCH.value)
        return
    out = Path(WORKDIR.value or "")
    recipe = read_workdir(out, STEP.value)
    if recipe.data.kind == "latents":
        raise UserError(
            f"{out} makes videos of Wan 2.1: sample with --vbench, and score the videos with VBench"
        )
    mode = "teacher" if recipe.stage == "denoising" else "chunks" if recipe.causal else "clips"
    refuse_flags(mode, MODES, BELONGS)
    refuse_not_finite("guidance", GUIDANCE.value)
    for told in MEMORY.value:
        read_memory(told, recipe.memory)
    solvers = read_solvers() if recipe.stage != "denoising" else []
    run = open_workdir(str(out), STEP.value, AVERAGE.value)
    task = make_task(run, COUNT.value, SEED.value)
    updates = recipe.sample.num_updates
    with tqdm(total=2 + len(solvers) * (len(updates) + 1), desc="teacher") as bar:
        teacher, columns, results, long, videos = {}, [], {}, {}, {}
        if TEACHER_UPDATES.value:
            teacher, clips = measure_teacher(run, task)
            columns.append(("teacher", clips))
        bar.update()
        for solver in solvers:
            bar.set_description(f"student, {solver}")
            results[solver], made = suite.measure(run.network, run.params, task, updates, solver, bar.update)
            if solver == recipe.sample.solver:
                columns += [(f"{k} updates", made[k]) for k in updates]
        if recipe.causal and LONG.value:
            bar.set_description("long videos")
            long, videos = measure_long(run, task)
        bar.update()
    numbers = {**origin(run), "teacher": teacher, "student": results, "long": long}
    write_bytes(out / "evaluation.json", json.dumps(numbers, indent=2).encode())
    write_report(
        out / "report.html", summary.make_report(numbers, task, columns, videos, min(6, COUNT.value))
    )
    table = summary.score_table(numbers)
    for row in (table.header, *table.rows):
        print("".join(f"{cell:>15}" for cell in row))
    for solver, result in results.items():
        print(f"semigroup defect, {solver}: {result['defect']['mean']:.4f}")
    print(f"{out / 'evaluation.json'}\n{out / 'report.html'}")


if __name__ == "__main__":
    run_main(main)
