"""The server as a page sees it."""

import io
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.request import urlopen

import av
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import salt_jax
from salt_jax.serve import programs
from salt_jax.serve.app import Access, make_app
from salt_jax.serve.offers import make_offer
from tests.helpers import BLUE, RED, ROOT
from tests.serve import engines

LIMITS = engines.LIMITS._replace(
    viewers=3, turn=1.0, seconds=600.0, ahead=1000, queue=2000, kept=64 << 20
)
START = {"type": "start", "prompt": RED}
SIDE = {"model": "m", "steps": 2, "memory": "window", "seed": 1}


@pytest.fixture(scope="module")
def offers():
    return {"m": make_offer(salt_jax.load("shapes_causal"))}


@contextmanager
def served(offers, token="", **limits):
    app = make_app(offers, LIMITS._replace(**limits), Access(("localhost",), token))
    with TestClient(app, "http://localhost") as client:
        yield client


def started(*sides, prompt=RED):
    return START | {"sides": [SIDE | side for side in sides or ({},)], "prompt": prompt}


class Page:
    """A connection, and what came by it."""

    def __init__(self, socket):
        self.socket, self.events, self.frames = socket, [], {0: [], 1: []}
        self.inbox = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """In a thread, so that a server that says nothing fails a test and does not stop it."""
        message = {"type": ""}
        while message["type"] != "websocket.close":
            try:
                message = self.socket.receive()
            except BaseException:  # the test is over
                return
            self.inbox.put(message)

    def say(self, **message):
        self.socket.send_text(json.dumps(message))

    def read(self, until, limit=60.0):
        """Events until one fits."""
        end = time.monotonic() + limit
        while True:
            message = self.inbox.get(timeout=end - time.monotonic())
            if message["type"] == "websocket.close":
                raise WebSocketDisconnect(message["code"], message.get("reason"))
            if message.get("bytes"):
                event = read_frames(message["bytes"])
                self.frames[event["side"]].append(event)
            else:
                event = json.loads(message["text"])
            self.events.append(event)
            if until(event):
                return event

    def of(self, kind):
        return self.read(lambda event: event["type"] == kind)

    def until(self, frame):
        return self.read(lambda e: e["type"] == "frames" and e["until"] >= frame)


def read_frames(data):
    size = int.from_bytes(data[:4], "little")
    event, at, pictures = json.loads(data[4 : 4 + size]), 4 + size, []
    for length in event["sizes"]:
        pictures.append(np.asarray(Image.open(io.BytesIO(data[at : at + length]))))
        at += length
    assert at == len(data)
    return event | {"pixels": np.stack(pictures)}


@contextmanager
def page(client, query="", **headers):
    with client.websocket_connect(f"ws://localhost/watch{query}", headers=headers) as socket:
        yield Page(socket)


def test_a_video_comes_and_turns_and_is_forked_and_downloaded(offers):
    with served(offers) as client, page(client) as watcher:
        hello = watcher.of("hello")
        assert hello["models"][0]["steps"] == [2, 4, 8] and RED in hello["models"][0]["examples"]
        watcher.say(**started())
        name = watcher.of("started")["videos"][0]["video"]
        watcher.until(6)
        watcher.say(type="prompt", prompt=BLUE)
        watcher.read(lambda e: e["type"] == "frames" and e["prompt"] == BLUE)
        assert watcher.of("frames")["frame"] > 6
        shown = watcher.frames[0]
        assert [e["frame"] for e in shown] == list(range(0, 3 * len(shown), 3))
        watcher.say(type="pause", on=True)
        watcher.say(type="fork", side=0, frame=4)
        watcher.of("started")
        fork = watcher.read(lambda e: e["type"] == "frames" and e["video"] != name)
        assert fork["frame"] == 3  # of the prompt it had there
        np.testing.assert_array_equal(fork["pixels"], shown[1]["pixels"])
        record = client.get(f"/video/{name}.json").json()
        at = next(e["frame"] for e in shown if e["prompt"] == BLUE)
        assert record["prompts"] == {"0": RED, str(at): BLUE} and record["seed"] == 1
        movie = client.get(f"/video/{name}.mp4")
        with av.open(io.BytesIO(movie.content)) as container:
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(decoded) >= len(shown) * 3 - 16
        small = decoded[4].reshape(12, 16, 12, 16, 3).mean((1, 3))
        assert np.abs(small - shown[1]["pixels"][1]).mean() < 4
        assert client.get("/video/other.mp4").status_code == 404


def test_it_is_the_video_of_the_library(offers):
    model, memory = offers["m"].model, offers["m"].memories["window"]
    with served(offers) as client, page(client) as watcher:
        watcher.say(**started({}, {"steps": 4}))
        watcher.read(lambda e: e["type"] == "frames" and e["side"] == 1 and e["until"] >= 12)
    for side, steps in ((0, 2), (1, 4)):
        made = np.concatenate(
            list(model.stream(RED, memory=memory, num_steps=steps, seed=1, frames=12))
        )
        shown = np.concatenate([e["pixels"] for e in watcher.frames[side]])[:12]
        np.testing.assert_array_equal(shown, made)


def test_a_prompt_that_was_never_learnt_is_said_to_be_so(offers):
    with served(offers) as client, page(client) as watcher:
        watcher.say(**started(prompt="An elephant."))
        told = watcher.of("prompt")
        assert not told["learnt"] and RED in told["examples"]
        watcher.say(type="prompt", prompt=RED)
        assert watcher.of("prompt")["learnt"]


def test_viewers_wait_for_their_turn_and_see_their_place(offers):
    with served(offers) as client, page(client) as one, page(client) as two:
        one.say(**started())
        one.until(3)
        two.say(**started({"seed": 2}))
        assert two.read(lambda e: e["type"] == "place" and e["place"])["place"] == 1
        two.until(3)  # when the turn of the first is over
        assert one.read(lambda e: e["type"] == "place" and e["place"])["place"] == 1
        before = one.frames[0][-1]["until"]
        assert one.until(before + 3)["frame"] == before  # and goes on where it was
        with page(client) as three:
            three.of("hello")
            with pytest.raises(WebSocketDisconnect) as error, page(client) as four:
                four.of("hello")
            assert error.value.code == 1013


def test_a_viewer_who_comes_back_finds_its_video(offers):
    with served(offers) as client:
        with page(client) as watcher:
            name = watcher.of("hello")["viewer"]
            watcher.say(**started())
            video = watcher.of("started")["videos"][0]["video"]
            watcher.until(6)
        with page(client, f"?viewer={name}") as again:
            found = again.of("started")["videos"][0]
            assert found["video"] == video and found["frame"] >= 6
            again.say(type="pause", on=False)
            assert again.of("frames")["frame"] == found["frame"]


def test_a_copied_tab_takes_the_video_over(offers):
    with served(offers) as client, page(client) as first:
        name = first.of("hello")["viewer"]
        first.say(**started())
        first.until(3)
        with page(client, f"?viewer={name}") as second:
            assert first.of("end")["reason"] == "This video is watched in another tab."
            video = second.of("started")["videos"][0]
            first.socket.close()
            assert second.of("frames")["frame"] >= video["frame"]


def test_one_who_is_gone_is_forgotten(offers):
    with served(offers, away=0.1) as client:
        with page(client) as watcher:
            watcher.say(**started())
            video = watcher.of("started")["videos"][0]["video"]
            watcher.until(3)
            assert client.get(f"/video/{video}.json").status_code == 200
        until = time.monotonic() + 30
        while client.get(f"/video/{video}.json").status_code == 200 and time.monotonic() < until:
            time.sleep(0.1)
        assert client.get(f"/video/{video}.json").status_code == 404


def test_a_slow_viewer_loses_frames_and_the_recording_none(offers):
    """A page that does not read: the generator goes on."""
    with served(offers, queue=2, seconds=3.0) as client, page(client) as watcher:
        watcher.say(**started())
        video = watcher.of("started")["videos"][0]["video"]
        until = time.monotonic() + 60
        while "salt_frames_total 48.0" not in client.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert watcher.of("finished")["reason"] == "This server's videos end after 3 s."
        watcher.say(**started())
        watcher.of("started")  # closes the file of the one before
        watcher.until(3)
        movie = client.get(f"/video/{video}.mp4").content
        with av.open(io.BytesIO(movie)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 48


def test_strangers_stay_outside(offers):
    with served(offers, token="secret") as client:
        for query, headers in (
            ("", {}),
            ("?token=wrong", {}),
            ("?token=secret", {"origin": "http://evil.example"}),
        ):
            with pytest.raises(WebSocketDisconnect) as error, page(client, query, **headers):
                pass
            assert error.value.code == 1008
        with page(client, "?token=secret", origin="http://localhost") as watcher:
            watcher.of("hello")
        assert client.get("/metrics").status_code == 403
        assert client.get("/metrics?token=secret").status_code == 200
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/../app.py").status_code == 404


def test_nonsense_is_answered_and_a_flood_is_not(offers):
    with served(offers) as client, page(client) as watcher:
        for said in ("", "{", "[]", "x" * 20_000, '{"type": "fork", "side": 0, "frame": 0}'):
            watcher.socket.send_text(said)
            assert watcher.of("error")["message"].endswith(".")
        with pytest.raises(WebSocketDisconnect) as error:
            for _ in range(1000):
                watcher.socket.send_text("{}")
            watcher.read(lambda event: False)
        assert error.value.code == 1008
        assert client.get("/healthz").status_code == 200


def test_the_end_of_the_server_is_told(offers):
    with served(offers) as client, page(client) as watcher:
        watcher.say(**started())
        watcher.until(3)
        client.app.state.server.engine.stop("The server stops.")
        assert watcher.of("end")["reason"] == "The server stops."
        with pytest.raises(WebSocketDisconnect) as error:
            watcher.read(lambda event: False)
        assert error.value.code == 1001
        assert client.get("/healthz").status_code == 503


def test_while_programs_are_compiled_other_videos_go_on(offers, monkeypatch):
    compiled, make = threading.Event(), programs._go_on

    def slow(model, memory):
        if memory == offers["m"].memories["last chunks"]:
            compiled.wait(30)
        return make(model, memory)

    monkeypatch.setattr(programs, "_go_on", slow)
    with served(offers, slots=2) as client, page(client) as one, page(client) as other:
        one.say(**started())
        one.until(3)
        other.say(**started({"memory": "last chunks"}))
        other.of("preparing")
        one.until(one.frames[0][-1]["until"] + 9)
        other.say(type="pause", on=True)
        other.say(type="pause", on=False)  # asks again
        other.of("preparing")
        assert not other.frames[0]
        compiled.set()
        other.until(9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_programs_that_cannot_be_made_end_the_server(offers, monkeypatch):
    def fails(model, memory):
        raise MemoryError("no room")

    monkeypatch.setattr(programs, "_go_on", fails)
    with served(offers) as client, page(client) as watcher:
        watcher.say(**started())
        assert "log says why" in watcher.of("end")["reason"]
        client.app.state.server.engine.thread.join(10)
        assert client.get("/healthz").status_code == 503


def test_the_end_does_not_wait_for_a_program(offers, monkeypatch):
    """Nor does the process: XLA cannot be interrupted."""
    compiled = threading.Event()
    monkeypatch.setattr(programs, "_go_on", lambda model, memory: compiled.wait(600))
    with served(offers) as client, page(client) as watcher:
        watcher.say(**started())
        watcher.of("preparing")
    assert client.app.state.server.engine.programs.busy
    compiled.set()


SLOW_COMPILER = """
import sys, time
from salt_jax.serve import programs
programs._go_on = lambda model, memory: time.sleep(600)
sys.argv = ["serve", "--port=0"]
from salt_jax.cli import serve
serve.run()
"""


def test_ctrl_c_does_not_wait_for_a_program():
    command = [sys.executable, "-c", SLOW_COMPILER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = server.stdout.readline().strip()
            assert urlopen(f"{address}healthz", timeout=60).status == 200
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()
