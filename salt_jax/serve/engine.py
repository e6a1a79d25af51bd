"""The thread that makes all videos of a server: one chunk of one viewer after another."""

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from salt_jax.keys import Json
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.pipeline.model import Model
from salt_jax.serve.messages import Fork, Limits, Message, Pause, Say, Start
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.recording import Recorder
from salt_jax.serve.take import Take, begin, fork_at, go_on, record


class Offer(NamedTuple):
    """A model as viewers may choose it."""

    model: Model
    steps: tuple[int, ...]
    memories: Mapping[str, CachePolicy]


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


class Engine:
    """Makes videos until it is stopped. `join`, `leave` and `say` may be called by any thread."""

    def __init__(
        self, offers: Mapping[str, Offer], limits: Limits, recorder: Recorder, metrics: Metrics
    ):
        self.offers, self.limits, self.recorder, self.metrics = offers, limits, recorder, metrics
        self.records: dict[str, Json] = {}  # of videos, by name
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._viewers: dict[str, Viewer] = {}
        self._line: list[Viewer] = []  # who wants frames, the first have a slot
        self._stop = False
        self.thread = threading.Thread(target=self._run, name="generator", daemon=True)

    def join(self, name: str, send: Send) -> None:
        self._calls.put(lambda: self._join(name, send))

    def leave(self, name: str, send: Send) -> None:
        self._calls.put(lambda: self._leave(name, send))

    def say(self, name: str, message: Message) -> None:
        self._calls.put(lambda: self._say(self._viewers[name], message))

    def stop(self, reason: str) -> None:
        """Tells every viewer, and waits for the thread."""
        self._calls.put(lambda: self._end(reason))
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        try:
            while not self._stop:
                self._listen()
                self._turn()
                for viewer in self._line[: self.limits.slots]:
                    if not self._stop and self._due(viewer) <= time.monotonic():
                        self._make(viewer)
        except BaseException:
            self._end("The generator failed; the server's log says why.")
            raise

    def _listen(self) -> None:
        """Does what others ask for; waits for it while no chunk is due."""
        now = time.monotonic()
        due = min(map(self._due, self._line[: self.limits.slots]), default=now + 1)
        wait = max(0.0, min(due - now, 1.0))
        try:
            self._calls.get(timeout=wait)() if wait else self._calls.get_nowait()()
            while not self._stop:
                self._calls.get_nowait()()
        except queue.Empty:
            pass

    def _due(self, viewer: Viewer) -> float:
        """When its next chunk may be made: some chunks ahead of the clock of who watches."""
        live, model = viewer.takes[0].live, self.offers[viewer.takes[0].side.model].model
        policy = live.sampler.memory
        assert policy
        ahead = live.frames - self.limits.ahead * policy.chunk
        return viewer.started + model.parts.shown(max(0, ahead)) / model.fps

    def _turn(self) -> None:
        """Viewers whose turn is over stand behind those who wait; forgets those who are gone."""
        now, slots = time.monotonic(), self.limits.slots
        for viewer in list(self._viewers.values()):
            if viewer.left is not None and now - viewer.left > self.limits.away:
                self._forget(viewer)
        if len(self._line) > slots:
            over = [v for v in self._line[:slots] if now - v.since > self.limits.turn]
            if over:
                rest = [v for v in self._line if v not in over]
                self._queue(rest + over)

    def _queue(self, line: Iterable[Viewer]) -> None:
        """A new order of who waits; everybody is told its place."""
        now, before = time.monotonic(), self._line[: self.limits.slots]
        self._line = list(line)
        for place, viewer in enumerate(self._line):
            if place < self.limits.slots and viewer not in before:
                viewer.since = now
                live = viewer.takes[0].live
                model = self.offers[viewer.takes[0].side.model].model
                viewer.started = now - model.parts.shown(live.frames) / model.fps
            waits = max(0, place - self.limits.slots + 1)
            viewer.send({"type": "place", "place": waits, "turn": self.limits.turn})
        self.metrics.viewers.set(len(self._viewers))
        self.metrics.waiting.set(max(0, len(self._line) - self.limits.slots))

    def _make(self, viewer: Viewer) -> None:
        """A chunk of each of its videos."""
        begun, offers = time.perf_counter(), self.offers
        models = [offers[take.side.model].model for take in viewer.takes]
        made = []
        try:
            for i, model in enumerate(models):
                chunk, viewer.takes[i] = go_on(
                    model, viewer.takes[i], viewer.prompt, self.limits.kept
                )
                made.append(chunk)
        except ValueError as error:  # no room for more
            return self._finish(viewer, f"{error}.")
        for i, (model, chunk) in enumerate(zip(models, made, strict=True)):
            jax.block_until_ready(chunk.latents)
            waited = time.perf_counter()
            pixels = model.parts.to_bytes(chunk.decoded)
            self.metrics.seconds.labels("decoder").observe(time.perf_counter() - waited)
            take = viewer.takes[i]
            told = {"type": "frames", "side": i, "frame": chunk.at, "prompt": chunk.prompt}
            told |= {"until": take.live.frames, "video": take.name}
            viewer.send(Frames(told, pixels))
            self.recorder.write(take.name, pixels)
            self.records[take.name] = record(model, take)
            self.metrics.frames.inc(len(pixels))
        self.metrics.seconds.labels("chunk").observe(time.perf_counter() - begun)
        longest = models[0].parts.shown(viewer.takes[0].live.frames) / models[0].fps
        if longest >= self.limits.seconds:
            self._finish(viewer, f"This server's videos end after {self.limits.seconds:g} s.")

    def _finish(self, viewer: Viewer, reason: str) -> None:
        viewer.send({"type": "finished", "reason": reason})
        self._queue(v for v in self._line if v is not viewer)

    def _join(self, name: str, send: Send) -> None:
        viewer = self._viewers.setdefault(name, Viewer(name, send))
        if viewer.send != send and viewer.left is None:  # a tab that was copied
            viewer.send({"type": "end", "reason": "This video is watched in another tab."})
        viewer.send, viewer.left = send, None
        if viewer.takes:
            send(self._started(viewer))
        self.metrics.viewers.set(len(self._viewers))

    def _leave(self, name: str, send: Send) -> None:
        viewer = self._viewers.get(name)
        if viewer and viewer.send == send:
            viewer.left, viewer.send = time.monotonic(), lambda event: None
            self._pause(viewer, True)

    def _forget(self, viewer: Viewer) -> None:
        del self._viewers[viewer.name]
        for name in viewer.videos:
            self.recorder.remove(name)
            self.records.pop(name, None)

    def _say(self, viewer: Viewer, message: Message) -> None:
        match message:
            case Start(sides, prompt):
                for take in viewer.takes:
                    self.recorder.close(take.name)
                viewer.takes = []
                for side in sides:
                    offer, name = self.offers[side.model], secrets.token_urlsafe(12)
                    memory = offer.memories[side.memory]
                    viewer.takes.append(begin(offer.model, name, side, memory, prompt))
                viewer.prompt = prompt
            case Say(prompt):
                viewer.prompt = prompt
                return
            case Fork(side, frame):
                try:
                    old = viewer.takes[side]
                    name, model = secrets.token_urlsafe(12), self.offers[old.side.model].model
                    new = fork_at(model, old, name, frame)
                except (IndexError, ValueError):
                    viewer.send({"type": "error", "message": "The video has not come so far."})
                    return
                viewer.takes = [new]
                viewer.prompt = new.script[max(new.script)]
                self.recorder.close(old.name)
            case Pause(on):
                if viewer.takes:
                    self._pause(viewer, on)
                return
        viewer.videos += [take.name for take in viewer.takes]
        viewer.send(self._started(viewer))
        self._pause(viewer, True)  # behind those who wait
        self._pause(viewer, False)

    def _pause(self, viewer: Viewer, on: bool) -> None:
        others = [v for v in self._line if v is not viewer]
        if on:
            self._queue(others)
        else:
            self._queue([*others, viewer])

    @staticmethod
    def _started(viewer: Viewer) -> Json:
        takes = viewer.takes
        return {
            "type": "started",
            "prompt": viewer.prompt,
            "videos": [
                {
                    **take.side._asdict(),
                    "video": take.name,
                    "frame": take.live.frames,
                    "script": {str(frame): prompt for frame, prompt in take.script.items()},
                }
                for take in takes
            ],
        }

    def _end(self, reason: str) -> None:
        self._stop = True
        for viewer in self._viewers.values():
            viewer.send({"type": "end", "reason": reason})
