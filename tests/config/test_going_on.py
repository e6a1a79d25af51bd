"""A run that goes on: what may be another value then, what is kept of it, and that nothing else
slips in.

A network of one matrix takes Wan's place; the loop, the optimizers and the checkpoints are the real
ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from salt_jax.checkpoint import open_checkpoints, restore
from salt_jax.config import migrate
from salt_jax.config.reading import read_recipe, read_workdir, to_json
from salt_jax.errors import UserError
from salt_jax.flow.prediction import from_velocity
from salt_jax.io.tensor_files import save_weights
from salt_jax.rollout.draws import draw_rollout
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Batch, Weights
from salt_jax.stages.start import draw_start, noised_clip
from salt_jax.train import loop
from salt_jax.train.setup import Setup, first_state
from salt_jax.types import Conditioning
from tests.helpers import mesh_of, with_networks

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass(frozen=True)
class Matrix:
    """A denoiser of one matrix."""

    def denoise(self, params, x, sigma, cond, plan=None):
        return from_velocity(x, x @ params["head"]["kernel"], sigma)


def setup(stage):
    params = lambda seed: {
        "head": {"kernel": 0.1 * jax.random.normal(jax.random.key(seed), (3, 3))}
    }
    stage = with_networks(stage, student=Matrix(), critic=Matrix(), teacher=Matrix())
    weights = Weights(params(1), None, params(0), params(2), jnp.zeros((1, 2, 3)))
    frozen = stage.frozen(weights)
    form, fresh = first_state(stage, weights, frozen)
    encode_caption = lambda caption: np.zeros((2, 3), np.float32)
    return Setup(stage, form, fresh, frozen, encode_caption, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(data, tmp_path, monkeypatch):
    """A run of seconds: (changes) -> its recipe. Weights are a file that only counts as such."""
    monkeypatch.setattr(loop, "setup", setup)
    monkeypatch.setattr(loop, "make_preview", lambda *args: None)
    save_weights(tmp_path / "weights.safetensors", {"w": np.arange(3.0)}, "float32", {})

    def make(**told):
        config = base.get_config()
        config.update_from_flattened_dict(
            {
                "data.dir": data,
                "data.num_train": 16,
                "data.num_test": 1,
                "batch_size": 8,
                "log_every": 1,
            }
            | {"save_every": 1, "keep": 9, "iterations": 2, "critic_ratio": 1, "ema.start": 0}
            | {"weights": str(tmp_path / "weights.safetensors")}
            | told
        )
        return read_recipe(config)

    return make


def states(workdir, recipe, *steps):
    """The whole states of these steps."""
    wanted, found = setup(make_stage(recipe, mesh_of())).state, []
    for step in steps:
        with open_checkpoints(workdir, 99) as manager:
            for later in [s for s in manager.all_steps() if s > step]:
                manager.delete(later)
            found.append(jax.device_get(restore(manager, wanted)[0]))
        assert int(found[-1].iteration) == step
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


def test_another_rate_acts_from_the_first_update_on_and_nothing_else_changes(
    recipe, tmp_path, capsys
):
    """The gradient is read off the first moment, which is the clipped gradient for such a b1; optax
    does the rest.
    """
    run, kept = tmp_path / "run", {"student_optimizer.b1": 1e-30, "critic_optimizer.b1": 1e-30}
    loop.train(recipe(**kept), run)
    capsys.readouterr()
    slower = {"student_optimizer.learning_rate": 1e-5, "critic_optimizer.learning_rate": 3e-2}
    slower |= {"critic_optimizer.weight_decay": 0.5}
    now = recipe(iterations=3, **slower, **kept)
    loop.train(now, run)
    told = capsys.readouterr().out
    after, before = states(run, now, 3, 2)
    for who, rate, decay in (("student", 1e-5, 0.01), ("critic", 3e-2, 0.5)):
        was, new = before.learners[who], after.learners[who]
        gradient = new.opt_state[1][0].mu
        adamw = optax.adamw(rate, 1e-30, 0.999, 1e-8, weight_decay=decay)
        step = jax.jit(
            lambda g, s, p, adamw=adamw: optax.apply_updates(p, adamw.update(g, s, p)[0])
        )
        wanted = step(gradient, was.opt_state[1], was.params)
        np.testing.assert_array_equal(new.params["head"]["kernel"], wanted["head"]["kernel"])
        assert np.any(new.params["head"]["kernel"] != was.params["head"]["kernel"])
    found = {line["key"]: line for line in lines(run)}
    assert set(found) == {"iterations", *slower}
    line = found["student_optimizer.learning_rate"]
    assert (line["step"], line["from"], line["to"]) == (2, 2e-4, 1e-5) and line["time"].endswith(
        "+00:00"
    )
    assert (
        "changed after update 2: config.student_optimizer.learning_rate was 0.0002, is 1e-05"
        in told
    )
    assert json.loads((run / "config.json").read_text())["critic_optimizer"]["weight_decay"] == 0.5


def test_the_same_run_again_tells_no_change(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(recipe(), run)
    assert "student       " in capsys.readouterr().out  # the table
    loop.train(recipe(), run)
    told = capsys.readouterr().out
    assert not (run / "changes.jsonl").exists() and "changed" not in told
    assert f"this run, from {tmp_path}/weights.safetensors" in told and str(run) in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student_optimizer.warmup", 5),
        ("student_optimizer.b1", 0.5),
        ("critic_optimizer.decay", True),
        ("ema.decay", 0.5),
        ("schedule.shift", 3.0),
        ("world.frames", 6),
        ("lora.alpha", 2.0),
    ],
)
def test_other_values_are_refused_by_their_own_name(recipe, key, value):
    before, now = recipe(), recipe(**{key: value})
    with pytest.raises(
        UserError, match=rf"trained with config\.{key} = [\w.]+, not {value};"
    ) as error:
        migrate.refuse_another_run(to_json(before), now)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student_optimizer.learning_rate", 1e-3),
        ("critic_optimizer.clip", 1.0),
        ("student_optimizer.weight_decay", 0.0),
        ("keep_every", 5),
        ("sample.num_steps", (1, 2)),
        ("mesh.fsdp", 4),
        ("data.dir", "elsewhere"),
        ("teacher.accept_student", True),
        ("accept_shift", True),
    ],
)
def test_values_that_may_change(recipe, key, value):
    before, now = recipe(), recipe(**{key: value})
    migrate.refuse_another_run(to_json(before), now)
    assert [change.key for change in migrate.changes(to_json(before), now)] == [key]


def test_a_rate_that_decays_may_change_but_not_the_length_of_its_curve(recipe):
    decays = {"student_optimizer.decay": True, "iterations": 10}
    before = to_json(recipe(**decays))
    migrate.refuse_another_run(
        before, recipe(**decays, **{"student_optimizer.learning_rate": 1e-5})
    )
    with pytest.raises(UserError, match=r"config\.iterations = 10, not 20"):
        migrate.refuse_another_run(before, recipe(**decays | {"iterations": 20}))


def test_a_refused_start_leaves_the_workdir_as_it_was(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe(), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for told in (
        {"seed": 1},
        {"batch_size": 4, "mesh.data": 8},
        {"weights": ""},
        {"student_optimizer.b2": 0.9},
    ):
        with pytest.raises(UserError):
            loop.train(recipe(iterations=4, **told), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_weights_may_move_but_not_change(recipe, tmp_path):
    run, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    loop.train(recipe(), run)
    roles = (run / "roles.json").read_bytes()
    moved = weights.rename(tmp_path / "moved.safetensors")
    loop.train(recipe(weights=str(moved), iterations=3), run)
    assert {line["key"] for line in lines(run)} == {"weights", "iterations"}
    save_weights(moved, {"w": np.zeros(3)}, "float32", {})
    with pytest.raises(
        UserError, match=r"the student of this run is \S+moved\S+ .* was \S+weights\S+ "
    ):
        loop.train(recipe(weights=str(moved), iterations=4), run)
    assert (run / "roles.json").read_bytes() == roles
    (run / "roles.json").unlink()  # as in a workdir of an earlier version: names are all there is
    with pytest.raises(UserError, match=r"config\.weights = "):
        loop.train(recipe(weights=str(weights), iterations=4), run)


def test_checkpoints_at_multiples_are_written_and_stay(recipe, tmp_path):
    run = tmp_path / "run"
    loop.train(recipe(iterations=5, save_every=4, keep=1, keep_every=3), run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "5"]


def test_listed_levels_are_what_a_run_is_trained_at(recipe):
    """A rollout's draw, and the levels at which whole clips are noised."""
    listed = {
        "schedule.levels": (1000, 757, 522),
        "schedule.train_levels": 3,
        "schedule.anchor_levels": 1,
    }
    listed |= {"sample.num_steps": (3,), "rollout.num_steps": (3,), "rollout.probabilities": (1.0,)}
    levels = np.float32([1, 0.757, 0.522, 0])
    for call in range(4):
        _, draw = draw_rollout(recipe(video="rollout", **listed), 0, call)
        np.testing.assert_array_equal(draw.levels, levels)
        assert float(draw.sigma_m) in levels.tolist() and float(draw.sigma_e) in levels.tolist()
    batch = Batch(Conditioning(jnp.zeros((64, 2, 3))), video=jnp.zeros((64, 9, 12, 12, 3)))
    noise = draw_start(jax.random.key(0), batch, recipe(**listed))
    start = noised_clip(batch, noise, recipe(**listed))
    assert set(np.asarray(start.sigma).ravel().tolist()) == set(levels[:3].tolist())


def test_a_config_that_is_read_back_has_the_recipes_of_its_time(recipe, tmp_path):
    """`read_workdir` completes what came since, and names a file that is damaged."""
    told = json.loads(to_json(recipe()))
    del told["schedule"]["levels"], told["keep_every"], told["teacher"]["accept_student"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert read_workdir(tmp_path) == recipe()
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"config\.json"):
        read_workdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot read \S+absent/config\.json"):
        read_workdir(Path(tmp_path) / "absent")
