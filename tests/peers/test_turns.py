"""Turns, ratios, and the refusal to compare times of different results."""

import sys

import numpy as np
import pytest

from salt_jax.errors import UserError
from salt_jax.peers import installed, turns
from salt_jax.peers.turns import Side


def side(value, seen=None, name=""):
    def run():
        if seen is not None:
            seen.append(name)
        return value

    return Side(run, lambda out: {"y": np.asarray(out, np.float32)})


def test_everyone_has_one_turn_in_a_round_and_every_second_round_is_reversed():
    seen = []
    part = {name: side(0.0, seen, name) for name in "abc"}
    seconds = turns.take_turns(part, range(3))
    assert "".join(seen) == "abccbaabc"
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 3)


def test_ratios_are_of_turns_of_one_round():
    """A machine that halves its speed changes no ratio; quartiles of 1, 2, 3, 4, 5 are 2, 3, 4."""
    drift = np.array([1.0, 2.0, 1.0, 2.0, 1.0])
    seconds = {
        "ours": (drift * [1, 2, 3, 4, 5]).tolist(),
        "diffusers": drift.tolist(),
        "diffusers, compiled": (2 * drift).tolist(),
    }
    assert turns.ratios(seconds, "diffusers") == {
        "ours": {"diffusers": [2.0, 3.0, 4.0], "diffusers, compiled": [1.0, 1.5, 2.0]}
    }


def test_the_distance_is_in_units_of_what_is_wanted():
    wanted = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert turns.distance(wanted, wanted) == 0
    assert turns.distance({"a": np.array([3.0]), "b": np.array([[3.0]])}, wanted) == 1 / 5
    for wrong in ({"a": wanted["a"]}, {"a": wanted["a"], "b": np.array([4.0])}):
        assert turns.distance(wrong, wanted) == float("inf")


@pytest.mark.parametrize("dtype, fits, not_", [("float32", 1.0005, 1.01), ("bfloat16", 1.05, 1.2)])
def test_results_that_differ_are_refused(dtype, fits, not_):
    far = turns.compare("forward", {"ours": side(fits), "peer": side(1.0)}, "peer", dtype)
    assert far == {"ours": pytest.approx(fits - 1, rel=1e-3)}
    for wrong in (not_, float("nan")):
        with pytest.raises(UserError, match=r"forward: the result of ours is .* away from"):
            turns.compare("forward", {"ours": side(wrong), "peer": side(1.0)}, "peer", dtype)


def test_the_table_has_medians_and_quartiles():
    row = {"part": "forward", "seconds": {"ours": [1.0, 3.0], "diffusers": [2.0, 2.0]}}
    row["ratios"] = turns.ratios(row["seconds"], "diffusers")
    _, ours, theirs = turns.show([row]).splitlines()
    assert ours.split(maxsplit=3)[2:] == ["2", "1.00 (0.75 to 1.25) of diffusers"]
    assert theirs.split() == ["forward", "diffusers", "2"]


def test_an_absent_peer_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch cannot be loaded .* requirements-dev"):
        installed("torch")
