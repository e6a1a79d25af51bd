"""The server: a page, a WebSocket for each viewer, downloads, health and metrics."""

import asyncio
import hmac
import io
import ipaddress
import json
import secrets
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from salt_jax.io.video import visible_scale
from salt_jax.keys import Json
from salt_jax.serve.engine import Engine
from salt_jax.serve.messages import Limits, Say, Start, read_message
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.offers import Offer
from salt_jax.serve.recording import Recorder, whole_fragments
from salt_jax.serve.viewer import Event, Frames

PAGE = Path(__file__).with_name("page")
LOSSLESS = 128  # pixels: smaller pictures are sent as they are
REFUSED, GOING, TOO_MANY = 1008, 1001, 1013  # RFC 6455, 7.4


class Access(NamedTuple):
    """Who may come in."""

    hosts: tuple[str, ...]  # names of this server; "*" is any
    token: str  # "" is none


class Outbox:
    """Events on their way to a viewer. All but `send` is for the event loop's thread."""

    def __init__(self, most: int, dropped: Callable[[], None]):
        self.loop, self.most, self.dropped = asyncio.get_running_loop(), most, dropped
        self.events: deque[Event] = deque()
        self.there = asyncio.Event()

    def send(self, event: Event) -> None:
        """Of any thread; never waits."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        chunks = [kept for kept in self.events if isinstance(kept, Frames)]
        if isinstance(event, Frames) and len(chunks) >= self.most:
            self.events.remove(chunks[0])
            self.dropped()
        self.events.append(event)
        self.there.set()

    async def get(self) -> Event:
        while not self.events:
            self.there.clear()
            await self.there.wait()
        return self.events.popleft()


def as_message(frames: Frames) -> bytes:
    """A chunk for a page: the length of a JSON header, 4 bytes, the header, and its pictures."""
    small = frames.pixels.shape[1] <= LOSSLESS
    pictures = []
    for pixels in frames.pixels:
        file = io.BytesIO()
        picture = Image.fromarray(pixels)
        picture.save(file, "PNG") if small else picture.save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    told = frames.told | {"format": "png" if small else "jpeg", "sizes": [*map(len, pictures)]}
    header = json.dumps(told).encode()
    return len(header).to_bytes(4, "little") + header + b"".join(pictures)


def describe(offers: Mapping[str, Offer], limits: Limits) -> Json:
    """What a page may ask for."""
    models = []
    for name, offer in offers.items():
        parts = offer.model.parts
        models.append(
            {
                "name": name,
                "steps": offer.steps,
                "memories": list(offer.memories),
                "fps": parts.fps,
                "examples": parts.examples,
                "perLatent": parts.shown(2) - parts.shown(1),
            }
        )
    return {"type": "hello", "models": models, "limits": limits._asdict()}


class Server:
    """What the routes share."""

    def __init__(self, offers: Mapping[str, Offer], limits: Limits, access: Access, folder: Path):
        self.offers, self.limits, self.access = offers, limits, access
        model = next(iter(offers.values())).model
        self.metrics, scale = Metrics(), visible_scale(model.pixels[0], 192)
        self.recorder = Recorder(folder, model.fps, scale)
        self.engine = Engine(offers, limits, self.recorder, self.metrics)
        self.options = {
            name: (set(offer.steps), set(offer.memories)) for name, offer in offers.items()
        }
        self.connected = 0

    async def stop(self) -> None:
        """Tells every viewer that this is the end."""
        if self.engine.thread.is_alive():
            await asyncio.to_thread(self.engine.stop, "The server stops.")
            await asyncio.sleep(0.2)  # until it is sent

    def allowed(self, connection: HTTPConnection) -> bool:
        """Whether it has the token, and comes from a page of this server."""
        given = connection.query_params.get("token", "")
        origin, host = connection.headers.get("origin"), connection.headers.get("host", "")
        same = origin is None or urlsplit(origin).netloc == host
        return same and hmac.compare_digest(given.encode(), self.access.token.encode())

    async def watch(self, socket: WebSocket) -> None:
        if not self.allowed(socket):
            await socket.close(REFUSED, "The token is wrong, or the page is of another server.")
            return
        await socket.accept()
        if self.connected >= self.limits.viewers:
            await socket.close(TOO_MANY, "This server has all the viewers that it can have.")
            return
        self.connected += 1
        name = socket.query_params.get("viewer", "")
        name = name if len(name) == 32 and name.isalnum() else secrets.token_hex(16)
        outbox = Outbox(self.limits.queue, self.metrics.dropped.inc)
        outbox.send(describe(self.offers, self.limits) | {"viewer": name})
        self.engine.join(name, outbox.send)
        sending = asyncio.create_task(self._tell(socket, outbox))
        try:
            await self._listen(socket, name, outbox)
        except WebSocketDisconnect:
            pass
        finally:
            self.connected -= 1
            sending.cancel()
            self.engine.leave(name, outbox.send)

    async def _tell(self, socket: WebSocket, outbox: Outbox) -> None:
        while True:
            event = await outbox.get()
            if isinstance(event, Frames):
                await socket.send_bytes(await asyncio.to_thread(as_message, event))
            else:
                await socket.send_text(json.dumps(event))
                if event["type"] == "end":
                    await socket.close(GOING, event["reason"])

    async def _listen(self, socket: WebSocket, name: str, outbox: Outbox) -> None:
        credit, last = self.limits.messages, time.monotonic()
        while True:
            text = await socket.receive()
            if text["type"] == "websocket.disconnect":
                return
            now = time.monotonic()
            credit = min(credit + (now - last) * self.limits.messages, 2 * self.limits.messages) - 1
            last = now
            if credit < 0:
                await socket.close(REFUSED, "Too many messages.")
                return
            try:
                said = text.get("text") or text.get("bytes") or ""
                if len(said) > 10_000:
                    raise ValueError("a message has at most 10000 characters")
                message = read_message(said, self.options, self.limits)
            except ValueError as error:
                outbox.send({"type": "error", "message": f"Not understood: {error}."})
                continue
            if isinstance(message, Start | Say):
                outbox.send(self._learnt(message))
            self.engine.say(name, message)

    def _learnt(self, message: Start | Say) -> Json:
        """Whether the text encoders have seen such a prompt."""
        models = [offer.model.parts for offer in self.offers.values()]
        strange = [parts for parts in models if not parts.learnt(message.prompt)]
        examples = strange[0].examples if strange else ()
        return {"type": "prompt", "learnt": not strange, "examples": examples}

    async def video(self, request: Request) -> Response:
        """The recording of a video, or its record; its name, which nobody can guess, is the key."""
        name, kind = request.path_params["name"], request.path_params["kind"]
        record = self.engine.records.get(name)
        if not self.allowed(request) or record is None or kind not in ("mp4", "json"):
            return PlainTextResponse("There is no such video.", 404)
        headers = {"Content-Disposition": f'attachment; filename="salt.{kind}"'}
        if kind == "json":
            return JSONResponse(record, headers=headers)
        file = self.recorder.file(name)
        data = await asyncio.to_thread(file.read_bytes) if file.exists() else b""
        return Response(whole_fragments(data), media_type="video/mp4", headers=headers)

    async def health(self, request: Request) -> Response:
        well = self.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if well else "failed"}, 200 if well else 503)

    async def counted(self, request: Request) -> Response:
        if not self.allowed(request):
            return PlainTextResponse("The token is wrong.", 403)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


Image.preinit()  # reads the formats, which the first frame would wait for


def make_app(offers: Mapping[str, Offer], limits: Limits, access: Access) -> Starlette:
    """An ASGI application; its generator runs while it does."""
    folder = tempfile.TemporaryDirectory(prefix="salt_serve_")
    server = Server(offers, limits, access, Path(folder.name))

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await server.stop()
        await asyncio.to_thread(server.recorder.stop)
        folder.cleanup()

    app = Starlette(
        routes=[
            WebSocketRoute("/watch", server.watch),
            Route("/video/{name}.{kind}", server.video),
            Route("/healthz", server.health),
            Route("/metrics", server.counted),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts))],
        lifespan=running,
    )
    app.state.server = server
    return app


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
