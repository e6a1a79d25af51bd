"""Help, and a mistake on the command line, cost a fraction of a second: they are told before jax is
imported.
"""

import subprocess
import sys

import pytest

from salt_jax.cli.main import COMMANDS
from tests.helpers import ROOT

TINY = ["--preset_size=tiny", "--model=wan2.1-t2v-1.3b", "--prompt=A", "--out=o"]
WAN = "--config=configs/sc_dmd.py:wan"
RUN = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
finally:
    assert "jax" not in sys.modules, "jax was imported"
"""


@pytest.mark.parametrize("name", COMMANDS.values())
def test_help_is_given_before_jax_is_imported(name):
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"python -m launch.{name}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("sample", [*TINY, "--chunk=3", "--frames=13"], "--frames=13"),
        ("evaluate", ["--vbench_results=x", "--count=3"], "--count"),
        ("encode", ["--preset_size=tiny", "--dst=d", "--prompts=x", "--size=64x48"], "--size"),
        ("encode", ["--preset_size=tiny", "--dst=d", "--prompts=x", "--guidance=3"], "--guidance"),
        ("convert_wan", ["--src=a", "--dst=b", "--step=3"], "--step"),
        ("sample", ["--print_config"], "--print_config needs a --config or a --workdir"),
        ("sample", ["--print_config", "--workdir=no/such"], "no/such"),
        ("compile", [WAN, "--target=tpu:v9:2x2"], "--target=tpu:v9:2x2 is no machine"),
        ("compile", [WAN, "--what=student,disc"], "--what=student,disc must name some of"),
        ("compile", [WAN, "--json=/no/such/told.json"], "there is no folder /no/such"),
        ("compile", ["--config=configs/none.py"], "configs/none.py"),
        ("convert_wan", ["--src=a", "--dst=b", "--to=diffusers", "--lora=x"], "--lora"),
        ("bench", ["--what=everything"], "--what=everything has parts other than teacher_forward"),
        ("bench", ["--config=configs/sc_dmd.py", "--frames=3"], "--width are of latents"),
        ("bench", ["--config=configs/none.py"], "configs/none.py"),
        ("plan", ["--config=configs/none.py", "--mesh=data:1"], "configs/none.py"),
        ("plan", [WAN, "--target=gpu:h100"], "--target=gpu:h100 is no machine"),
        ("plan", [WAN, "--target=here"], "--target=here: name the devices"),
        ("plan", [WAN, "--mesh=rows:8"], "each of data, fsdp, context, tensor once at most"),
        ("plan", [WAN, "--mesh=data:2,data:2"], "--mesh=data:2,data:2 must name"),
        ("plan", [WAN, "--mesh=data:0"], "the size of data must be a whole number >= 1"),
    ],
)  # fmt: skip
def test_a_flag_that_means_nothing_is_told_before_jax_is_imported(name, args, told):
    done = subprocess.run(
        [sys.executable, "-c", RUN, name, *args], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, (
        done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_opening_a_file_reads_no_library_of_training():
    """They take half a second, which a server and `launch.sample` are waited for."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import salt_jax.serve.app, sys; salt_jax.load('shapes_causal')\n"
            "print(*{'grain', 'orbax', 'tensorflow_datasets'} & set(sys.modules))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not told.stdout.strip()
