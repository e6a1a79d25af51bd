"""The thread that makes all videos of a server: one chunk of one viewer after another."""

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import jax
from prometheus_client.context_managers import Timer

from salt_jax.keys import Json
from salt_jax.pipeline.model import Model
from salt_jax.serve.messages import Fork, Limits, Message, Pause, Say, Start
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.offers import Offer
from salt_jax.serve.programs import Programs, Ready
from salt_jax.serve.recording import Recorder
from salt_jax.serve.take import Take, begin, fork_at, go_on, record
from salt_jax.serve.viewer import Chunk, Frames, Send, Viewer


class Engine:
    """Makes videos until it is stopped. `join`, `leave` and `say` may be called by any thread."""

    def __init__(
        self, offers: Mapping[str, Offer], limits: Limits, recorder: Recorder, metrics: Metrics
    ):
        self.offers, self.limits, self.recorder, self.metrics = offers, limits, recorder, metrics
        self.records: dict[str, Json] = {}  # of videos, by name
        self.programs = Programs()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._viewers: dict[str, Viewer] = {}
        self._line: list[Viewer] = []  # who wants frames, the first have a slot
        self._stop = False
        self.thread = threading.Thread(target=self._run, name="generator", daemon=True)

    def start(self) -> None:
        for offer in self.offers.values():
            self.programs.of(offer.model, next(iter(offer.memories.values())))
        self.thread.start()

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
        self.programs.stop()

    def _run(self) -> None:
        try:
            under_way: list[Chunk] = []
            while not self._stop:
                self._turn()
                # the device has its next work before any frame is waited for, unless somebody asks
                # for something: what is under way is delivered first
                asked = under_way and not self._calls.empty()
                following = [] if asked else [self._make(viewer) for viewer in self._due_now()]
                for chunk in under_way:
                    self._deliver(chunk)
                under_way = following
                if not under_way:
                    self._listen()
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

    def _due_now(self) -> list[Viewer]:
        now = time.monotonic()
        return [v for v in self._line[: self.limits.slots] if self._due(v) <= now]

    def _due(self, viewer: Viewer) -> float:
        """When its next chunk may be made: some chunks ahead of the clock of who watches."""
        live, model = viewer.takes[0].live, self._model(viewer.takes[0])
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
                live, model = viewer.takes[0].live, self._model(viewer.takes[0])
                viewer.started = now - model.parts.shown(live.frames) / model.fps
            waits = max(0, place - self.limits.slots + 1)
            viewer.send({"type": "place", "place": waits, "turn": self.limits.turn})
        self.metrics.viewers.set(len(self._viewers))
        self.metrics.waiting.set(max(0, len(self._line) - self.limits.slots))

    def _model(self, take: Take) -> Model:
        return self.offers[take.side.model].model

    def _ready(self, take: Take) -> Ready:
        offer = self.offers[take.side.model]
        return self.programs.of(offer.model, offer.memories[take.side.memory])

    def _make(self, viewer: Viewer) -> Chunk:
        """The next chunk of each of its videos, not waited for."""
        made, ended = [], ""
        try:
            for i, take in enumerate(viewer.takes):
                model = self._model(take)
                if model.parts.shown(take.live.frames) >= self.limits.seconds * model.fps:
                    raise ValueError(f"This server's videos end after {self.limits.seconds:g} s")
                turns = self._ready(take).turns.done() or not take.live.frames
                prompt = viewer.prompt if turns else take.live.prompt
                chunk, viewer.takes[i] = go_on(model, take, prompt, self.limits.kept)
                made.append(chunk)
        except ValueError as error:  # no room for more
            ended = f"{error}."
            self._pause(viewer, True)
        return Chunk(viewer, made, list(viewer.takes), ended)

    def _deliver(self, chunk: Chunk) -> None:
        for i, (take, made) in enumerate(zip(chunk.takes, chunk.made, strict=False)):
            model = self._model(take)
            with self._timed("transformer"):
                jax.block_until_ready(made.latents)
            with self._timed("decoder"):
                pixels = model.parts.to_bytes(made.decoded)
            told = {"type": "frames", "side": i, "frame": made.at, "prompt": made.prompt}
            told |= {"until": take.live.frames, "video": take.name}
            chunk.viewer.send(Frames(told, pixels))
            with self._timed("writing"):
                self.recorder.write(take.name, pixels)
            self.records[take.name] = record(model, take)
            self.metrics.frames.inc(len(pixels))
        if chunk.ended:
            chunk.viewer.send({"type": "finished", "reason": chunk.ended})

    def _timed(self, part: str) -> Timer:
        """Counts how long the generator waits for a part."""
        return self.metrics.seconds.labels(part).time()

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
                    name, model = secrets.token_urlsafe(12), self._model(old)
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
        self._pause(viewer, False)

    def _pause(self, viewer: Viewer, on: bool) -> None:
        viewer.wants = not on
        self._queue(v for v in self._line if v is not viewer)
        if viewer.wants:
            self._queue_when_compiled(viewer, list(viewer.takes))

    def _queue_when_compiled(self, viewer: Viewer, takes: list[Take]) -> None:
        """Puts a viewer behind those who wait; first, where it must be, its programs are made."""
        if not viewer.wants or [t.name for t in takes] != [t.name for t in viewer.takes]:
            return  # it has thought better of it
        for take in takes:
            programs = self._ready(take).goes_on
            if not programs.done():
                viewer.send({"type": "preparing"})
                again = lambda _: self._calls.put(lambda: self._queue_when_compiled(viewer, takes))
                programs.add_done_callback(again)
                return
            programs.result()
        self._queue([*self._line, viewer])

    @staticmethod
    def _started(viewer: Viewer) -> Json:
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
                for take in viewer.takes
            ],
        }

    def _end(self, reason: str) -> None:
        self._stop = True
        for viewer in self._viewers.values():
            viewer.send({"type": "end", "reason": reason})
