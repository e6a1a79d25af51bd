"""python -m launch.bench [--config=configs/X.py]
                       [--preset=wan2.1-t2v-1.3b --frames=21 --height=60 --width=104]

Times the parts of training and of generating with random weights: one table, and the same numbers
with --json=FILE. Student, critic and teacher are the config's, or all of --preset. On a CPU in a
minute:

    python -m launch.bench --preset=wan2.1-t2v-tiny --frames=6 --height=4 --width=4 --vae=tiny \\
        --runs=2
"""

from salt_jax.cli.app import run_main
from salt_jax.cli.bench_flags import read_wanted
from salt_jax.cli.processes import joined


def main(_):
    with joined(read_wanted) as (config, what):
        # jax comes here, after all that can be refused without it
        from salt_jax.cli.benching import time_parts

        time_parts(config, what)


def run() -> None:
    """The program."""
    run_main(main, __doc__)
