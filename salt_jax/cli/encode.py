"""python -m launch.encode --weights=DIR --videos=DIR [--captions=FILE] --dst=DIR [--image]
python -m launch.encode --weights=DIR --prompts=FILE --dst=DIR [--teacher]

Encodes a folder of videos with captions, or a list of prompts, for config.data.kind=latents; with
--teacher the model of --weights makes a clip of each prompt. What is no use is listed in
DIR/rejected.jsonl. The same command resumes. It works on one device: for several start as many
processes, which share the work (docs/pods.md); those that cannot reach each other are told apart by
--process_index=0, 1, ... and --process_count.
"""

from salt_jax.cli.app import run_main
from salt_jax.cli.encode_flags import read_wanted
from salt_jax.cli.processes import joined, refuse_in_all


def main(_):
    with joined(read_wanted) as wanted:
        # jax comes here, after all that can be refused without it
        from salt_jax.cli.encoding import encode_all

        encode_all(wanted)


def run() -> None:
    """The program."""
    run_main(main, __doc__, refuse_in_all)
