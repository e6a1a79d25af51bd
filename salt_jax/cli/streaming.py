"""launch.sample --stream: one video, written while it is made, and how fast that was."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from salt_jax import hosts, samples
from salt_jax.cli.making import files_of, open_model
from salt_jax.cli.request import Request
from salt_jax.errors import UserError
from salt_jax.io.files import made_on_disk
from salt_jax.io.stored_jit import store_programs
from salt_jax.io.tensor_files import digest
from salt_jax.io.video import visible_scale, written_mp4
from salt_jax.pipeline.live import Made
from salt_jax.pipeline.model import Model
from salt_jax.rollout.settings import Switch

PARTS = ("text", "weights", "transformer", "decoder", "writing")
WARM = 2  # chunks at the start that are not counted: programs are compiled in them
BEHIND = 8  # chunks that may wait to be written before the next is made


class Span(NamedTuple):
    """Seconds that this process has waited for a part."""

    part: str
    start: float
    stop: float
    frames: int = 0  # that were handed over to be written, of "writing"


def stream(request: Request) -> None:
    """Writes the video of a request, unless it is there; of several processes the first does.

    Raises:
      UserError: what is asked for cannot be made, or would replace another's work.
    """
    if len(request.jobs) > 1:
        raise UserError("--stream makes one video; give one number with --num_steps")
    hosts.only_first(lambda: _stream(request), "the video", hosts.LONG)


def _stream(request: Request) -> None:
    spans: list[Span] = []
    start, (job,) = time.perf_counter(), request.jobs
    store_programs()
    model = open_model(request)
    model.sampler = request.sampler._replace(num_steps=job.num_steps)
    sample = files_of(request, model, job)["mp4"]
    samples.gather(request.index)
    if samples.look_up(request.index, [sample]).there:
        print(f"{sample.file} is there already")
        return
    request.out.mkdir(parents=True, exist_ok=True)
    with made_on_disk(sample.file) as file:
        whole = _write(request, model, file, spans)
        made = sum(span.frames for span in spans)
        if not whole:  # so that the same call makes the whole video
            sample = sample._replace(made_with=sample.made_with | {"stopped_at_frame": made})
        samples.note(request.index, sample, digest(file))
    print(f"{sample.file}" + ("" if whole else ", stopped by hand"))
    print("\n".join(report(spans, start, model.fps)))


def _write(request: Request, model: Model, file: Path, spans: list[Span]) -> bool:
    """Whether the video was made to its end; ctrl-C ends it where it is."""
    switches = {0: Switch(request.jobs[0].prompt)} | request.switches
    with timed(spans, "text"):
        model.embed([switch.prompt for switch in switches.values()])
    with timed(spans, "weights"):
        jax.block_until_ready(model.params)
    seed, frames = request.jobs[0].seed, request.shape[0]
    live = model.begin(switches[0].prompt, seed=seed, shape=request.shape)
    chunks, scale = model.chunks(live, switches.get, frames), visible_scale(request.shape[1], 192)
    scale = 1 if request.world == "wan" else scale
    with (
        written_mp4(file, model.fps, scale, growing=True) as write,
        tqdm(total=frames, desc="latent frames") as bar,
    ):
        try:
            with closing(write_chunks(model, chunks, write, spans)) as counts:
                for count in counts:
                    bar.update(count)
        except KeyboardInterrupt:
            return False
    return True


def write_chunks(
    model: Model, chunks: Iterator[Made], write: Callable[[np.ndarray], None], spans: list[Span]
) -> Generator[int, None, None]:
    """Writes the frames of each chunk, in a thread, and yields how many latent ones these were."""
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "writer") as thread:
        while True:
            with timed(spans, "transformer"):
                made = next(chunks, None)
                jax.block_until_ready(made and made.latents)
            if made is None:
                break
            with timed(spans, "decoder"):
                pixels = model.parts.to_bytes(made.decoded)
            with timed(spans, "writing", len(pixels)):
                if len(writing) == BEHIND:
                    writing.popleft().result()
                writing.append(thread.submit(write, pixels))
            yield made.latents.shape[1]
        with timed(spans, "writing"):
            for rest in writing:
                rest.result()


@contextmanager
def timed(spans: list[Span], part: str, frames: int = 0) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spans.append(Span(part, start, time.perf_counter(), frames))


def report(spans: list[Span], start: float, fps: int) -> list[str]:
    """How fast a video was made, in sentences. `start` of the work, `fps` of the video."""
    written = [span for span in spans if span.part == "writing"]
    if not written:
        return ["no frame was made"]
    shown, whole = sum(span.frames for span in written), written[-1].stop - start
    lines = [
        f"{shown} frames, {shown / fps:.1f} s of video, in {whole:.1f} s; the first after "
        f"{written[0].stop - start:.2f} s, reading weights and compiling included"
    ]
    if sum(span.frames > 0 for span in written) <= WARM + 1:
        return [*lines, f"no rates: these want more than {WARM + 1} chunks"]
    warm = written[WARM - 1].stop
    steady, frames = written[-1].stop - warm, sum(span.frames for span in written[WARM:])
    waited = {p: sum(s.stop - s.start for s in spans if s.part == p) for p in PARTS}
    lines.append(
        f"before the first chunk: text {waited['text']:.2f} s, weights {waited['weights']:.2f} s"
    )
    shares = {
        part: sum(s.stop - s.start for s in spans if s.part == part and s.start >= warm) / steady
        for part in ("transformer", "decoder", "writing")
    }
    told = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
    return [
        *lines,
        f"behind chunk {WARM}: {frames / steady:.1f} frames per second; this process waited for "
        f"{told}, and did other things {1 - sum(shares.values()):.1%} of the time",
    ]
