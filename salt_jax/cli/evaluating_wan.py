"""What launch.evaluate measures of a workdir of Wan 2.1, and the files it writes."""

import json
from functools import partial

import numpy as np
from tqdm import tqdm

from salt_jax.cli import evaluate_flags as f
from salt_jax.cli.evaluating import LONG_STEPS, origin, print_table
from salt_jax.evaluate import wan_suite, wan_summary
from salt_jax.evaluate.report import write_report
from salt_jax.evaluate.suite import clips
from salt_jax.io.files import write_whole
from salt_jax.io.model_folder import VAE, Source, part_file
from salt_jax.pipeline.parts import Parts, decoded
from salt_jax.pipeline.shapes import sampler_of
from salt_jax.pipeline.wan import WanOptions, WanSource, wan_parts
from salt_jax.workdir import Trained, open_workdir

SHOWN = 4  # clips of the report


def open_parts(run: Trained, name: str) -> tuple[Parts, wan_suite.Decode | None]:
    """The network with its text encoder; and its decoder, where the folder has a VAE."""
    recipe = run.recipe
    folder = f.WEIGHTS.value or recipe.weights
    decodes = not folder or part_file(VAE, folder).is_file()
    frames = recipe.clip_shape[0]
    clip = (frames, recipe.memory.chunk if recipe.causal else frames)
    source = WanSource(name, Source(folder), recipe.wan, run=run)
    parts = wan_parts(source, clip, WanOptions(f.DTYPE.value, decodes=decodes))
    return parts, partial(decoded, parts) if decodes else None


def measure_long(
    parts: Parts,
    run: Trained,
    task: wan_suite.WanTask,
    decode: wan_suite.Decode | None,
    wanted: f.Wanted,
) -> dict[str, wan_suite.VideoNumbers]:
    """By cache policy: how videos of several times the training length hold."""
    numbers, k = {}, len(task.sampler.levels) or LONG_STEPS
    shape = (wanted.long * task.shape[0], *task.shape[1:])
    for words, policy in wanted.policies.items():
        this = task._replace(sampler=task.sampler._replace(memory=policy), shape=shape)
        made = clips(parts.network, run.params, this, k, run.recipe.sample.solver)
        found, _ = wan_suite.video_numbers({k: made}, this, decode)
        numbers[words] = found["videos"][k]
    return numbers


def evaluate(wanted: f.Wanted) -> None:
    """Measures, writes evaluation.json and report.html, and prints the table."""
    run = open_workdir(str(wanted.out), f.STEP.value, f.AVERAGE.value)
    recipe, prompts = run.recipe, wanted.prompts
    parts, decode = open_parts(run, str(wanted.out))
    texts = parts.read_texts(list(dict.fromkeys(prompts)))
    text = np.concatenate([texts[prompt] for prompt in prompts])
    task = wan_suite.WanTask(text, recipe.clip_shape, sampler_of(recipe), f.SEED.value)
    results, shown = {}, []
    with tqdm(total=len(wanted.solvers) + bool(wanted.policies)) as bar:
        for solver in wanted.solvers:
            bar.set_description(f"student, {solver}")
            results[solver], videos = wan_suite.measure(
                parts.network, run.params, task, recipe.sample.num_steps, solver, decode, SHOWN
            )
            shown = shown or videos
            bar.update()
        bar.set_description("long videos")
        long = measure_long(parts, run, task, decode, wanted)
        bar.update(bool(wanted.policies))
    numbers = {**origin(run, len(prompts)), "student": results, "long": long}
    write_whole(wanted.out / "evaluation.json", json.dumps(numbers, indent=2))
    write_report(wanted.out / "report.html", wan_summary.make_report(numbers, prompts, shown))
    print_table(wan_summary.video_table(numbers), results, wanted.out)
