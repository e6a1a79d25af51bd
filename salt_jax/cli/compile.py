"""python -m launch.compile --config=configs/X.py[:variant] [--target=gpu:h100:8]
                         [--what=student,critic] [--json=FILE]

Compiles the programs of a run with the real compiler of a TPU or GPU, which needs neither: whether
they compile and fit, the memory of a device, what devices send each other, which attention kernels
there are. Each compiles in a process of its own. Without --target for the devices found, before a
run begins there. Exit code 1 where one does not fit.
"""

import os
import sys

from absl import flags

from salt_jax.cli.app import cache_home, read_config, run_main
from salt_jax.cli.compile_flags import CONFIG, JSON, TARGET, read_flags
from salt_jax.compile.surroundings import surroundings


def main(_):
    target, what = read_flags()
    config = read_config(CONFIG)
    environment = surroundings(target, cache_home(), os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process compiles nothing and must hold no device
    from salt_jax.cli import compiling  # jax comes here, after all that can be refused without it

    rows = compiling.compile_all(config, what, environment)
    sys.exit(compiling.tell(rows, TARGET.value, JSON.value))


def run() -> None:
    """The program."""
    flags.mark_flag_as_required("config")
    run_main(main, __doc__)
