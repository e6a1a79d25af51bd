"""Frames per second of the shipped student, counted as launch.sample --stream does.

    JAX_PLATFORMS=cpu python -m tests.serve.speed

Run it twice: the first run compiles.
"""

import os
import tempfile
import time
from pathlib import Path

import jax

import salt_jax
from salt_jax.cli.streaming import Span, report, timed, write_chunks
from salt_jax.io.cache import cache_home
from salt_jax.io.video import written_mp4
from salt_jax.serve.offers import make_offer

PROMPT, FRAMES = "A red circle moves left.", 480


def main() -> None:
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "jax"))
    model = salt_jax.load("shapes_causal")
    memory = make_offer(model).memories["window and sink"]
    for steps in (2, 4, 8):
        spans: list[Span] = []
        start = time.perf_counter()
        with timed(spans, "text"):
            model.embed([PROMPT])
        live = model.begin(PROMPT, memory=memory, num_steps=steps)
        chunks = model.chunks(live, lambda frame: None, FRAMES)
        with (
            tempfile.TemporaryDirectory() as folder,
            written_mp4(Path(folder) / "video.mp4", model.fps, 16, growing=True) as write,
        ):
            for _ in write_chunks(model, chunks, write, spans):
                pass
        print(f"{steps} steps: {report(spans, start, model.fps)[-1]}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
