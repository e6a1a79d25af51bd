"""python -m launch.bench [--config=configs/X.py]
                       [--preset=wan2.1-t2v-1.3b --frames=21 --height=60 --width=104]

Times the parts of training and of generating with random weights: one table, and the same numbers
with --json=FILE. Student, critic and teacher are the config's, or all of --preset. On a CPU in a
minute:

    python -m launch.bench --preset=wan2.1-t2v-tiny --frames=6 --height=4 --width=4 --vae=tiny \\
        --runs=2

    python -m launch.bench --peer=diffusers [--compile] [--what=forward,gradient,rollout,decode]

times the same work in ours and in diffusers' network in PyTorch, in turns, with the same random
weights and inputs, after a check that both say the same: medians, and the ratios of turns of the
same round with their quartiles. salt_jax/peers/parts.py says what is timed.
"""

import os

from salt_jax.cli import bench_flags as f
from salt_jax.cli.app import run_main
from salt_jax.cli.processes import joined, refuse_in_all


def main(_):
    with joined(f.read_wanted) as (config, what):
        # jax comes here, after all that can be refused without it
        if f.PEER.value:
            # or jax takes most of a GPU's memory, which PyTorch needs too
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            from salt_jax.cli.peering import time_beside

            time_beside(config, what)
            return
        from salt_jax.cli.benching import time_parts

        time_parts(config, what)


def run() -> None:
    """The program."""
    run_main(main, __doc__, refuse_in_all)
