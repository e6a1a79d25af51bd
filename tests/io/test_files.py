"""Files of this machine and of a bucket, which the emulator of `tests.buckets` stands for."""

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from salt_jax.errors import UserError
from salt_jax.io import files
from salt_jax.io.files import as_path, in_bucket
from salt_jax.io.tensor_files import digest


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """An empty folder, here and there."""
    return (
        tmp_path / "new" if request.param == "disk" else as_path(request.getfixturevalue("bucket"))
    )


@pytest.mark.parametrize("where", ["s3://bucket/run", "hf://x", "file:///tmp/x", "GS://b/x"])
def test_another_address_is_refused_with_the_remedy(where):
    with pytest.raises(UserError, match="cannot be read or written here; mount it as a folder"):
        as_path(where)
    with pytest.raises(UserError, match=f"^--workdir={where}: "):
        as_path(where, "--workdir")


def test_without_gcsfs_an_address_is_refused_by_name(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "gcsfs" else found(n))
    files._prepared.cache_clear()
    try:
        with pytest.raises(
            UserError, match=r"--out=gs://b/x needs .* pip install 'salt_jax\[gcs\]'"
        ):
            as_path("gs://b/x", "--out")
    finally:
        files._prepared.cache_clear()


@pytest.mark.parametrize("where", ["runs/a", "/runs/a", "./a", "", "a:b", "~/a", "gs:/a"])
def test_a_path_of_this_machine_is_pathlibs(where):
    assert as_path(where) == Path(where) and isinstance(as_path(where), Path)
    assert not in_bucket(where)


def test_an_address_keeps_its_slashes(bucket):
    assert str(as_path(f"{bucket}/run") / "config.json") == f"{bucket}/run/config.json"
    assert str(files.real(as_path(f"{bucket}/run") / ".." / "x")) == f"{bucket}/x"


def test_a_file_is_written_whole_and_replaced(folder):
    file = folder / "deep" / "file"
    files.write_whole(file, "ä")
    assert file.read_bytes() == "ä".encode() and file.is_file() and not folder.is_file()
    files.write_whole(file, b"new")
    assert file.read_bytes() == b"new" and files.size(file) == 3
    assert files.below(folder) == [file]


def test_lines_are_added_behind_one_that_was_cut_off(folder):
    file = folder / "lines"
    files.append(file, b"one\n")
    files.append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"
    files.write_whole(file, b"one\ntw")
    files.append(file, b"three\n")
    assert file.read_bytes() == b"one\ntw\nthree\n"


def test_parts_of_a_file_are_read(folder, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 7)
    content = os.urandom(300)
    files.write_whole(folder / "file", content)
    parts = files.read_ranges(folder / "file", [(3, 5), (0, 300), (299, 1), (10, 0)])
    assert [p.tobytes() for p in parts] == [content[3:8], content, content[299:], b""]
    assert b"".join(files.blocks(folder / "file")) == content
    assert digest(folder / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(OSError, match="ends before byte 301"):
        files.read_ranges(folder / "file", [(299, 2)])
    with pytest.raises(FileNotFoundError):
        files.read_ranges(folder / "absent", [(0, 1)])


def test_a_folder_is_listed_with_all_below_it_and_without_marks_of_folders(folder):
    for name in ("b", "a/c", "a/d/e"):
        files.write_whole(folder / name, name)
    if in_bucket(folder):  # as a console makes a folder
        files._buckets().pipe_file(f"{folder}/a/", b"")
    assert [str(f.relative_to(folder)) for f in files.below(folder)] == ["a/c", "a/d/e", "b"]
    assert files.below(folder / "none") == []


def test_a_library_that_opens_files_gets_one_of_this_machine(folder):
    files.write_whole(folder / "model.json", b"content")
    with files.on_disk(folder / "model.json") as here:
        assert here.name == "model.json" and here.read_bytes() == b"content"
    assert here.exists() != in_bucket(folder)


def test_what_is_made_piece_by_piece_appears_when_it_is_whole(folder):
    files.write_whole(folder / "file", b"old")
    with files.made_on_disk(folder / "file") as temporary:
        temporary.write_bytes(b"new")
        assert (folder / "file").read_bytes() == b"old"
    assert (folder / "file").read_bytes() == b"new"
    with pytest.raises(ValueError), files.made_on_disk(folder / "file") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    assert files.below(folder) == [folder / "file"]
    assert (folder / "file").read_bytes() == b"new" and not temporary.exists()


def test_all_of_a_folder_goes_to_its_place_or_nothing(folder):
    files.write_whole(folder / "kept", b"old")
    with pytest.raises(KeyError), files.all_or_nothing(folder) as made:
        (made / "x").write_text("x")
        raise KeyError
    assert files.below(folder) == [folder / "kept"]
    with files.all_or_nothing(folder) as made:
        (made / "deep").mkdir()
        (made / "deep" / "y").write_text("y")
    assert (folder / "deep" / "y").read_text() == "y" and not made.exists()
    assert len(files.below(folder)) == 2


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "file", b"old")

    def fail(*args, **options):
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        files.write_whole(tmp_path / "file", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_room_is_that_of_the_folder_above_what_is_not_there(tmp_path, bucket):
    assert files.free_bytes(tmp_path / "no" / "such") > 0 and files.free_bytes(as_path(bucket)) > 0


def test_an_error_of_a_buckets_library_is_a_sentence():
    errors = pytest.importorskip("google.auth.exceptions")

    told = files.refusal(errors.DefaultCredentialsError("no credentials\nmore"))
    assert "(no credentials); check its name" in told and "\n" not in told
    assert files.refusal(OSError("disk")) == "" == files.refusal(np.exceptions.AxisError(1))


def test_two_that_make_a_file_at_once_know_who_has(bucket):
    """What the lock of a workdir stands on."""
    files._buckets().pipe_file(f"{bucket}/lock", b"one", mode="create")
    with pytest.raises(FileExistsError):
        files._buckets().pipe_file(f"{bucket}/lock", b"two", mode="create")
    assert as_path(f"{bucket}/lock").read_bytes() == b"one"
