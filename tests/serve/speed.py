"""Frames per second of the shipped student: of the transformer alone, whose programs are all handed
over before one is waited for; counted as launch.sample --stream does; and of the generator of
launch.serve when no clock holds it back.

    JAX_PLATFORMS=cpu python -m tests.serve.speed

Run it twice: the first run compiles.
"""

import os
import tempfile
import time
from pathlib import Path

import jax

import salt_jax
from salt_jax.cli.streaming import WARM, Span, report, timed, write_chunks
from salt_jax.io.cache import cache_home
from salt_jax.io.stored_jit import store_programs
from salt_jax.io.video import written_mp4
from salt_jax.pipeline.model import Model
from salt_jax.serve.offers import Offer, make_offer
from salt_jax.serve.viewer import Frames
from tests.helpers import RED
from tests.serve.engines import MEMORY, watched

FRAMES, SCALE = 480, 16


def alone(model: Model, offer: Offer, steps: int, folder: Path) -> str:
    live = model.begin(RED, memory=offer.memories[MEMORY], num_steps=steps)
    for _ in range(WARM):
        made, live = model.advance(live)
    jax.block_until_ready(live.session.cache)
    first, start = live.frames, time.perf_counter()
    while live.frames < FRAMES:
        made, live = model.advance(live)
    jax.block_until_ready((made.latents, live.session.cache))
    speed = (live.frames - first) / (time.perf_counter() - start)
    return f"the transformer alone: {speed:.1f} frames per second"


def into_a_file(model: Model, offer: Offer, steps: int, folder: Path) -> str:
    spans: list[Span] = []
    start = time.perf_counter()
    with timed(spans, "text"):
        model.embed([RED])
    live = model.begin(RED, memory=offer.memories[MEMORY], num_steps=steps)
    chunks = model.chunks(live, lambda frame: None, FRAMES)
    with written_mp4(folder / "video.mp4", model.fps, SCALE, growing=True) as write:
        for _ in write_chunks(model, chunks, write, spans):
            pass
    return report(spans, start, model.fps)[-1]


def to_a_viewer(model: Model, offer: Offer, steps: int, folder: Path) -> str:
    with watched(offer, folder, steps=steps, scale=SCALE) as (engine, get):

        def waited() -> dict[str, float]:
            get = engine.metrics.registry.get_sample_value
            parts = ("transformer", "decoder", "writing")
            return {part: get("salt_seconds_sum", {"part": part}) or 0.0 for part in parts}

        chunks, frames, first, begun, before = 0, 0, 0, 0.0, {}
        while frames < FRAMES:
            if isinstance(event := get(), Frames):
                chunks, frames = chunks + 1, event.told["until"]
                if chunks == WARM:
                    begun, before, first = time.perf_counter(), waited(), frames
        steady, after = time.perf_counter() - begun, waited()
    shares = {part: (after[part] - before[part]) / steady for part in after}
    told = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
    return (
        f"the generator of launch.serve: {(frames - first) / steady:.1f} frames per second; waited "
        f"for {told}, did other things {1 - sum(shares.values()):.1%}"
    )


def main() -> None:
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "jax"))
    store_programs()
    model = salt_jax.load("shapes_causal")
    offer = make_offer(model)
    for steps in (2, 4, 8):
        for run in (alone, into_a_file, to_a_viewer):
            with tempfile.TemporaryDirectory() as folder:
                told = run(model, offer, steps, Path(folder))
            print(f"{steps} steps, {os.cpu_count()} cores: {told}")


if __name__ == "__main__":
    main()
