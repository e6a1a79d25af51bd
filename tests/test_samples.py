"""Records of what made a file: who is left alone, who is replaced, and whose work is never
touched.
"""

import hashlib
import json

import pytest

from salt_jax import samples
from salt_jax.errors import UserError
from salt_jax.samples import Sample, look_up, put

MADE = {
    "prompt": "a cat",
    "levels": [1.0, 0.9375, 0.0],
    "memory": None,
    "network": {"sha256": "ab", "step": 3},
}


@pytest.fixture
def index(tmp_path):
    return tmp_path / "out" / samples.NAME


def sample(index, name="4_000.mp4", source="runs/a", **changed):
    return Sample(index.parent / name, source, MADE | changed)


def test_a_file_is_left_alone_where_it_would_be_made_again(index):
    put(index, sample(index), b"video")
    put(index, sample(index, "4_001.mp4"), b"another")
    found = look_up(index, [sample(index), sample(index, "4_001.mp4"), sample(index, "4_002.mp4")])
    assert {path.name for path in found.there} == {"4_000.mp4", "4_001.mp4"} and not found.older
    told = json.loads(index.read_text().splitlines()[0])
    assert told["sha256"] == hashlib.sha256(b"video").hexdigest() and told["made_with"] == MADE


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a dog"}, {"levels": [1.0, 0.0]}, {"memory": {"window": 9}},
     {"network": {"sha256": "cd", "step": 4}}, {"guidance": 3.0}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_whatever_else_made_it_is_told_and_made_anew(index, changed):
    put(index, sample(index), b"video")
    other = sample(index, **changed)
    found = look_up(index, [other])
    assert found.older == {other.file} and not found.there
    put(index, other, b"new")
    assert look_up(index, [other]).there == {other.file}
    assert look_up(index, [sample(index)]).older == {other.file}  # the first is not there any more


def test_anothers_work_is_never_replaced(index):
    put(index, sample(index), b"video")
    with pytest.raises(UserError, match="was made by runs/a, not by runs/b; name another --out"):
        look_up(index, [sample(index, source="runs/b", prompt="a dog")])
    assert look_up(index, [sample(index, source="runs/b")]).there  # the same bits, read elsewhere
    sample(index).file.write_bytes(b"cut by hand")
    with pytest.raises(UserError, match="does not tell what made it"):
        look_up(index, [sample(index)])
    (index.parent / "4_001.mp4").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"4_000.mp4.*\(and so for 1 more\)"):
        look_up(index, [sample(index), sample(index, "4_001.mp4")])


def test_a_stop_at_any_moment_leaves_no_file_without_its_line(index, monkeypatch):
    """The line comes first. One that was cut off does not spoil the next."""
    put(index, sample(index), b"video")

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            put(index, sample(index, prompt="a dog"), b"new")
    assert (
        look_up(index, [sample(index)]).there
        and look_up(index, [sample(index, prompt="a dog")]).older
    )
    with open(index, "a") as lines:
        lines.write('{"file": "4_0')
    put(index, sample(index, "4_001.mp4"), b"next")
    assert len(look_up(index, [sample(index), sample(index, "4_001.mp4")]).there) == 2
