"""What a user gets wrong ends in exit code 2 and one line that names it; what can be survived ends
in a warning.

Programs run in this process. Where weights do not matter a network of one matrix takes Wan's place.
"""

import logging
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from salt_jax.cli import app
from salt_jax.cli import train as launch_train
from salt_jax.flow.prediction import from_velocity
from salt_jax.io.tensor_files import save_weights
from salt_jax.stages.stage import Weights
from salt_jax.train import loop
from salt_jax.train.setup import Setup, first_state
from tests.helpers import ROOT, with_networks


@dataclass(frozen=True)
class OneMatrix:
    gain: float

    def denoise(self, params, x, sigma, cond, plan=None):
        return from_velocity(x, self.gain * x @ params["head"]["kernel"], sigma)


CONFIG = f"--config={ROOT}/configs/sc_dmd.py"
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs `python -m launch.train` with these arguments: (exit code, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, args)])
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # ml_collections defines them as it meets them
        flags.FLAGS["workdir"].value = None
        with pytest.raises(SystemExit) as exit:
            app.run_main(launch_train.main)
        return exit.value.code, capsys.readouterr().err

    return run


def refused(result, *told):
    code, err = result
    *before, last = err.strip().splitlines()
    assert code == 2, err
    assert last.startswith("error: ") and "Traceback" not in err
    assert not any("rror" in line for line in before), err
    for part in told:
        assert part in last, last


@pytest.fixture
def small(monkeypatch, tmp_path_factory, request):
    """Arguments of a run of seconds: eight clips a batch, and a network that is one matrix times
    `gain`.
    """
    gain = getattr(request, "param", 1.0)

    def setup(stage):
        network = OneMatrix(gain)
        stage = with_networks(stage, student=network, critic=network, teacher=network)
        one = lambda seed: {
            "head": {"kernel": 0.1 * jax.random.normal(jax.random.key(seed), (3, 3))}
        }
        null_text = jnp.zeros((1, 2, 3))
        weights = Weights(one(0), {}, one(1), one(2), null_text)
        frozen = stage.frozen(weights)
        text = lambda caption: np.zeros((2, 3), np.float32)
        return Setup(stage, *first_state(stage, weights, frozen), frozen, text, None)

    monkeypatch.setattr(loop, "setup", setup)
    data = tmp_path_factory.getbasetemp() / "shapes"
    return [
        CONFIG,
        f"--config.data.dir={data}",
        "--config.data.num_train=16",
        "--config.data.num_test=1",
        "--config.batch_size=8",
        "--config.log_every=1",
        "--config.save_every=2",
    ]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([CONFIG, "--workdir=w", "--config.loss.self_consistensy=1"], ["'self_consistensy'"]),
        ([CONFIG, "--workdir=w", "--config.iterations=many"], ["many"]),
        (
            [CONFIG, "--workdir=w", "--config.teacher.kind=oracle"],
            ["config.teacher.kind", "closed_form"],
        ),
        (
            [CONFIG, "--workdir=w", "--config.teacher.kind=data"],
            ["config.teacher.kind", "to network or closed_form"],
        ),
        ([CONFIG, "--workdir=w", "--config.iterations=0"], ["config.iterations=0"]),
        ([CONFIG, "--workdir=w", "--config.mesh.data=3"], ["config.mesh", "8 device"]),
        ([CONFIG, "--workdir=w", "--wrokdir=v"], ["wrokdir"]),
        ([CONFIG, "--workdir=w", "stray"], ["'stray'"]),
        ([CONFIG], ["--workdir"]),
        (["--config=configs/nowhere.py", "--workdir=w"], ["configs/nowhere.py", "--config"]),
    ],
)
def test_a_wrong_argument(train, args, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(train(*args), *told)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_program_itself_says_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.train",
        CONFIG,
        f"--workdir={tmp_path}/w",
        "--config.nope=1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    refused((done.returncode, done.stderr), "'nope'")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_weights_that_are_absent_damaged_or_of_another_model(train, tmp_path):
    file, args = tmp_path / "w.safetensors", [CONFIG, f"--workdir={tmp_path}/run"]
    refused(train(*args, f"--config.weights={file}"), str(file), "config.weights")
    save_weights(file, {"wan": {"blocks": {"modulation": jnp.zeros((2, 6, 48))}}}, "float32", {})
    refused(train(*args, f"--config.weights={file}"), str(file), "config.model.preset")
    file.write_bytes(file.read_bytes()[:-100])
    refused(train(*args, f"--config.weights={file}"), str(file), "config.weights")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made(train, small, tmp_path):
    (tmp_path / "file").touch()
    refused(train(*small, f"--workdir={tmp_path}/file/run"), f"{tmp_path}/file/run", "--workdir")


def test_a_batch_that_does_not_spread_over_the_devices(train, small, tmp_path):
    refused(
        train(*small, f"--workdir={tmp_path}", "--config.batch_size=12"),
        "config.batch_size=12",
        "8",
    )


def test_a_data_set_without_clips(train, small, tmp_path):
    refused(
        train(*small, f"--workdir={tmp_path}", "--config.data.num_train=0"),
        "config.data",
        "num_train=0",
    )


@pytest.mark.parametrize("small", [float("nan")], indirect=True)
def test_a_run_that_is_not_finite_stops_and_names_the_term(train, small, tmp_path):
    result = train(
        *small,
        f"--workdir={tmp_path}",
        "--config.iterations=9",
        "--config.max_skipped=2",
        "--config.critic_ratio=1",
    )
    refused(result, "2 student updates in a row", "at update 2 ", "dmd", "self_consistency")


@pytest.mark.slow
def test_a_workdir_goes_on_and_what_does_not_fit_it_is_refused(
    train, small, tmp_path, caplog, monkeypatch
):
    steps = lambda: {
        int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*") if path.name.isdigit()
    }
    here = [*small, f"--workdir={tmp_path}"]
    assert train(*here, "--config.iterations=4")[0] in (None, 0)
    assert steps() == {2, 4}

    refused(
        train(*here, "--config.iterations=6", "--config.seed=1"),
        "config.seed = 0, not 1",
        "--workdir",
    )
    with monkeypatch.context() as patch:
        narrow = loop.setup
        more = lambda x: jax.ShapeDtypeStruct(
            tuple(n + 2 for n in x.shape), x.dtype, sharding=x.sharding
        )
        wide = lambda tree: jax.tree.map(more, tree)
        patch.setattr(
            loop, "setup", lambda *args: narrow(*args)._replace(state=wide(narrow(*args).state))
        )
        refused(
            train(*here, "--config.iterations=6"),
            "another model preset",
            "[3, 3]",
            "[5, 5]",
            "--workdir",
        )
    assert steps() == {2, 4}

    for file in (tmp_path / "checkpoints" / "4" / "student").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[:10])
    with caplog.at_level(logging.WARNING):
        assert train(*here, "--config.iterations=6")[0] in (None, 0)
    assert "checkpoint step 4" in caplog.text and "damaged" in caplog.text
    assert steps() == {4, 6}
