"""The generator's thread without a connection."""

import queue

import pytest

import salt_jax
from salt_jax.serve import engine as engines
from salt_jax.serve.engine import Engine
from salt_jax.serve.messages import Limits, Pause, Say, Side, Start
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.offers import make_offer
from salt_jax.serve.recording import Recorder
from salt_jax.serve.viewer import Frames

RED, BLUE = "A red circle moves left.", "A blue square moves up."
SIDE = Side("m", 2, "cyclic", 0)
LIMITS = Limits(1, 1, 30.0, 600.0, 500, 20.0, 1 << 30, 8, 64 << 20, 60.0)  # no clock holds it


@pytest.fixture(scope="module")
def offer():
    return make_offer(salt_jax.load("shapes_causal"))


@pytest.fixture
def run(offer, tmp_path):
    """What begins an engine with one viewer, and what the viewer is sent."""
    running = []

    def begin(limits, note=lambda event: None):
        def send(event):
            note(event)  # in the engine's thread
            inbox.put(event)

        recorder, inbox = Recorder(tmp_path, 16, 4), queue.SimpleQueue()
        running.append((Engine({"m": offer}, limits, recorder, Metrics()), recorder))
        engine = running[0][0]
        engine.start()
        engine.programs.of(offer.model, offer.memories["cyclic"]).turns.result()
        engine.join("viewer", send)
        engine.say("viewer", Start((SIDE,), RED))
        return engine, lambda: inbox.get(timeout=60)

    yield begin
    for engine, recorder in running:
        engine.stop("the end")
        recorder.stop()


def test_a_chunk_is_under_way_before_the_one_before_is_delivered(run, monkeypatch):
    order, go_on = [], engines.go_on

    def noted(model, take, prompt, kept):
        order.append(("under way", take.live.frames))
        return go_on(model, take, prompt, kept)

    def note(event):
        if isinstance(event, Frames):
            order.append(("delivered", event.told["frame"]))

    monkeypatch.setattr(engines, "go_on", noted)
    _, get = run(LIMITS, note)
    while not (isinstance(event := get(), Frames) and event.told["frame"] == 57):
        pass
    for frame in range(0, 57, 3):
        assert order.index(("under way", frame + 3)) < order.index(("delivered", frame))
        assert order.index(("delivered", frame)) < order.index(("under way", frame + 6))


def test_who_is_never_waited_for_is_heard(run):
    engine, get = run(LIMITS)
    while not isinstance(get(), Frames):
        pass
    engine.say("viewer", Say(BLUE))
    while not (isinstance(event := get(), Frames) and event.told["prompt"] == BLUE):
        assert not isinstance(event, Frames) or event.told["prompt"] == RED


def test_a_video_ends_with_its_last_frame(run):
    engine, get = run(LIMITS._replace(seconds=3.0))
    events = []
    while not events or isinstance(events[-1], Frames) or events[-1]["type"] != "finished":
        events.append(get())
    assert [e.told["frame"] for e in events if isinstance(e, Frames)] == list(range(0, 48, 3))
    assert events[-1]["reason"] == "This server's videos end after 3 s."
    engine.say("viewer", Pause(False))  # more of it is asked for
    while isinstance(event := get(), Frames) or event["type"] != "finished":
        assert not isinstance(event, Frames)
