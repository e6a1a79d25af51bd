"""The students that Salt's authors released, by the names and the nesting in their files, and ours
in that form.
"""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from salt_jax.convert.writing import Transformer
from salt_jax.convert.writing_torch import NAME, write_pt
from salt_jax.errors import UserError
from tests.convert.networks import T2V, come_in, official, save_torch
from tests.helpers import randomised, same_bits, shapes_of

KEYS = ("generator", "generator_ema", "critic")
WRAPPED = r"\1._fsdp_wrapped_module._checkpoint_wrapped_module."
# How a state_dict and the average of a wrapped network spell the names of the release
SPELLINGS = {
    "plain": lambda name: f"model.{name}",
    "bare": lambda name: name,
    "wrapped": lambda name: (
        "model._fsdp_wrapped_module." + re.sub(r"^(blocks\.\d+)\.", WRAPPED, name)
    ),
}


@pytest.fixture
def trees(tmp_path):
    """A network under each key; the folder says how many heads so small a one has."""
    (tmp_path / "config.json").write_text('{"num_heads": 2}')
    return {key: randomised(shapes_of(T2V), i) for i, key in enumerate(KEYS)}


@pytest.mark.parametrize(
    ("name", "spelt", "averaged"),
    [
        ("salt_cf.pt", "plain", "bare"),
        ("salt_cf.pt", "wrapped", "plain"),
        ("salt_ll.pt", "wrapped", "wrapped"),
    ],
)
def test_each_network_of_a_released_file_comes_in_by_its_key(
    tmp_path, trees, name, spelt, averaged
):
    spellings = dict(zip(KEYS, map(SPELLINGS.get, (spelt, averaged, spelt)), strict=True))
    tables = {
        key: {spellings[key](name): w for name, w in official(tree, T2V).items()}
        for key, tree in trees.items()
    }
    file = save_torch(tmp_path / name, tables)
    for key in ("", *KEYS):
        found, tree = come_in([file], tmp_path, key=key)
        assert (found.student, found.config) == (key or "generator_ema", T2V)
        same_bits(tree, trees[found.student])


@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
def test_what_goes_out_comes_back_bit_for_bit_and_is_the_same_file_twice(tmp_path, trees, dtype):
    seen = []
    networks = [(key, Transformer(T2V, tree)) for key, tree in trees.items()]
    for folder in ("a", "b"):
        write_pt(tmp_path / folder, networks, dtype, seen.append)
        (tmp_path / folder / "config.json").write_text('{"num_heads": 2}')
    file = tmp_path / "a" / NAME
    assert file.read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    assert sum(seen) == 2 * sum(w.size for w in jax.tree.leaves(trees)) * (2 if dtype else 4)
    for key, tree in trees.items():
        found, back = come_in([file], tmp_path, key=key)
        assert found.student == key
        same_bits(back, jax.tree.map(lambda w: w.astype(dtype or w.dtype), tree))
    with pytest.raises(UserError, match=f"{NAME} exists; name another folder"):
        write_pt(tmp_path / "a", networks)


def test_a_network_is_asked_for_when_its_turn_comes(tmp_path, trees):
    """Three networks of a run need not be in memory together."""
    order = []

    def networks():
        for key, tree in trees.items():
            order.append(key)
            yield key, Transformer(T2V, tree)

    write_pt(tmp_path / "out", networks(), report=lambda count: order.append("written"))
    assert [a for a, b in zip(order, ["", *order], strict=False) if a != b] == [
        step for key in KEYS for step in (key, "written")
    ]


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path, trees):
    def networks():
        yield "generator", Transformer(T2V, trees["generator"])
        raise OSError("the disk is full")

    with pytest.raises(UserError, match=r"cannot write to .*the disk is full"):
        write_pt(tmp_path / "out", networks())
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
def test_torch_loads_what_we_write(tmp_path, trees):
    import torch

    wanted = official(trees["critic"], T2V)
    for dtype in (None, ml_dtypes.bfloat16):
        folder = tmp_path / str(dtype)
        write_pt(folder, [("critic", Transformer(T2V, trees["critic"]))], dtype)
        for mapped in (False, True):
            found = torch.load(folder / NAME, "cpu", weights_only=True, mmap=mapped)
            assert found.keys() == {"critic"}
            assert found["critic"].keys() == {f"model.{name}" for name in wanted}
            for name, w in found["critic"].items():
                assert w.dtype == (torch.bfloat16 if dtype else torch.float32) and w.is_contiguous()
                there = wanted[name.removeprefix("model.")].astype(dtype or np.float32)
                np.testing.assert_array_equal(w.float().numpy(), there.astype(np.float32))
