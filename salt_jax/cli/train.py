"""python -m launch.train --config=configs/X.py --workdir=DIR [--config.key=value]

Trains, or resumes DIR. Everything it writes is in DIR. SIGTERM or SIGINT: the iteration is finished
and saved, and the exit code is 75; the same command goes on. Several processes: docs/pods.md.
"""

from absl import flags
from ml_collections import config_flags

from salt_jax.cli.app import config_made_by, name_files, read_config, run_main
from salt_jax.cli.processes import joined, refuse_in_all
from salt_jax.config.reading import read_recipe
from salt_jax.train.stop import stoppable

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "which run; see configs/", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where checkpoints, scalars and the resolved config go", required=True
)
name_files(WORKDIR)


def main(_):
    with joined(lambda: read_recipe(read_config(CONFIG))) as recipe, stoppable() as stop:
        # jax comes here, after all that can be refused without it
        from salt_jax.train.loop import train

        train(recipe, WORKDIR.value, config_made_by(CONFIG), stop)


def run() -> None:
    """The program."""
    flags.mark_flag_as_required("config")
    run_main(main, __doc__, refuse_in_all)
