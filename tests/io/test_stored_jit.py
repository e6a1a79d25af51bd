"""Programs that are stored, and found again as another process would find them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.io import stored_jit
from salt_jax.io.stored_jit import StoredJit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(StoredJit, "folder", tmp_path / "programs")
    return tmp_path / "programs"


def make():
    """A function, as a new process would have it, and how often it was traced."""
    traced = []

    def power(exponent, tree, x):
        traced.append(exponent)
        return {"x": (tree["a"] * x) ** exponent}, x + 1

    return StoredJit(power, static=(0,), donated=2), traced


def arguments(size=3):
    return {"a": jnp.arange(4.0)[:size]}, jnp.full((size,), 2.0)


def test_a_stored_program_is_neither_traced_nor_compiled_again(folder):
    first, traced = make()
    wanted = first(2, *arguments())[0]["x"]
    np.testing.assert_array_equal(wanted, (2 * np.arange(3.0)) ** 2)
    assert traced == [2] and len(list(folder.iterdir())) == 1
    again, traced = make()
    tree, x = arguments()
    found, more = again(2, tree, x)
    np.testing.assert_array_equal(found["x"], wanted)
    np.testing.assert_array_equal(more, np.full(3, 3.0, np.float32))
    assert x.is_deleted() and not tree["a"].is_deleted()  # donated as it was
    again(2, *arguments())
    assert traced == []


@pytest.mark.parametrize("what", ["static", "shape", "dtype", "circumstances"])
def test_what_decides_a_program_names_its_file(folder, monkeypatch, what):
    make()[0](2, *arguments())
    again, traced = make()
    if what == "circumstances":
        monkeypatch.setattr(stored_jit, "_circumstances", lambda: "another version")
    tree, x = arguments(2 if what == "shape" else 3)
    again(3 if what == "static" else 2, tree, x.astype("int32") if what == "dtype" else x)
    assert len(traced) == 1 and len(list(folder.iterdir())) == 2


def test_of_too_many_the_oldest_go(folder, monkeypatch):
    monkeypatch.setattr(stored_jit, "MOST", 2)
    power, _ = make()
    for exponent in (1, 2, 3):
        power(exponent, *arguments())
    assert len(list(folder.iterdir())) == 2
    make()[0](3, *arguments())
    assert len(list(folder.iterdir())) == 2


def test_without_a_folder_nothing_is_stored(tmp_path):
    assert StoredJit.folder is None
    power, traced = make()
    power(2, *arguments())
    assert traced == [2] and jax.config.values["jax_enable_compilation_cache"]


def test_a_file_that_is_damaged_is_made_again(folder, caplog):
    make()[0](2, *arguments())
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again, traced = make()
    again(2, *arguments())
    assert traced == [2] and file.stat().st_size > 100
    assert f"{file} is made again" in caplog.text


def test_where_nothing_can_be_written_it_is_said(folder, caplog):
    folder.write_text("no folder")
    power, traced = make()
    power(2, *arguments())
    power(2, *arguments())
    assert traced == [2] and "is not stored" in caplog.text
