"""python -m launch.export --workdir=DIR --dst=FILE.safetensors [--step=N] [--average=ema|none]

Writes the network of a workdir, averaged, with its text encoder, as one file: `config.weights` can
name that of a teacher, `config.init_from` that of a student. Stored as float16: half the size, and
the rounding is far below the network's own error.
"""

from absl import flags

from salt_jax.cli.app import name_files, run_main
from salt_jax.cli.parsing import read_workdir
from salt_jax.cli.processes import joined, refuse_in_all
from salt_jax.errors import UserError
from salt_jax.io.files import as_path

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of launch.train", required=True)
STEP = flags.DEFINE_integer(
    "step", None, "step of the checkpoint; default the newest", lower_bound=1
)
AVERAGE = flags.DEFINE_enum("average", "ema", ["ema", "none"], "averaged weights, or raw ones")
DST = flags.DEFINE_string("dst", None, "the file to write", required=True)
name_files(WORKDIR, DST)


def refuse() -> None:
    """Raises UserError where the workdir has no network of Moving Shapes."""
    if read_workdir(as_path(WORKDIR.value), STEP.value).data.kind == "latents":
        raise UserError(
            f"{WORKDIR.value} is of Wan 2.1: launch.convert_wan --src={WORKDIR.value} --to=... "
            "writes it"
        )


def write() -> None:
    """Writes the file, and says of what."""
    from salt_jax.workdir import export, open_workdir

    run = open_workdir(WORKDIR.value, STEP.value, AVERAGE.value)
    export(run, DST.value)
    which = "averaged" if AVERAGE.value == "ema" else "not averaged"
    print(f"wrote {DST.value}: step {run.made_with['step']}, {which}")


def main(_):
    with joined(refuse):
        from salt_jax import hosts  # jax comes here

        hosts.only_first(write, f"writing {DST.value}")


def run() -> None:
    """The program."""
    run_main(main, __doc__, refuse_in_all)
