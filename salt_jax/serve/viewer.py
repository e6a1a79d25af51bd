"""Somebody who watches, and what goes to and fro."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from salt_jax.keys import Json
from salt_jax.pipeline.live import Made
from salt_jax.serve.take import Take


class Frames(NamedTuple):
    """A chunk on its way to a viewer."""

    told: Json
    pixels: np.ndarray  # uint8 [t, H, W, 3]


Event = Json | Frames
Send = Callable[[Event], None]
"""Hands an event to a viewer's connection; never waits."""


@dataclass
class Viewer:
    """Somebody who watches. Only the engine's thread looks at this."""

    name: str
    send: Send
    takes: list[Take] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)  # names of all it ever had
    prompt: str = ""
    since: float = 0.0  # when its turn began
    started: float = 0.0  # when its video would have begun, had it never waited
    left: float | None = None  # when it went away
    wants: bool = False  # frames; it stands in line as soon as its programs are there


class Chunk(NamedTuple):
    """The next frames of each of a viewer's videos: under way, not waited for."""

    viewer: Viewer
    made: list[Made]
    takes: list[Take]  # the videos with them
    ended: str = ""  # why no more will come
