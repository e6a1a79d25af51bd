"""What launch.evaluate measures of a workdir on Moving Shapes, and the files it writes."""

import json
import platform
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from salt_jax.cli import evaluate_flags as f
from salt_jax.cli.app import commit
from salt_jax.evaluate import shapes_suite, shapes_summary
from salt_jax.evaluate.report import Table, write_report
from salt_jax.io.files import AnyPath, write_whole
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import guided
from salt_jax.moving_shapes import shapes
from salt_jax.pipeline.shapes import sampler_of
from salt_jax.rollout.settings import Sampler
from salt_jax.stages.weights import closed_form
from salt_jax.workdir import Trained, open_workdir

LONG_STEPS = 4
LEVELS = (0.995, 0.98, 0.95, 0.9, 0.7, 0.3)  # noise levels of the velocity error


def make_task(run: Trained, count: int, seed: int) -> shapes_suite.Task:
    """`count` captions of the world, spread evenly over its scenes."""
    world, scenes = run.recipe.world, shapes.scenes(run.recipe.world)
    scene = np.array(shapes.spread(world, count))
    text = run.embed([shapes.caption(scenes[i]) for i in scene])
    sampler = sampler_of(run.recipe)
    return shapes_suite.Task(
        world, scene, text, run.recipe.clip_shape, sampler, seed, min(count, 48)
    )


def measure_teacher(run: Trained, task: shapes_suite.Task) -> tuple[dict, np.ndarray]:
    """The teacher's numbers and its clips."""
    guidance = run.recipe.teacher.guidance if f.GUIDANCE.value is None else f.GUIDANCE.value
    network, wan = run.stage.student, run.weights["wan"]
    null_text = jnp.asarray(run.embed([""]))
    teacher, params = guided(network, wan, null_text, guidance)
    whole = Sampler(f.TEACHER_STEPS.value, task.sampler.shift, "euler")
    task = task._replace(sampler=whole)
    clips = shapes_suite.clips(teacher, params, task, whole.num_steps, "euler")
    numbers = {
        "num_steps": whole.num_steps,
        "guidance": guidance,
        "score": shapes_suite.shapes_score(clips, task),
    }
    if not task.world.pair:
        exact = closed_form(run.recipe, lambda caption: run.embed([caption])[0])
        real, text = shapes_suite.real_clips(task.world, f.COUNT.value, f.SEED.value, run.embed)
        clean = shapes_suite.Clean(real, text)
        errors = shapes_suite.velocity_errors(network, wan, exact, clean, LEVELS, f.SEED.value)
        numbers["velocity_error"] = errors
    return numbers, clips


def measure_long(
    run: Trained, task: shapes_suite.Task, long: int, policies: dict[str, CachePolicy]
) -> tuple[dict, dict[str, np.ndarray]]:
    """By cache policy: how videos of several times the training length hold, and the videos."""
    numbers, made = {}, {}
    for words, policy in policies.items():
        shape = (long * task.shape[0], *task.shape[1:])
        this = task._replace(sampler=task.sampler._replace(memory=policy), shape=shape)
        num_steps = len(task.sampler.levels) or LONG_STEPS
        solver = run.recipe.sample.solver
        made[words] = shapes_suite.clips(run.stage.student, run.params, this, num_steps, solver)
        numbers[words] = shapes_suite.drift(made[words], this)
    return numbers, made


def origin(run: Trained, count: int) -> dict[str, str]:
    """Where the numbers come from."""
    here = jax.local_devices()
    return {
        "command": shlex.join(["python", "-m", "launch.evaluate", *sys.argv[1:]]),
        "commit": commit() or "unknown",
        "hardware": f"{len(here)} x {here[0].device_kind}, {platform.machine()}",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "checkpoint": "step {step}, average {average}, sha256 {sha256}".format(**run.made_with),
        "seeds": f"training {run.recipe.seed}, evaluation {f.SEED.value}",
        "clips": str(count),
    }


def evaluate(wanted: f.Wanted) -> None:
    """Measures, writes evaluation.json and report.html, and prints the table."""
    run = open_workdir(str(wanted.out), f.STEP.value, f.AVERAGE.value)
    task = make_task(run, f.COUNT.value, f.SEED.value)
    num_steps = wanted.recipe.sample.num_steps
    with tqdm(total=2 + len(wanted.solvers) * (len(num_steps) + 1), desc="teacher") as bar:
        teacher, columns, results, long, videos = {}, [], {}, {}, {}
        if f.TEACHER_STEPS.value:
            teacher, clips = measure_teacher(run, task)
            columns.append(("teacher", clips))
        bar.update()
        for solver in wanted.solvers:
            bar.set_description(f"student, {solver}")
            results[solver], made = shapes_suite.measure(
                run.stage.student, run.params, task, num_steps, solver, bar.update
            )
            if solver == wanted.recipe.sample.solver:
                columns += [(f"{k} steps", made[k]) for k in num_steps]
        if wanted.policies:
            bar.set_description("long videos")
            long, videos = measure_long(run, task, wanted.long, wanted.policies)
        bar.update()
    numbers = {**origin(run, f.COUNT.value), "teacher": teacher, "student": results, "long": long}
    write_whole(wanted.out / "evaluation.json", json.dumps(numbers, indent=2))
    write_report(
        wanted.out / "report.html",
        shapes_summary.make_report(numbers, task, columns, videos, min(6, f.COUNT.value)),
    )
    print_table(shapes_summary.score_table(numbers), results, wanted.out)


def print_table(table: Table, results: dict, out: AnyPath) -> None:
    """Prints a table, the defect by solver, and where the rest is."""
    widths = [max(15, *(len(row[i]) + 2 for row in (table.header, *table.rows)))
              for i in range(len(table.header))]  # fmt: skip
    for row in (table.header, *table.rows):
        print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    for solver, result in results.items():
        print(f"semigroup defect, {solver}: {result['defect']['mean']:.4f}")
    print(f"{out / 'evaluation.json'}\n{out / 'report.html'}")
