"""A request of launch.sample carried out: which files are missing, the videos, and the record of
each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import salt_jax
from launch import sample_flags as f
from launch.request import Job, Request
from launch.worlds import World, open_world
from salt_jax import samples
from salt_jax.io.video import contact_sheet, encode_png, visible_scale, write_bytes
from salt_jax.models.denoiser import guided_network
from salt_jax.models.latent_size import SPACE, pixel_frames
from salt_jax.sample import Cue, Sampler, multistep_clip, numbered_keys, sample_clips, stream_chunks
from salt_jax.samples import Sample
from salt_jax.types import ImageText


class Video(NamedTuple):
    """A job and the files it comes to, by suffix."""

    job: Job
    files: dict[str, Sample]


def make(request: Request) -> str:
    """Makes what is not there yet; says how much that was.

    Raises:
      UserError: what is asked for cannot be made, or would replace another's work.
    """
    world = open_world(request)
    videos = [Video(job, files_of(request, world, job)) for job in request.jobs]
    sheets = {} if request.world == "wan" else sheets_of(request, videos)
    wanted = [sample for video in videos for sample in video.files.values()]
    found = samples.look_up(request.index, wanted + list(sheets.values()))
    missing = lambda video: any(sample.file not in found.there for sample in video.files.values())
    # A contact sheet shows all clips of a number of steps, so these are made together.
    pages = {k for k, sheet in sheets.items() if sheet.file not in found.there}
    pages |= {video.job.num_steps for video in videos if sheets and missing(video)}
    todo = [video for video in videos if video.job.num_steps in pages or missing(video)]
    if f.VBENCH.value:
        seeds = {job.name: job.seed for job in request.jobs}
        file = request.out.with_name(f"{request.out.name}.seeds.json")
        write_bytes(file, json.dumps(seeds, indent=1).encode())
    made, clips = 0, {k: [] for k in pages}
    for video, clip in make_clips(request, world, todo):
        made += missing(video)
        for suffix, content in world.encode(clip).items():
            if video.files[suffix].file not in found.there:
                samples.put(request.index, video.files[suffix], content)
        if pages:
            clips[video.job.num_steps].append(clip)
    for k in pages:
        prompts = [video.job.prompt for video in todo if video.job.num_steps == k]
        page = contact_sheet(np.stack(clips[k]), prompts, visible_scale(request.shape[1], 64))
        samples.put(request.index, sheets[k], encode_png(page))
    replaced = sum(any(s.file in found.older for s in video.files.values()) for video in videos)
    told = f"{made} videos made in {request.out}"
    told += (
        f", {replaced} of them in place of others that were made with other settings"
        if replaced
        else ""
    )
    return told + (f"; {len(videos) - made} were there already" if made < len(videos) else "")


def files_of(request: Request, world: World, job: Job) -> dict[str, Sample]:
    """The files of a job by suffix, each with all that decides its pixels."""
    frames, rows, columns, _ = request.shape
    shown = (pixel_frames(frames), SPACE * rows, SPACE * columns)
    frames, rows, columns = shown if request.world == "wan" else (frames, rows, columns)
    levels = request.levels.get(job.num_steps)
    guided = request.guidance != 1
    made_with = {
        "prompt": job.prompt,
        "negative_prompt": world.negative if guided else None,
        "guidance": request.guidance,
        "seed": job.seed,
        "clip": job.number,
        "num_steps": job.num_steps,
        "levels": None if levels is None else levels.tolist(),
        "first_levels": None if request.first_levels is None else request.first_levels.tolist(),
        "shift": request.shift if levels is None else None,
        "solver": request.solver,
        "size": f"{columns}x{rows}",
        "frames": frames,
        "memory": request.memory and dataclasses.asdict(request.memory),
        "switches": {str(frame): switch._asdict() for frame, switch in request.switches.items()},
        "image": None if request.picture is None else fingerprint(request.picture),
        "image_fit": f.PICTURE_FIT.value if request.config.image_dim else None,
        "prefix": None if request.prefix is None else fingerprint(request.prefix),
        **world.made_with,
        "versions": {"salt_jax": salt_jax.__version__, "jax": jax.__version__},
    }
    stem = job.name.removesuffix(".mp4")
    return {s: Sample(request.out / f"{stem}.{s}", world.source, made_with) for s in world.suffixes}


def fingerprint(pixels: np.ndarray) -> str:
    """SHA-256 of a picture's or a clip's shape and pixels."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def sheets_of(request: Request, videos: Sequence[Video]) -> dict[int, Sample]:
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
    request: Request, world: World, todo: Sequence[Video]
) -> Iterator[tuple[Video, np.ndarray]]:
    """The clips, uint8 [T, H, W, 3], one by one. Nothing is read where there is none to make."""
    if not todo:
        return
    prompts = [video.job.prompt for video in todo] + [s.prompt for s in request.switches.values()]
    texts = world.read_texts(list(dict.fromkeys([*prompts, world.negative])))
    image, given = world.read_given()
    teacher = request.mode == f.TEACHER
    chunks_of = maker(request, world, texts, given)
    total = sum(video.job.num_steps if teacher else 1 for video in todo)
    with tqdm(total=total, desc="steps" if teacher else "videos") as bar:
        for video in todo:
            text = jnp.asarray(texts[video.job.prompt])
            told = ImageText(text, *image) if image else text
            yield video, world.decode(chunks_of(video.job, told, bar.update))
            bar.update(not teacher)


def maker(
    request: Request, world: World, texts: dict[str, np.ndarray], given: np.ndarray | None
) -> Callable[[Job, Any, Callable[[], Any]], Iterator[np.ndarray]]:
    """(job, what the network is told, progress of a teacher) -> latents chunk by chunk,
    [1, f, H, W, C].
    """
    network = guided_network(world.network, jnp.asarray(texts[world.negative]), request.guidance)
    params, shape = world.params(), request.shape
    later = {at: Cue(texts[s.prompt], s.flush, s.cut) for at, s in request.switches.items()}

    def chunks(job: Job, told: Any, report: Callable[[], Any]) -> Iterator[np.ndarray]:
        keys = numbered_keys(job.seed, np.array([job.number]))
        if request.mode == f.TEACHER:
            how = (job.num_steps, request.shift, request.solver, shape, report)
            yield multistep_clip(network.denoise, params, told, keys, *how)
            return
        sampler = Sampler(
            request.levels[job.num_steps], request.solver, request.memory, request.first_levels
        )
        if request.memory:
            cues = {0: Cue(np.asarray(told))} | later
            yield from stream_chunks(network, params, cues, keys, sampler, shape, given)
        else:
            yield from sample_clips(network.denoise, params, told, keys, sampler, shape, 1)

    return chunks
