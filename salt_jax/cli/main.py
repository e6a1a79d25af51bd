"""salt NAME [--flags]: one command for everything; `salt NAME --help` describes it.

train      trains, or resumes a workdir
sample     makes videos
serve      shows videos in a browser while they are made
evaluate   measures a student of Moving Shapes, or sums up VBench's scores
export     writes a network of a workdir as one file
convert    converts weights from and to the layouts of other projects
encode     makes training data of videos, or of prompts
plan       says what a run costs before anything is allocated
compile    compiles full-size programs for TPU and GPU, without either
bench      times the parts of training and of generating
"""

import importlib
import sys

import salt_jax

COMMANDS = {
    "train": "train",
    "sample": "sample",
    "serve": "serve",
    "evaluate": "evaluate",
    "export": "export",
    "convert": "convert_wan",
    "encode": "encode",
    "plan": "plan",
    "compile": "compile",
    "bench": "bench",
}


def main() -> None:
    """The console script `salt`."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name == "--version":
        print(salt_jax.__version__)
        return
    if name not in COMMANDS:
        print(
            f"error: salt has no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr
        )
        sys.exit(2)
    sys.argv = [f"salt {name}", *rest]
    importlib.import_module(f"salt_jax.cli.{COMMANDS[name]}").run()


if __name__ == "__main__":
    main()
