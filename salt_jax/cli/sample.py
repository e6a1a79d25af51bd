"""python -m launch.sample --workdir=DIR [--num_steps=2,4,8] [--solver=cm]
                        [--prompt=... | --prompts_file=...]
python -m launch.sample --weights=DIR --prompt="..." [--image=FILE]
                        [--student=FILE --chunk=3 | --recipe=NAME]

Writes DIR/samples/K_INDEX.mp4 (16 fps), of Moving Shapes also .gif and one contact sheet per number
of steps; without a workdir into --out. A seed gives the same clip on the same machine, however
many clips are asked for. A student that works chunk by chunk makes clips of any length (--frames),
under any cache policy (--memory), continues a clip (--prefix), and changes its prompt on the way
(--switch); with --stream --seconds=30 it writes one video while it makes it, and says how fast.
--vbench writes what VBench scores. samples.jsonl records what made each file; one that the same
call would make again is left alone.
"""

from salt_jax.cli import sample_flags as f
from salt_jax.cli.app import run_main
from salt_jax.cli.processes import joined, refuse_in_all
from salt_jax.cli.request import read_request


def main(_):
    with joined(read_request) as request:
        # jax comes here, after all that can be refused without it
        from salt_jax.cli.making import make
        from salt_jax.cli.streaming import stream

        (stream if f.STREAM.value else make)(request)


def run() -> None:
    """The program."""
    run_main(main, __doc__, refuse_in_all)
