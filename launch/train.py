"""python -m launch.train --config=configs/X.py --workdir=DIR [--config.key=value]

Trains, or goes on where DIR stopped. Everything it writes is in DIR.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from launch.common import run_main
from salt_jax.train.loop import train
from salt_jax.train.recipe import read_recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "which run; see configs/", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints, scalars and the resolved config go")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.ERROR)
    train(read_recipe(CONFIG.value), WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run_main(main)
