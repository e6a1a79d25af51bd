"""Watches a video of launch.serve without a browser, and keeps its pictures.

python examples/client.py http://127.0.0.1:8000/ "A red circle moves left." FOLDER [SECONDS]
"""

import asyncio
import json
import sys
from pathlib import Path

from websockets.asyncio.client import connect


async def watch(address: str, prompt: str, folder: Path, seconds: float) -> None:
    async with connect(f"ws{address.removeprefix('http').rstrip('/')}/watch") as socket:
        model = json.loads(await socket.recv())["models"][0]
        side = {"model": model["name"], "memory": model["memories"][0], "steps": 4, "seed": 0}
        await socket.send(json.dumps({"type": "start", "prompt": prompt, "sides": [side]}))
        count = 0
        while count < seconds * model["fps"]:
            if isinstance(message := await socket.recv(), str):
                print(message)  # its place in the queue, and the like
                continue
            start = 4 + int.from_bytes(message[:4], "little")
            header = json.loads(message[4:start])
            for size in header["sizes"]:
                file = folder / f"{count:05d}.{header['format']}"
                file.write_bytes(message[start : start + size])
                start, count = start + size, count + 1


if __name__ == "__main__":
    address, prompt, folder, *seconds = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    asyncio.run(watch(address, prompt, Path(folder), float(*seconds or [4])))
