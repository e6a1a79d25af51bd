"""What is on disk is what `example` makes, and is made once."""

import itertools
import sys

import numpy as np
import pytest

from salt_jax.errors import UserError
from salt_jax.moving_shapes import dataset, shapes
from salt_jax.moving_shapes.shapes import World

WORLDS = {
    "9 frames": World(),
    "21 frames": World(frames=21),
    "pair": World(pair=True, radius=2.0),
}


def assert_same(record: dict, other: dict) -> None:
    assert record.keys() == other.keys()
    for name in record:
        np.testing.assert_array_equal(record[name], other[name])


def test_example_is_a_function_of_seed_and_index():
    draws = {}
    for seed, index in itertools.product((0, 1), (*range(20), dataset.TEST_START)):
        example = dataset.example(World(), seed, index)
        assert_same(example, dataset.example(World(), seed, index))
        draws[seed, index] = example["scene"], example["mode"]
    for seed in (0, 1):
        assert len({draws[seed, i] for i in range(20)}) > 15
    assert sum(draws[0, i] == draws[1, i] for i in range(20)) < 3
    assert draws[0, 0] != draws[0, dataset.TEST_START]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_example_agrees_with_its_indices(world):
    example = dataset.example(world, 3, 14)
    scene, mode = shapes.scenes(world)[example["scene"]], shapes.modes(world)[example["mode"]]
    assert example["caption"] == shapes.caption(scene)
    np.testing.assert_array_equal(example["video"], shapes.render(scene, mode, world))


def test_scenes_and_modes_are_uniform_and_independent(monkeypatch):
    monkeypatch.setattr(shapes, "render", lambda *args: None)  # only the draws matter here
    draws = [
        dataset.example(World(size=6, radius=1.0, starts=(0.0, 2.0, 4.0)), 0, i)
        for i in range(4800)
    ]
    scenes, modes = (np.array([d[name] for d in draws]) for name in ("scene", "mode"))
    for values, count in ((scenes, 48), (modes, 18), (scenes % 8 * 6 + modes % 6, 48)):
        expected = len(draws) / count
        chi_square = ((np.bincount(values, minlength=count) - expected) ** 2 / expected).sum()
        degrees = count - 1
        assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_records_survive_the_disk(tmp_path, world):
    train, test = dataset.build(tmp_path, world, 12, 5, 7)
    assert (len(train), len(test)) == (12, 5)
    for i in range(12):
        assert_same(train[i], dataset.example(world, 7, i))
    for i in range(5):
        assert_same(test[i], dataset.example(world, 7, dataset.TEST_START + i))
    assert train[0]["video"].dtype == np.uint8 and isinstance(train[0]["caption"], str)
    assert "tensorflow" not in sys.modules


def test_second_build_reads_what_the_first_wrote(tmp_path, monkeypatch):
    dataset.build(tmp_path, World(), 6, 2, 0)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert any("array_record" in path.name for path in files)
    monkeypatch.setattr(dataset.MovingShapes, "_generate_examples", None)  # would fail if called
    train, _ = dataset.build(tmp_path, World(), 6, 2, 0)
    assert_same(train[5], dataset.example(World(), 0, 5))
    assert files == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }


def test_different_data_sets_share_a_directory(tmp_path):
    sets = [
        (World(), 4, 2, 0),
        (World(), 4, 2, 1),
        (World(), 5, 2, 0),
        (World(speeds=(1.0,)), 4, 2, 0),
    ]
    built = [dataset.build(tmp_path, *values)[0] for values in sets]
    for train, (world, num_train, _, seed) in zip(built, sets, strict=True):
        assert len(train) == num_train
        assert_same(train[3], dataset.example(world, seed, 3))


def test_interrupted_build_starts_again(tmp_path, monkeypatch):
    example = dataset.example

    def interrupted(world, seed, index):
        if index == 4:
            raise KeyboardInterrupt
        return example(world, seed, index)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset, "example", interrupted)
        dataset.build(tmp_path, World(), 6, 2, 0)
    train, _ = dataset.build(tmp_path, World(), 6, 2, 0)
    assert_same(train[5], dataset.example(World(), 0, 5))


def test_runs_that_start_at_once_read_what_the_first_wrote(tmp_path, monkeypatch):
    """Another run begins and ends while this one renders."""
    generate = dataset.MovingShapes._generate_examples

    def overtaken(self, *args):
        monkeypatch.setattr(dataset.MovingShapes, "_generate_examples", generate)
        dataset.build(tmp_path, World(), 6, 2, 0)
        yield from generate(self, *args)

    monkeypatch.setattr(dataset.MovingShapes, "_generate_examples", overtaken)
    train, test = dataset.build(tmp_path, World(), 6, 2, 0)
    assert (len(train), len(test)) == (6, 2)
    assert not list(tmp_path.rglob("incomplete*"))


def test_data_of_another_renderer_is_refused(tmp_path, monkeypatch):
    dataset.build(tmp_path, World(), 3, 1, 0)
    monkeypatch.setattr(shapes, "COLOURS", dict.fromkeys(shapes.COLOURS, (0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match=r"another version of .*shapes.py: delete this directory"):
        dataset.build(tmp_path, World(), 3, 1, 0)


def test_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="num_test=0"):
        dataset.build(tmp_path, World(), 3, 0, 0)
