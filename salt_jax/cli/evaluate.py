"""python -m launch.evaluate --workdir=DIR [--count=96] [--seed=0]
python -m launch.evaluate --workdir=DIR --prompts_file=FILE [--weights=DIR]
python -m launch.evaluate --vbench_results=FILE_OR_DIR

Measures the averaged student of a workdir beside its teacher and writes DIR/evaluation.json and
DIR/report.html. On a teacher's workdir (stage denoising) it measures the teacher alone. The teacher
makes its clips with 32 guided Euler steps; its velocity error is against the closed form. A
student that works chunk by chunk also makes long videos, under each policy of --memory. All of that
is of Moving Shapes. The second form is for students of Wan 2.1: whether numbers of steps agree, how
much moves, and how chunks drift. How good videos are VBench scores, of whose results the third form
computes Quality, Semantic and Total.
"""

from salt_jax.cli import evaluate_flags as f
from salt_jax.cli.app import refuse_flags, run_main
from salt_jax.cli.processes import joined, refuse_in_all, tells
from salt_jax.errors import UserError
from salt_jax.evaluate import vbench
from salt_jax.io.files import as_path


def vbench_table(path: str) -> str:
    """VBench's scores and what they come to, in percent."""
    scores = vbench.read_results(as_path(path))
    try:
        totals = vbench.totals(scores)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    lines = [f"{name:28}{100 * value:8.2f}" for name, value in scores.items()]
    return "\n".join([*lines, *(f"{k.capitalize():28}{v:8.2f}" for k, v in totals.items())])


def read() -> f.Wanted | str:
    """What is measured, or the table of VBench's results, which needs no jax."""
    if bool(f.VBENCH.value) == bool(f.WORKDIR.value):
        raise UserError("give either --workdir=DIR or --vbench_results=FILE")
    if not f.VBENCH.value:
        return f.read_wanted()
    refuse_flags("vbench", f.MODES, f.BELONGS)
    return vbench_table(f.VBENCH.value)


def main(_):
    with joined(read) as wanted:
        if isinstance(wanted, str):
            if tells():
                print(wanted)
            return
        # jax comes here, after all that can be refused without it
        from salt_jax import hosts
        from salt_jax.cli import evaluating, evaluating_wan

        run = evaluating_wan.evaluate if wanted.prompts else evaluating.evaluate
        hosts.only_first(lambda: run(wanted), "the evaluation", hosts.LONG)


def run() -> None:
    """The program."""
    run_main(main, __doc__, refuse_in_all)
