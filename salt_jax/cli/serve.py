"""python -m launch.serve [--model=PATH_OR_NAME] [--port=8000]

A page that shows a video while it is made: type a prompt, change it while it runs, compare two
students or two settings on the same noise, go back to any moment, download what was shown. Without
a model it is the small student that comes with the package, which a CPU makes in real time. Other
machines reach it with --host=0.0.0.0, and then only with the token in the address it prints. Ctrl-C
ends it.
"""

import secrets

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


def main(_):
    # jax comes here
    import uvicorn

    import salt_jax
    from salt_jax.serve.app import Access, is_loopback, make_app
    from salt_jax.serve.offers import make_offer

    if len(set(f.MODEL.value)) < len(f.MODEL.value):
        raise UserError("--model names the same twice; each is offered on both sides anyway")
    offers = {}
    for name in f.MODEL.value:
        model = salt_jax.load(name, folder=f.PARTS.value, released=f.RECIPE.value)
        offers[name] = make_offer(model)
        model.advance(model.begin("", memory=next(iter(offers[name].memories.values()))))
    local = is_loopback(f.HOST.value)
    token = f.TOKEN.value or ("" if local else secrets.token_urlsafe(16))
    hosts = ("localhost", "127.0.0.1", "[::1]", f.HOST.value, *f.NAMES.value) if local else ("*",)
    app = make_app(offers, limits(), Access(hosts, token))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=f.HOST.value,
            port=f.PORT.value,
            log_level="warning",
            ws_max_size=1 << 16,
            timeout_graceful_shutdown=5,
        )
    )
    sockets = [server.config.bind_socket()]
    port = sockets[0].getsockname()[1]
    shown = f.HOST.value if local else "THIS-MACHINE"
    print(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""), flush=True)
    server.run(sockets)


def run() -> None:
    """The program."""
    run_main(main, __doc__)
