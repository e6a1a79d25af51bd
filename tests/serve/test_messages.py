"""What a page may say: everything else is a sentence, and never an exception of another kind."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_jax.serve.messages import Fork, Limits, Pause, Say, Side, Start, read_message

LIMITS = Limits(2, 1, 30.0, 600.0, 20, 10.0, 2, 8, 1 << 20, 60.0)
OPTIONS = {"m": ({2, 4}, {"window"})}
SIDE = {"model": "m", "steps": 4, "memory": "window", "seed": 3}


def read(message):
    return read_message(json.dumps(message), OPTIONS, LIMITS)


def test_messages_are_read():
    side = Side("m", 4, "window", 3)
    start = {"type": "start", "sides": [SIDE, SIDE], "prompt": "  a  cat "}
    assert read(start) == Start((side, side), "a cat")
    assert read({"type": "prompt", "prompt": "x" * 20}) == Say("x" * 20)
    assert read({"type": "fork", "side": 1, "frame": 9}) == Fork(1, 9)
    assert read({"type": "pause", "on": True}) == Pause(True)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ([], "a message is a JSON object"),
        ({"type": "prompt"}, "'prompt' is missing"),
        ({"type": "prompt", "prompt": "  "}, "has words"),
        ({"type": "prompt", "prompt": "x" * 21}, "at most 20 characters"),
        ({"type": "prompt", "prompt": "a\x00b"}, "can be shown"),
        ({"type": "fork", "side": 2, "frame": 0}, "no such moment"),
        ({"type": "fork", "side": True, "frame": 0}, "'side' is missing or of another kind"),
        ({"type": "start", "sides": [], "prompt": "a"}, "one or two"),
        ({"type": "start", "sides": [SIDE] * 3, "prompt": "a"}, "one or two"),
        ({"type": "start", "sides": [SIDE | {"model": "n"}], "prompt": "a"}, "no model 'n'"),
        ({"type": "start", "sides": [SIDE | {"steps": 3}], "prompt": "a"}, "not sampled like that"),
        ({"type": "start", "sides": [SIDE | {"seed": -1}], "prompt": "a"}, "a seed is"),
        ({"type": "start", "sides": ["m"], "prompt": "a"}, "a side is a JSON object"),
        ({"type": "jump"}, "no message 'jump'"),
    ],
)
def test_what_is_none_is_told(message, told):
    with pytest.raises(ValueError, match=told):
        read(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
KINDS = st.sampled_from(["start", "prompt", "fork", "pause", "x"])
SHAPED = st.fixed_dictionaries(
    {"type": KINDS},
    optional=dict.fromkeys(("sides", "prompt", "side", "frame", "on"), JSON)
    | {"sides": st.lists(st.fixed_dictionaries(dict.fromkeys(SIDE, JSON)), max_size=3)},
)


@given(st.one_of(JSON, SHAPED).map(json.dumps) | st.text() | st.binary())
def test_nothing_that_is_said_raises_anything_else(said):
    try:
        message = read_message(said, OPTIONS, LIMITS)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(message, Start | Say | Fork | Pause)
