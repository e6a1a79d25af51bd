"""python -m launch.train --config=configs/X.py --workdir=DIR [--config.key=value]

Trains, or goes on where DIR stopped. Everything it writes is in DIR.
"""

from absl import flags
from ml_collections import config_flags

from launch.common import run_main
from salt_jax.errors import UserError
from salt_jax.train.loop import train
from salt_jax.train.recipe import read_recipe

CONFIG = config_flags.DEFINE_config_file("config", None, "which run; see configs/", lock_config=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where checkpoints, scalars and the resolved config go", required=True
)


def main(_):
    try:
        config = CONFIG.value
        config.keys()
    except OSError as error:
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"cannot load the config file {name}; check --config") from error
    train(read_recipe(config), WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
