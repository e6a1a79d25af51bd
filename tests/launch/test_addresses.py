"""An address other than gs:// is refused before jax is imported, wherever a file or folder may be
named.
"""

import os
import subprocess
import sys

import pytest

from salt_jax.config.paths import PATHS
from tests.helpers import ROOT

PROGRAMS = ("bench", "compile", "convert_wan", "encode", "evaluate", "export", "plan", "sample")
# flags that take words
WORDS = {"prompt", "negative_prompt", "switch", "size", "memory", "model", "key", "lora_strength"}
WORDS |= {"target", "coordinator", "num_steps", "levels", "what", "mesh", "solvers"}

# every flag of words on its own: which are refused, and which are not
FLAGS = """
import importlib, sys
from absl import flags
from salt_jax.errors import UserError
importlib.import_module(f"salt_jax.cli.{sys.argv[1]}")
for module, found in flags.FLAGS.flags_by_module_dict().items():
    for flag in found if module.startswith("salt_jax.") else ():
        if type(flag.parser) is flags.ArgumentParser or "list" in flag.flag_type():
            flags.FLAGS.unparse_flags()
            for other in flags.FLAGS: flags.FLAGS[other].unparse()
            try:
                flags.FLAGS(["x", f"--{flag.name}=s3://b/x"])
            except UserError as error:
                assert str(error).startswith(f"--{flag.name}=s3://b/x: s3:// cannot be read or")
                print("refused", flag.name)
            except flags.Error:
                print("taken", flag.name)
            else:
                print("taken", flag.name)
assert "jax" not in sys.modules
"""


@pytest.mark.parametrize("name", [*PROGRAMS, "train"])
def test_every_flag_that_names_files_refuses_another_address(name):
    done = subprocess.run(
        [sys.executable, "-c", FLAGS, name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split() for line in done.stdout.splitlines()]
    taken = {flag for what, flag in told if what == "taken"}
    assert taken <= WORDS
    assert any(what == "refused" for what, _ in told)


def refused(*args, **environment):
    """The sentence of a program that was given these flags."""
    code = (
        "import runpy, sys\nname, *sys.argv[1:] = sys.argv[1:]\ntry:\n"
        "    runpy.run_module(f'launch.{name}', run_name='__main__', alter_sys=True)\n"
        "finally:\n    assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        **dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | environment),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("key", PATHS)
def test_so_does_every_key_of_a_config(key):
    told = refused("train", "--config=configs/sc_dmd.py", "--workdir=w", f"--config.{key}=s3://b/x")
    assert told.startswith(f"error: config.{key}=s3://b/x: s3:// cannot be read or written here; ")


def test_so_do_the_cache_of_programs_and_the_workdir():
    told = refused("plan", "--config=sc_dmd", JAX_COMPILATION_CACHE_DIR="az://b/x")
    assert told.startswith("error: JAX_COMPILATION_CACHE_DIR=az://b/x: az:// cannot be read")
    told = refused("train", "--config=sc_dmd", "--workdir=https://b/x")
    assert told.startswith("error: --workdir=https://b/x: https:// cannot be read or written here")
