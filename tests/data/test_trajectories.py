"""Trajectories on disk: each part is a function of its number, what is there is kept, and they read
as a data set.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.data.pipeline import batches
from salt_jax.errors import UserError
from salt_jax.flow.schedule import grid
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.moving_shapes.latents import to_latent
from salt_jax.moving_shapes.shapes import World
from salt_jax.stages import make_stage
from salt_jax.stages.ode_regression import OdeRegression
from salt_jax.stages.stage import RecordSource
from tests.helpers import Straight, mesh_of, with_networks

CLIP = (6, 4, 4, 3)
RECIPE = read_recipe(base.get_config())
RECIPE = replace(
    RECIPE,
    stage="ode_regression",
    batch_size=4,
    seed=3,
    schedule=replace(RECIPE.schedule, train_levels=2),
    ode=replace(RECIPE.ode, num_steps=4, trajectories=11, guidance=1.0),
)
SOURCE = [
    {
        "video": np.random.default_rng(i).integers(0, 256, CLIP, np.uint8),
        "caption": f"clip {i}",
        "scene": i,
    }
    for i in range(5)
]


NETWORK = Straight(PRESETS["wan2.1-t2v-tiny"], Compute())


def encode(caption):
    """[1, 2], another for each clip."""
    return np.full((1, 2), float(caption.split()[1]), np.float32)


def make(workdir, recipe=RECIPE, source=SOURCE):
    """The velocity is half the clip's number."""
    stage = with_networks(make_stage(recipe, mesh_of()), student=NETWORK)
    frozen = {"teacher": jnp.float32(0.5), "null_text": np.zeros((1, 1, 2), np.float32)}
    return stage.records(RecordSource(source, workdir, frozen, encode, False))


def contents(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "trajectories").iterdir()}


def test_records_are_clips_with_their_captions_and_trajectories(tmp_path):
    """11 trajectories are three batches of 4 that go around the five clips; the velocity is half
    the clip's number.
    """
    made = make(tmp_path)
    assert len(made) == 12 and len(contents(tmp_path)) == 3
    levels = grid(2, RECIPE.schedule.shift)[:, None, None, None, None]
    noises = []
    for index in range(12):
        record, clip = made[index], index % 5
        assert record["caption"] == f"clip {clip}" and record["states"].shape == (3, *CLIP)
        np.testing.assert_array_equal(record["video"], to_latent(SOURCE[clip]["video"], World()))
        np.testing.assert_allclose(
            record["states"], record["states"][:1] - (1 - levels) * clip / 2, atol=1e-5
        )
        noises.append(record["states"][0].ravel())
    # 288 values each: over six standard deviations.
    assert np.abs(np.corrcoef(noises) - np.eye(12)).max() < 0.4


def test_a_few_clips_at_a_time_they_are_the_same(tmp_path):
    whole = make(tmp_path / "whole")
    portions = make(tmp_path / "portions", replace(RECIPE, accumulate=2))
    for a, b in zip(whole, portions, strict=True):
        assert a["caption"] == b["caption"]
        np.testing.assert_allclose(a["states"], b["states"], atol=1e-6)


def test_a_part_is_a_function_of_the_seed_and_its_number_and_what_is_there_is_kept(tmp_path):
    make(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    make(stopped)
    first, *later = (stopped / "trajectories" / f"{i:05d}.safetensors" for i in range(3))
    for part in later:  # stopped after the first part
        part.unlink()
    half = later[0].with_name(f"{later[0].name}.partial")
    half.write_bytes(b"half")  # in the middle of the second
    kept = first.stat().st_mtime_ns
    make(stopped)
    assert contents(stopped) == whole
    assert first.stat().st_mtime_ns == kept
    later[0].unlink()
    make(stopped)
    assert contents(stopped) == whole
    make(tmp_path / "other", replace(RECIPE, seed=4))
    assert all(contents(tmp_path / "other")[name] != whole[name] for name in whole)


def test_batches_of_trajectories_bring_their_states(tmp_path):
    """The clips are latents already and stay as they are; everything in a batch still belongs
    together.
    """
    made, share = make(tmp_path), {"rows": np.arange(6), "world": World()}
    batch = next(batches(made, batch_size=6, seed=0, start=0, encode_caption=encode, **share))
    assert batch["states"].shape == (6, 3, *CLIP) and batch["states"].dtype == np.float32
    known = {made[i]["states"].tobytes(): made[i] for i in range(len(made))}
    for i in range(6):
        record = known[batch["states"][i].tobytes()]
        np.testing.assert_array_equal(batch["video"][i], record["video"])
        np.testing.assert_array_equal(batch["text"][i], encode(record["caption"]))


def test_the_device_is_asked_for_what_is_missing_only(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(OdeRegression, "trajectory", lambda *_: pytest.fail("made again"))
    assert len(make(tmp_path)) == 12


@pytest.mark.parametrize(
    "key, name, value",
    [("ode.guidance", "ode", replace(RECIPE.ode, guidance=3.0)), ("seed", "seed", 4)],
)
def test_parts_that_another_config_left_behind_are_refused(tmp_path, key, name, value):
    """A run stopped before its first checkpoint and started with other values: resuming cannot
    tell, parts can.
    """
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"config.{key} = .*--workdir"):
        make(tmp_path, replace(RECIPE, **{name: value}))
    assert contents(tmp_path) == before


def test_a_longer_run_takes_the_parts_of_a_shorter_one(tmp_path):
    make(tmp_path)
    before = contents(tmp_path)
    make(tmp_path, replace(RECIPE, iterations=RECIPE.iterations + 1, log_every=1))
    assert contents(tmp_path) == before


def test_a_part_that_does_not_say_what_made_it_is_refused(tmp_path):
    make(tmp_path)
    part = tmp_path / "trajectories" / "00001.safetensors"
    save_file(load_file(part), part)
    with pytest.raises(UserError, match=r"00001\.safetensors has no config in it"):
        make(tmp_path)
