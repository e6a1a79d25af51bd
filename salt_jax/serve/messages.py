"""What a page says to the server, read from JSON and checked; and what the server may be asked for
at most.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from salt_jax.keys import Json

T = TypeVar("T")


class Limits(NamedTuple):
    """What one server allows."""

    viewers: int  # connected at once
    slots: int  # whose videos are made at once; the others wait
    turn: float  # seconds that one keeps its slot while others wait
    seconds: float  # of a video
    characters: int  # of a prompt
    messages: float  # per second and viewer, on average
    ahead: int  # chunks that a video may be made ahead of the clock
    queue: int  # chunks that wait for a slow viewer; older ones are dropped
    kept: int  # bytes of each video's earlier states, from which it can be forked
    away: float  # seconds that a viewer may be away and find its videos again


class Side(NamedTuple):
    """One of the videos that are shown side by side."""

    model: str
    steps: int
    memory: str
    seed: int


class Start(NamedTuple):
    """New videos of a prompt."""

    sides: tuple[Side, ...]
    prompt: str


class Say(NamedTuple):
    """Another prompt from the next chunk on."""

    prompt: str


class Fork(NamedTuple):
    """A side goes on from an earlier latent frame of it."""

    side: int
    frame: int


class Pause(NamedTuple):
    """Nothing more is made until it ends."""

    on: bool


Message = Start | Say | Fork | Pause


def read_message(
    text: str | bytes, options: Mapping[str, tuple[set[int], set[str]]], limits: Limits
) -> Message:
    """A message of a page.

    Args:
      options: by the name of a model: the numbers of steps and the memories that it has.

    Raises:
      ValueError: it is none, in a sentence for the page.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("a message is a JSON object") from error
    if not isinstance(said, dict) or not isinstance(said.get("type"), str):
        raise ValueError('a message is a JSON object with a "type"')
    match said["type"]:
        case "start":
            sides = _get(said, "sides", list)
            if not 1 <= len(sides) <= 2:
                raise ValueError("one or two videos are made side by side")
            return Start(tuple(_side(s, options) for s in sides), _prompt(said, limits))
        case "prompt":
            return Say(_prompt(said, limits))
        case "fork":
            side, frame = _get(said, "side", int), _get(said, "frame", int)
            if side not in (0, 1) or not 0 <= frame < 1 << 31:
                raise ValueError("there is no such moment")
            return Fork(side, frame)
        case "pause":
            return Pause(_get(said, "on", bool))
    raise ValueError(f"there is no message {said['type'][:40]!r}")


def _prompt(said: Json, limits: Limits) -> str:
    prompt = " ".join(_get(said, "prompt", str).split())
    if not prompt:
        raise ValueError("a prompt has words")
    if len(prompt) > limits.characters:
        raise ValueError(f"a prompt has at most {limits.characters} characters")
    if not prompt.isprintable():
        raise ValueError("a prompt has characters that can be shown")
    return prompt


def _side(said: object, options: Mapping[str, tuple[set[int], set[str]]]) -> Side:
    if not isinstance(said, dict):
        raise ValueError("a side is a JSON object")
    side = Side(
        _get(said, "model", str),
        _get(said, "steps", int),
        _get(said, "memory", str),
        _get(said, "seed", int),
    )
    if side.model not in options:
        raise ValueError(f"there is no model {side.model[:40]!r}")
    steps, memories = options[side.model]
    if side.steps not in steps or side.memory not in memories:
        raise ValueError(f"{side.model} is not sampled like that")
    if not 0 <= side.seed < 1 << 31:
        raise ValueError("a seed is a number from 0 to 2147483647")
    return side


def _get(said: Json, name: str, kind: type[T]) -> T:
    value = said.get(name)
    if type(value) is not kind:  # True is no number
        raise ValueError(f"{name!r} is missing or of another kind")
    return value
