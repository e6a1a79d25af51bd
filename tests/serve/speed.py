"""Frames per second of the shipped student: of the transformer alone, whose programs are all handed
over before one is waited for; counted as launch.sample --stream does; and of the generator of
launch.serve when no clock holds it back.

    JAX_PLATFORMS=cpu python -m tests.serve.speed

Run it twice: the first run compiles.
"""

import os
import queue
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
from salt_jax.serve.engine import Engine
from salt_jax.serve.messages import Limits, Side, Start
from salt_jax.serve.metrics import Metrics
from salt_jax.serve.offers import Offer, make_offer
from salt_jax.serve.recording import Recorder
from salt_jax.serve.viewer import Frames

PROMPT, FRAMES, SCALE, MEMORY = "A red circle moves left.", 480, 16, "cyclic"
LIMITS = Limits(1, 1, 30.0, 1e9, 500, 20.0, 1 << 30, 8, 256 << 20, 60.0)


def alone(model: Model, offer: Offer, steps: int, folder: Path) -> str:
    live = model.begin(PROMPT, memory=offer.memories[MEMORY], num_steps=steps)
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
        model.embed([PROMPT])
    live = model.begin(PROMPT, memory=offer.memories[MEMORY], num_steps=steps)
    chunks = model.chunks(live, lambda frame: None, FRAMES)
    with written_mp4(folder / "video.mp4", model.fps, SCALE, growing=True) as write:
        for _ in write_chunks(model, chunks, write, spans):
            pass
    return report(spans, start, model.fps)[-1]


def to_a_viewer(model: Model, offer: Offer, steps: int, folder: Path) -> str:
    recorder, inbox, metrics = Recorder(folder, model.fps, SCALE), queue.SimpleQueue(), Metrics()
    engine = Engine({"m": offer}, LIMITS, recorder, metrics)

    def waited() -> dict[str, float]:
        parts = ("transformer", "decoder", "writing")
        get = metrics.registry.get_sample_value
        return {part: get("salt_seconds_sum", {"part": part}) or 0.0 for part in parts}

    engine.start()
    engine.programs.of(model, offer.memories[MEMORY]).turns.result()  # nothing is compiled now
    engine.join("viewer", inbox.put)
    engine.say("viewer", Start((Side("m", steps, MEMORY, 0),), PROMPT))
    chunks, frames, begun, before = 0, 0, 0.0, {}
    while frames < FRAMES:
        if isinstance(event := inbox.get(timeout=60), Frames):
            chunks, frames = chunks + 1, event.told["until"]
            if chunks == WARM:
                begun, before, first = time.perf_counter(), waited(), frames
    steady, after = time.perf_counter() - begun, waited()
    engine.stop("the end")
    recorder.stop()
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
