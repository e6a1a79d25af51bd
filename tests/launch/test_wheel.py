"""The wheel, installed elsewhere and used from another folder: the library, the networks that come
with it, the configs, and one command.
"""

import os
import subprocess
import sys
import zipfile

import pytest

from salt_jax.cli.main import COMMANDS
from tests.helpers import ROOT

SNIPPET = """
import salt_jax
assert "site" in salt_jax.__file__, salt_jax.__file__
model = salt_jax.load("shapes_causal")
video = model.generate("A red circle moves left.", num_steps=1, frames=3)
assert video.shape == (3, 12, 12, 3)
memory = salt_jax.CachePolicy(window=9, sink=3, chunk=3)
prompts = {0: "A red circle moves left.", 3: "A blue square moves up."}
for frames in model.stream(prompts, memory=memory, num_steps=1, frames=6):
    assert frames.shape == (3, 12, 12, 3)
salt_jax.write_video("circle.mp4", video, fps=16)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's packages, the environment that sees them alone, and an empty folder
    to work in.
    """
    made = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(made), str(ROOT)], check=True, cwd=made)
    (wheel,) = made.glob("*.whl")
    site = made / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = made / "here"
    here.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {"cwd": here, "env": environment | {"PYTHONPATH": str(site)}}


def run(installed, *args):
    done = subprocess.run(
        [sys.executable, *args], **installed, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_what_is_needed_and_the_snippets_run(installed):
    run(installed, "-c", SNIPPET)
    assert (installed["cwd"] / "circle.mp4").stat().st_size > 500
    version = run(installed, "-m", "salt_jax.cli.main", "--version").strip()
    assert version == __import__("salt_jax").__version__


@pytest.mark.slow
def test_every_command_has_help_and_finds_the_configs(installed):
    listed = run(installed, "-m", "salt_jax.cli.main")
    for command in COMMANDS:
        assert command in listed
        told = run(installed, "-m", "salt_jax.cli.main", command, "--help")
        assert "--" in told and "python -m launch." in told
    args = ("train", "--config=longlive.py:wan,lora", "--workdir=runs/x", "--print_config")
    told = run(installed, "-m", "salt_jax.cli.main", *args)
    assert '"rank": 256' in told and f'"{installed["cwd"]}/runs/wan_longlive_init"' in told
