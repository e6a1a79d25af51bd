"""A request of launch.sample carried out: which files are missing, the videos, and the record of
each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import jax
import numpy as np
from tqdm import tqdm

import salt_jax
from salt_jax import hosts, samples
from salt_jax.cli import sample_flags as f
from salt_jax.cli.request import Job, Request
from salt_jax.io.files import write_whole
from salt_jax.io.model_folder import Source
from salt_jax.io.video import (
    contact_sheet,
    encode_gif,
    encode_mp4,
    encode_png,
    visible_scale,
)
from salt_jax.models.latent_size import SPACE, pixel_frames
from salt_jax.pipeline.model import Model
from salt_jax.pipeline.parts import Given, Video, decoded
from salt_jax.pipeline.shapes import shapes_model
from salt_jax.pipeline.wan import WanOptions, WanSource, wan_parts
from salt_jax.rollout.settings import Switch
from salt_jax.samples import Sample
from salt_jax.workdir import open_workdir

SUFFIXES = {"shapes": ("mp4", "gif"), "wan": ("mp4",)}  # of the files that a clip becomes


class Wanted(NamedTuple):
    """A job and the files it comes to, by suffix."""

    job: Job
    files: dict[str, Sample]


def make(request: Request) -> None:
    """Makes what is not there yet, and prints how much that was. Processes share it.

    Raises:
      UserError: what is asked for cannot be made, or would replace another's work.
    """
    with hosts.agreed("reading the weights"):
        model = open_model(request)
        videos = [Wanted(job, files_of(request, model, job)) for job in request.jobs]
        sheets = {} if request.world == "wan" else sheets_of(request, videos)
    there, older = (
        set(names)
        for names in hosts.only_first(lambda: look_up(request, videos, sheets), "looking for files")
    )

    def missing(sample: Sample) -> bool:
        return str(sample.file) not in there

    # A contact sheet shows all clips of a number of steps, so these are made together.
    todo = [video for video in videos if any(map(missing, video.files.values()))]
    made, mine, pages = len(todo), hosts.share(todo), []
    if sheets:
        pages = {k for k, sheet in sheets.items() if missing(sheet)}
        pages = hosts.share(sorted(pages | {video.job.num_steps for video in todo}))
        mine = [video for video in videos if video.job.num_steps in pages]
    index, clips = samples.index_of(request.index, jax.process_index()), {k: [] for k in pages}
    with hosts.agreed("the videos", hosts.LONG):
        for video, clip in make_clips(request, model, mine):
            for suffix, content in encoded(request, model, clip).items():
                if missing(video.files[suffix]):
                    samples.put(index, video.files[suffix], content)
            if pages:
                clips[video.job.num_steps].append(clip)
        for k in pages:
            prompts = [video.job.prompt for video in mine if video.job.num_steps == k]
            page = contact_sheet(np.stack(clips[k]), prompts, visible_scale(request.shape[1], 64))
            samples.put(index, sheets[k], encode_png(page))
    replaced = sum(any(str(s.file) in older for s in video.files.values()) for video in videos)
    hosts.only_first(lambda: finish(request, made, replaced), "the record of the videos")


def look_up(
    request: Request, videos: Sequence[Wanted], sheets: dict[int, Sample]
) -> list[list[str]]:
    """Files that are there as wanted, and those that would be replaced; notes the seeds that VBench
    asks for. Raises UserError as `samples.look_up`.
    """
    samples.gather(request.index)
    wanted = [sample for video in videos for sample in video.files.values()]
    found = samples.look_up(request.index, wanted + list(sheets.values()))
    if f.VBENCH.value:
        seeds = {job.name: job.seed for job in request.jobs}
        file = request.out.with_name(f"{request.out.name}.seeds.json")
        write_whole(file, json.dumps(seeds, indent=1))
    return [[str(file) for file in files] for files in found]


def finish(request: Request, made: int, replaced: int) -> None:
    """Puts the records of all processes together, and prints what was made."""
    samples.gather(request.index)
    report, left = f"{made} videos made in {request.out}", len(request.jobs) - made
    if replaced:
        report += f", {replaced} of them in place of others that were made with other settings"
    print(report + (f"; {left} were there already" if left else ""))


def files_of(request: Request, model: Model, job: Job) -> dict[str, Sample]:
    """The files of a job by suffix, each with all that decides its pixels."""
    frames, rows, columns, _ = request.shape
    shown = (pixel_frames(frames), SPACE * rows, SPACE * columns)
    frames, rows, columns = shown if request.world == "wan" else (frames, rows, columns)
    sampler = request.sampler._replace(num_steps=job.num_steps)
    levels = None if sampler.stepwise else sampler.grid().tolist()
    first = sampler.grid(first=True).tolist() if sampler.first_steps else None
    guided = request.guidance != 1
    made_with = {
        "prompt": job.prompt,
        "negative_prompt": model.parts.negative if guided else None,
        "guidance": request.guidance,
        "seed": job.seed,
        "clip": job.number,
        "num_steps": job.num_steps,
        "levels": levels,
        "first_levels": first,
        "shift": sampler.shift if levels is None else None,
        "solver": sampler.solver,
        "size": f"{columns}x{rows}",
        "frames": frames,
        "memory": sampler.memory and dataclasses.asdict(sampler.memory),
        "switches": {str(frame): switch._asdict() for frame, switch in request.switches.items()},
        "image": None if request.picture is None else fingerprint(request.picture),
        "image_fit": f.PICTURE_FIT.value if request.config.image_dim else None,
        "prefix": None if request.prefix is None else fingerprint(request.prefix),
        **model.parts.made_with,
        "versions": {"salt_jax": salt_jax.__version__, "jax": jax.__version__},
    }
    stem = job.name.removesuffix(".mp4")
    return {
        s: Sample(request.out / f"{stem}.{s}", model.parts.source, made_with)
        for s in SUFFIXES[request.world]
    }


def fingerprint(pixels: np.ndarray) -> str:
    """SHA-256 of a picture's or a clip's shape and pixels."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def sheets_of(request: Request, videos: Sequence[Wanted]) -> dict[int, Sample]:
    """The contact sheet of each number of steps; it shows these clips and no others."""
    sheets = {}
    for k in dict.fromkeys(video.job.num_steps for video in videos):
        shown = [video.files["mp4"] for video in videos if video.job.num_steps == k]
        digests = [
            hashlib.sha256(json.dumps(sample.made_with).encode()).hexdigest() for sample in shown
        ]
        sheets[k] = Sample(request.out / f"{k}_sheet.png", shown[0].source, {"clips": digests})
    return sheets


def make_clips(
    request: Request, model: Model, todo: Sequence[Wanted]
) -> Iterator[tuple[Wanted, np.ndarray]]:
    """The clips, uint8 [T, H, W, 3], one by one. Nothing is read where there is none to make."""
    if not todo:
        return
    later = request.switches
    prompts = [video.job.prompt for video in todo] + [s.prompt for s in later.values()]
    texts = model.read_texts(prompts)
    first, given = request.picture, Given()
    first = request.prefix if first is None else first
    if first is not None:
        given = model.parts.read_given(first, request.shape, request.policy is not None)
    stepwise = request.sampler.stepwise
    total = sum(video.job.num_steps if stepwise else 1 for video in todo)
    with tqdm(total=total, desc="steps" if stepwise else "videos") as bar:
        for video in todo:
            job, sampler = video.job, request.sampler._replace(num_steps=video.job.num_steps)
            switches = {0: Switch(job.prompt)} | later
            spec = Video(switches, sampler, request.shape, job.seed, job.number, given)
            frames = decoded(model.parts, model.latents(spec, texts, bar.update))
            yield video, np.concatenate(list(frames))
            bar.update(not stepwise)


def open_model(request: Request) -> Model:
    """What makes the videos of a request; the headers of all files that will be read have been
    looked at.

    Raises:
      UserError: something that will be read is absent, damaged, or of another network.
    """
    workdir = f.WORKDIR.value or ""
    run = open_workdir(workdir, f.STEP.value, f.AVERAGE.value) if workdir else None
    if run and request.world == "shapes":
        return shapes_model(run, workdir, request.negative, request.guidance)
    folder = f.WEIGHTS.value or (request.recipe.weights if request.recipe else "")
    student = f.STUDENT.value or ""
    name = workdir or student or folder or f"{f.MODEL.value}, small and random"
    source = WanSource(name, Source(folder), request.config, student, run)
    fit = cast(Literal["squash", "crop"], f.PICTURE_FIT.value)
    tiny, given = f.TINY_DECODER.value or "", (request.picture, request.prefix)
    decodes = not tiny or any(pixels is not None for pixels in given)  # these need the encoder
    options = WanOptions(f.DTYPE.value, f.TILE.value, fit, request.negative, decodes, tiny)
    frames = request.shape[0]
    chunk = request.policy.chunk if request.policy else frames
    parts = wan_parts(source, (frames, chunk), options)
    return Model(parts, request.sampler, request.shape, request.guidance)


def encoded(request: Request, model: Model, clip: np.ndarray) -> dict[str, bytes]:
    """A clip as files, by suffix; small pictures are enlarged."""
    scale = 1 if request.world == "wan" else visible_scale(clip.shape[1], 192)
    encoders = {"mp4": encode_mp4, "gif": encode_gif}
    return {s: encoders[s](clip, model.fps, scale) for s in SUFFIXES[request.world]}
