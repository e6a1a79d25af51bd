"""The logs of a run, and its stop where updates are not finite."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsFloat

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, in_bucket
from salt_jax.keys import Json

RARELY = 120.0  # seconds

log = logging.getLogger(__name__)


def summarize(recent: Sequence[Mapping[str, SupportsFloat]]) -> dict[str, float]:
    """The mean of each term over the updates that had it; of counters the last value."""
    names = {name for metrics in recent for name in metrics}
    series = {name: [float(m[name]) for m in recent if name in m] for name in sorted(names)}
    counters = ("skipped", "in_a_row")
    return {
        name: values[-1] if name.endswith(counters) else float(np.mean(values))
        for name, values in series.items()
    }


class EventLog:
    """The TensorBoard events of a run, written by who calls.

    SummaryWriter of tensorboardX leaves it to a thread; that ends where the disk is full, and then
    whoever waits for it waits for ever.
    """

    def __init__(self, workdir: str | AnyPath, on: bool = True):
        """Begins a file of its own in the workdir. `on` False writes nothing."""
        self._where, self._seen = os.fspath(workdir), time.monotonic()
        with self._refusals():
            self._events = EventsWriter(f"{self._where}/events") if on else None

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._events and kind is None:
            with self._refusals():
                self._events.close()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Raises UserError where the disk refuses, as the others here."""
        self._add({"tag": name, "simple_value": value}, step)

    def picture(self, name: str, gif: bytes, size: tuple[int, int], step: int) -> None:
        """An animated one; `size` is (height, width)."""
        image = {"height": size[0], "width": size[1], "colorspace": 3, "encoded_image_string": gif}
        self._add({"tag": name, "image": image}, step)

    def _add(self, value: Json, step: int) -> None:
        """A `Summary.Value`, as its fields."""
        if self._events:
            # Any: its classes are made when it is imported, where no type checker sees them
            proto: Any = event_pb2
            summary = {"value": [value]}
            event = proto.Event(wall_time=time.time(), step=step, summary=summary)
            with self._refusals():
                self._events.write_event(event)

    def flush(self, anyway: bool = False) -> None:
        """Shows what was written.

        In a bucket a file is written anew by each flush, and these files grow: there it is done
        every `RARELY` seconds, unless `anyway`.
        """
        now = time.monotonic()
        if self._events and (anyway or not in_bucket(self._where) or now > self._seen + RARELY):
            self._seen = now
            with self._refusals():
                self._events.flush()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the log of the run to {self._where} ({error.strerror or error}): "
                "make room, and start again; the last checkpoint is whole"
            ) from error


def report(values: dict[str, float], step: int, events: EventLog, bar: tqdm) -> None:
    """Scalars to TensorBoard, the losses to the bar."""
    for name, value in values.items():
        events.scalar(name, value, step)
    events.flush()
    bar.set_postfix(
        {k: f"{v:.4g}" for k, v in values.items() if not k.endswith(("skipped", "row", "norm"))}
    )


def stop_if_stuck(values: dict[str, float], limit: int, step: int) -> None:
    """Raises UserError, naming the terms that are not finite, once `limit` updates in a row were
    skipped.
    """
    for who in ("student", "critic"):
        skipped, in_a_row = (
            values.get(f"{who}_skipped", 0),
            values.get(f"{who}_skipped_in_a_row", 0),
        )
        if in_a_row >= limit:
            bad = [k for k, v in values.items() if not np.isfinite(v)] or ["the gradient"]
            raise UserError(
                f"{in_a_row:.0f} {who} updates in a row were not finite at update {step} "
                f"({', '.join(bad)}); "
                "lower the learning rate, or restart from an earlier checkpoint"
            )
        if skipped:
            log.warning("%d %s updates skipped so far: not finite", skipped, who)
