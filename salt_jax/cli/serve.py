"""python -m launch.serve [--model=PATH_OR_NAME] [--port=8000]

A page that shows a video while it is made: type a prompt, change it while it runs, compare two
students or two settings on the same noise, go back to any moment, download what was shown. Without
a model it is the small student that comes with the package, which a CPU makes in real time. Other
machines reach it with --host=0.0.0.0, and then only with the token in the address it prints. Ctrl-C
ends it.
"""

import os
import secrets
import socket
from contextlib import suppress

from salt_jax.cli import serve_flags as f
from salt_jax.cli.app import run_main
from salt_jax.errors import UserError
from salt_jax.serve.messages import Limits


def limits() -> Limits:
    return Limits(
        viewers=f.VIEWERS.value,
        slots=f.SLOTS.value,
        turn=f.TURN.value,
        seconds=f.LONGEST.value,
        characters=500,
        messages=10.0,
        ahead=2,
        queue=8,
        kept=f.KEPT.value << 20,
        away=60.0,
    )


def bind(host: str, port: int) -> socket.socket:
    """Raises UserError where others listen there, or this machine has no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen at --host={host} --port={port} ({error.strerror or error}); give "
            "another, or --port=0 for any that is free"
        ) from error


def main(_):
    # jax comes here
    import jax
    import uvicorn

    import salt_jax
    from salt_jax.io.stored_jit import store_programs
    from salt_jax.serve.app import Access, is_loopback, make_app
    from salt_jax.serve.offers import make_offer

    if len(set(f.MODEL.value)) < len(f.MODEL.value):
        raise UserError("--model names the same twice; each is offered on both sides anyway")
    store_programs()
    offers = {}
    for name in f.MODEL.value:
        model = salt_jax.load(
            name,
            folder=f.PARTS.value,
            released=f.RECIPE.value,
            tiny_decoder=f.TINY_DECODER.value,
            keeps_text=True,
        )
        offers[name] = make_offer(model)
        model.embed([])  # before the network's parameters come
        jax.block_until_ready(model.params)
    local = is_loopback(f.HOST.value)
    token = f.TOKEN.value or ("" if local else secrets.token_urlsafe(16))
    hosts = ("localhost", "127.0.0.1", "[::1]", f.HOST.value, *f.NAMES.value) if local else ("*",)
    app = make_app(offers, limits(), Access(hosts, token))

    class Server(uvicorn.Server):
        """Tells viewers of the end before their connections are closed."""

        async def shutdown(self, sockets=None):
            await app.state.server.stop()
            await super().shutdown(sockets)

    here = bind(f.HOST.value, f.PORT.value)
    shown = f.HOST.value if local else "THIS-MACHINE"
    shown = f"[{shown}]" if ":" in shown else shown
    port = here.getsockname()[1]
    print(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""), flush=True)
    config = uvicorn.Config(
        app, log_level="warning", ws_max_size=1 << 16, timeout_graceful_shutdown=5
    )
    with suppress(KeyboardInterrupt):
        Server(config).run([here])
    if app.state.server.engine.programs.busy:  # for minutes, and Python would wait for it
        os._exit(0)


def run() -> None:
    """The program."""
    run_main(main, __doc__)
