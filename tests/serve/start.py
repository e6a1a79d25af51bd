"""From the command to the first frame of launch.serve, in turns: with no programs compiled before,
and with those of an earlier start.

    JAX_PLATFORMS=cpu python -m tests.serve.start [ROUNDS] [CHECKOUT ...]

Another checkout of this repository takes its turns beside this one.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import websockets

SIDE = {"model": "shapes_causal", "steps": 4, "memory": "cyclic", "seed": 0}
START = {"type": "start", "prompt": "A red circle moves left.", "sides": [SIDE]}


async def first_frame(address: str) -> None:
    async with websockets.connect(address.replace("http", "ws", 1) + "watch") as socket:
        await socket.send(json.dumps(START))
        while not isinstance(await socket.recv(), bytes):
            pass


def start(checkout: Path, cache: str) -> tuple[float, float]:
    """Seconds until the address is told, and until the first frame is there."""
    begun = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "launch.serve", "--port=0"],
        cwd=checkout,
        env=os.environ | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout
    address = server.stdout.readline().strip()
    told = time.perf_counter() - begun
    asyncio.run(first_frame(address))
    shown = time.perf_counter() - begun
    server.send_signal(signal.SIGINT)
    server.wait(60)
    return told, shown


def main(rounds: str = "3", *others: str) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    checkouts = [Path(path).resolve() for path in (".", *others)]
    with tempfile.TemporaryDirectory() as kept:
        for checkout in checkouts:
            start(checkout, f"{kept}/{checkout.name}")
        for i in range(int(rounds)):
            for checkout in checkouts:
                warm = start(checkout, f"{kept}/{checkout.name}")
                found.setdefault(f"{checkout}, programs kept", []).append(warm)
                cold = start(checkout, f"{kept}/{i}/{checkout.name}")
                found.setdefault(f"{checkout}, none", []).append(cold)
    for name, times in found.items():
        told, shown = np.median(times, axis=0)
        each = ", ".join(f"{seconds:.1f}" for _, seconds in times)
        print(f"{name}: address after {told:.1f} s, first frame after {shown:.1f} s ({each})")


if __name__ == "__main__":
    main(*sys.argv[1:])
