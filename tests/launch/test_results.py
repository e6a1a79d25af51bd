"""launch/results.sh: which students it trains, with the programs replaced by one that notes what is
asked of it.
"""

import importlib
import os
import stat
import subprocess
from pathlib import Path

import pytest

from salt_jax.config.reading import read_recipe

ROOT = Path(__file__).parents[2]
# Takes train and evaluate for done at once.
STUB = """#!/usr/bin/env bash
for word in "$@"; do
    case $word in
    --config=*) config=${word#*=} ;;
    --workdir=*) workdir=${word#*=} ;;
    esac
done
case $2 in
launch.train) mkdir -p "$workdir/checkpoints" && echo "$config $workdir" >>asked.txt ;;
launch.evaluate) touch "$workdir/evaluation.json" "$workdir/config.json" ;;
esac
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(config, options, workdir) of each training."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "launch").mkdir()
    for name in ("results.sh", "venv.sh"):
        (root / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "pip"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(stat.S_IRWXU)
    command = ["bash", "launch/results.sh", "runs"]
    subprocess.run(command, cwd=root, check=True, env={"PATH": os.environ["PATH"]}, timeout=120)
    lines = [line.split(" ", 1) for line in (root / "asked.txt").read_text().splitlines()]
    return [(*config.partition(":")[::2], workdir) for config, workdir in lines]


def test_every_student_has_a_config(asked):
    for file, options in {(file, options) for file, options, _ in asked}:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert read_recipe(module.get_config(options)), (file, options)


def test_no_workdir_gets_two_configs(asked):
    configs = {}
    for file, options, workdir in asked:
        assert configs.setdefault(workdir, (file, options)) == (file, options)
    assert len(asked) > 60
