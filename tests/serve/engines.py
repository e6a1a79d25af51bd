"""A generator with one viewer, whom no clock makes it wait for."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from salt_jax.serve.engine import Engine
from salt_jax.serve.messages import Limits, Side, Start
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.offers import Offer
from salt_jax.serve.recording import Recorder
from salt_jax.serve.viewer import Event
from tests.helpers import RED

MEMORY = "cyclic"
LIMITS = Limits(
    viewers=1,
    slots=1,
    turn=30.0,
    seconds=1e9,
    characters=500,
    messages=20.0,
    ahead=1 << 30,
    queue=8,
    kept=256 << 20,
    away=60.0,
)


@contextmanager
def watched(
    offer: Offer,
    folder: Path,
    limits: Limits = LIMITS,
    *,
    steps: int = 2,
    scale: int = 4,
    note: Callable[[Event], None] = lambda event: None,
) -> Iterator[tuple[Engine, Callable[[], Event]]]:
    """The engine, and what waits for its next event.

    `note` is called with each in the engine's thread. All programs are there when the video begins.
    """
    recorder, inbox = Recorder(folder, offer.model.fps, scale), queue.SimpleQueue[Event]()
    engine = Engine({"m": offer}, limits, recorder, Metrics())

    def send(event: Event) -> None:
        note(event)
        inbox.put(event)

    engine.start()
    engine.programs.of(offer.model, offer.memories[MEMORY]).turns.result()
    engine.join("viewer", send)
    engine.say("viewer", Start((Side("m", steps, MEMORY, 0),), RED))
    try:
        yield engine, lambda: inbox.get(timeout=60)
    finally:
        engine.stop("the end")
        recorder.stop()
