"""The generator's thread without a connection."""

import pytest

import salt_jax
from salt_jax.serve import engine as engines
from salt_jax.serve.messages import Pause, Say
from salt_jax.serve.offers import make_offer
from salt_jax.serve.viewer import Frames
from tests.helpers import BLUE, RED
from tests.serve.engines import LIMITS, watched


@pytest.fixture(scope="module")
def offer():
    return make_offer(salt_jax.load("shapes_causal"))


def test_a_chunk_is_under_way_before_the_one_before_is_delivered(offer, tmp_path, monkeypatch):
    order, go_on = [], engines.go_on

    def noted(model, take, prompt, kept):
        order.append(("under way", take.live.frames))
        return go_on(model, take, prompt, kept)

    def note(event):
        if isinstance(event, Frames):
            order.append(("delivered", event.told["frame"]))

    monkeypatch.setattr(engines, "go_on", noted)
    with watched(offer, tmp_path, note=note) as (_, get):
        while not (isinstance(event := get(), Frames) and event.told["frame"] == 57):
            pass
    for frame in range(0, 57, 3):
        assert order.index(("under way", frame + 3)) < order.index(("delivered", frame))
        assert order.index(("delivered", frame)) < order.index(("under way", frame + 6))


def test_who_is_never_waited_for_is_heard(offer, tmp_path):
    with watched(offer, tmp_path) as (engine, get):
        while not isinstance(get(), Frames):
            pass
        engine.say("viewer", Say(BLUE))
        while not (isinstance(event := get(), Frames) and event.told["prompt"] == BLUE):
            assert not isinstance(event, Frames) or event.told["prompt"] == RED


def test_a_video_ends_with_its_last_frame(offer, tmp_path):
    with watched(offer, tmp_path, LIMITS._replace(seconds=3.0)) as (engine, get):
        events = []
        while not events or isinstance(events[-1], Frames) or events[-1]["type"] != "finished":
            events.append(get())
        assert [e.told["frame"] for e in events if isinstance(e, Frames)] == list(range(0, 48, 3))
        assert events[-1]["reason"] == "This server's videos end after 3 s."
        engine.say("viewer", Pause(False))  # more of it is asked for
        while isinstance(event := get(), Frames) or event["type"] != "finished":
            assert not isinstance(event, Frames)
