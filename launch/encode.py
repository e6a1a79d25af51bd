"""python -m launch.encode --weights=DIR --videos=DIR [--captions=FILE] --dst=DIR [--image]
python -m launch.encode --weights=DIR --prompts=FILE --dst=DIR [--teacher]

Encodes a folder of videos with captions, or a list of prompts, for config.data.kind=latents; with --teacher the model
of --weights makes a clip of each prompt. What is no use is listed in DIR/rejected.jsonl. Started again, it goes on.
It works on one device: for several start as many, with --process_index=0, 1, ... and --process_count.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from launch.cli import refuse_flags, run_main
from launch.common import all_devices
from launch.parsing import read_size, refuse_frames
from salt_jax.choices import TeacherSolver
from salt_jax.data.clips import READER, read_clip
from salt_jax.data.latents import Report, in_groups, write_records
from salt_jax.data.text_lists import read_prompts
from salt_jax.data.video_folder import Video, find_videos
from salt_jax.errors import UserError
from salt_jax.models import pretrained
from salt_jax.models.denoiser import guided, wan_network
from salt_jax.models.image_condition import squash_for_clip
from salt_jax.models.image_encoder import encode_image
from salt_jax.models.latent_size import FPS, SPACE, TIME
from salt_jax.models.presets import PRESETS, Compute
from salt_jax.models.pretrained import IMAGE, TEXT, VAE, WAN, Part, Source
from salt_jax.models.prompts import negative_prompt
from salt_jax.models.text_encoder import encode_prompts
from salt_jax.models.tokenizer import PAD
from salt_jax.models.vae import encode_video
from salt_jax.models.weights import digest
from salt_jax.sample import multistep_clip, numbered_keys
from salt_jax.train.sharding import state_shardings

TINY = PRESETS["wan2.1-t2v-tiny"]  # with --preset_size=tiny
LISTED = 20  # rejected files that are printed; all are in rejected.jsonl

WEIGHTS = flags.DEFINE_string("weights", "", "a folder of launch.convert_wan")
PRESET_SIZE = flags.DEFINE_enum(
    "preset_size", "full", ["full", "tiny"], "tiny: small random weights, no --weights"
)
VIDEOS = flags.DEFINE_string("videos", None, "a folder of videos")
CAPTIONS = flags.DEFINE_string(
    "captions", None, "a table with columns file and caption; default: a.txt is the caption of a.mp4"
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "prompts, one a line, or a .csv, .tsv, .jsonl or .json with a column of them"
)
TEACHER = flags.DEFINE_bool("teacher", False, "make a clip of each prompt")
PICTURE = flags.DEFINE_bool("image", False, "for image-to-video: encode the first frame too")
DST = flags.DEFINE_string("dst", None, "the data set; the directory is made", required=True)
SIZE = flags.DEFINE_string("size", "832x480", "WIDTHxHEIGHT of the clips, pixels")
FRAMES = flags.DEFINE_integer(
    "frames", 81, "of a clip, 4k + 1, at 16 a second; videos with fewer are left out", lower_bound=1
)
BATCH = flags.DEFINE_integer("batch", None, "encoded together; default 1 clip or 16 prompts", lower_bound=1)
PER_PART = flags.DEFINE_integer("per_part", 64, "sources in a file; what a stop costs at most", lower_bound=1)
NEGATIVE = flags.DEFINE_string("negative_prompt", None, "what guidance leads away from; default Wan's own")
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "of all but the VAE, which is float32 as in Wan's code"
)
UPDATES = flags.DEFINE_integer("updates", 50, "of the teacher", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", 5.0, "of the teacher, w of u + w (c - u)")
SHIFT = flags.DEFINE_float("shift", 5.0, "of the teacher's noise levels", lower_bound=0.0)
SOLVER = flags.DEFINE_enum("solver", "unipc", get_args(TeacherSolver), "of the teacher")
SEED = flags.DEFINE_integer("seed", 0, "of the teacher's noise")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "which one this is of several; default JAX's")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "how many share the work; default JAX's")

MODES = {
    "videos": "videos (--videos)",
    "prompts": "prompts alone (--prompts)",
    "teacher": "clips of a teacher (--teacher)",
}
BELONGS = {
    **dict.fromkeys(("videos", "captions", "image"), ("videos",)),
    "prompts": ("prompts", "teacher"),
    **dict.fromkeys(("size", "frames"), ("videos", "teacher")),
    **dict.fromkeys(("teacher", "updates", "guidance", "shift", "solver", "seed"), ("teacher",)),
}


class Loaded(NamedTuple):
    """A source as it goes to the networks."""

    number: int
    caption: str
    tokens: np.ndarray  # int32 [L], padded
    clip: Any  # uint8 [T, H, W, 3], or None


Encode = Callable[[Sequence[Loaded]], list[dict[str, Any]]]


def main(_):
    tiny = PRESET_SIZE.value == "tiny"
    index = jax.process_index() if PROCESS_INDEX.value is None else PROCESS_INDEX.value
    count = jax.process_count() if PROCESS_COUNT.value is None else PROCESS_COUNT.value
    for wrong, message in (
        (
            tiny == bool(WEIGHTS.value),
            "name the weights: --weights=DIR of launch.convert_wan, or --preset_size=tiny",
        ),
        (bool(VIDEOS.value) == bool(PROMPTS.value), "give either --videos=DIR or --prompts=FILE"),
        (TEACHER.value and not PROMPTS.value, "--teacher makes clips of prompts; give --prompts=FILE"),
        (not 0 <= index < count, f"--process_index={index} must be below --process_count={count}"),
        (not math.isfinite(GUIDANCE.value), f"--guidance={GUIDANCE.value} must be a number, such as 5"),
        (not 0 < SHIFT.value < math.inf, f"--shift={SHIFT.value} must be more than 0, such as 5"),
    ):
        if wrong:
            raise UserError(message)
    refuse_flags("teacher" if TEACHER.value else "videos" if VIDEOS.value else "prompts", MODES, BELONGS)
    refuse_frames(FRAMES.value)
    width, height, source = *read_size(SIZE.value), Source(WEIGHTS.value)
    if VIDEOS.value:
        videos = find_videos(VIDEOS.value, CAPTIONS.value)
    else:
        videos = [Video(p.name, Path(), p.text, p.problem) for p in read_prompts(PROMPTS.value or "")]
    negative = negative_prompt(NEGATIVE.value, PICTURE.value)
    tokenize, embed = text_reader(source)
    (null_text,) = embed([tokenize(negative, TINY.text_length)])
    batch = BATCH.value or (1 if VIDEOS.value or TEACHER.value else 16)
    latent = (1 + FRAMES.value // TIME, height // SPACE, width // SPACE, TINY.out_channels)
    shapes: dict[str, tuple[int | None, ...]] = {"text": (None, null_text.shape[1])}
    parts = [TEXT]
    encode = partial(encode_texts, embed)
    if TEACHER.value:
        shapes["latent"], parts = latent, [TEXT, WAN]
        encode = teacher_encoder(source, embed, null_text, latent)
    elif VIDEOS.value:
        encode, more = clip_encoder(source, embed, latent)
        shapes, parts = shapes | more, [TEXT, VAE] + ([IMAGE] if PICTURE.value else [])
    read_file = partial(read_whole, height, width) if VIDEOS.value else lambda file: None
    load = partial(load_source, videos, tokenize, read_file)
    report = write_records(
        DST.value,
        settings(source, parts, videos, negative),
        shapes,
        null_text,
        [video.name for video in videos],
        PER_PART.value,
        lambda numbers: in_groups(numbers, load, encode, batch),
        index,
        count,
    )
    print_report(report, len(videos))


def settings(source: Source, parts: Sequence[Part], videos: Sequence[Video], negative: str) -> dict[str, Any]:
    """Everything the records depend on."""
    size = lambda file: os.path.getsize(file) if os.path.isfile(file) else 0
    listed = [(v.name, v.caption, size(v.file)) for v in videos]
    told: dict[str, Any] = {
        "kind": "teacher" if TEACHER.value else "videos" if VIDEOS.value else "prompts",
        "sources_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "negative_prompt": negative,
        "dtype": DTYPE.value,
    }
    for part in tqdm(parts, desc="checksums of the weights", unit="file", delay=1):
        told[part.file] = "random" if not source.folder else digest(pretrained.part_file(part, source.folder))
    if VIDEOS.value:
        told |= {"reader": READER}
    if VIDEOS.value or TEACHER.value:
        told |= {"size": SIZE.value, "frames": FRAMES.value, "fps": FPS}
    if TEACHER.value:
        of_teacher = (UPDATES, GUIDANCE, SHIFT, SOLVER, SEED)
        told |= {flag.name: flag.value for flag in of_teacher}
    return told


def load_source(
    videos: Sequence[Video], tokenize, read_file: Callable[[Path], Any], number: int
) -> Loaded | str:
    """A source's tokens and pixels, or why it cannot be used."""
    video = videos[number]
    if video.problem:
        return video.problem
    try:
        video.caption.encode()  # half a pair of surrogates cannot be stored
        return Loaded(number, video.caption, tokenize(video.caption, TINY.text_length), read_file(video.file))
    except Exception as error:  # whatever a file does to a decoder must not stop the others
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def read_whole(height: int, width: int, file: Path) -> np.ndarray:
    """The clip in a file. Raises ValueError where it is too short, or for another reason not to use it."""
    clip = read_clip(file, FRAMES.value, height, width, FPS)
    if len(clip) < FRAMES.value:
        raise ValueError(f"it gives {len(clip)} frames at {FPS} a second, --frames={FRAMES.value} are wanted")
    return clip


def text_reader(
    source: Source,
) -> tuple[Callable[[str, int], np.ndarray], Callable[[Sequence[np.ndarray]], list]]:
    """(text, length) -> tokens, and rows of tokens -> their embeddings [n, D] without padding.

    Beside a teacher the text encoder is in memory only while it reads.
    """
    held = None if TEACHER.value else pretrained.open_part(TEXT, source)

    def embed(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        config, params = held or pretrained.open_part(TEXT, source)
        rows = encode_prompts(params, np.stack(tokens), config, dtype=jnp.dtype(DTYPE.value))
        rows = np.asarray(rows, np.float32)
        return [row[: np.count_nonzero(t != PAD)] for row, t in zip(rows, tokens, strict=True)]

    return pretrained.open_tokenizer(source), embed


def encode_texts(
    embed: Callable[[Sequence[np.ndarray]], list], group: Sequence[Loaded]
) -> list[dict[str, Any]]:
    texts = embed([item.tokens for item in group])
    return [{"caption": item.caption, "text": text} for item, text in zip(group, texts, strict=True)]


def clip_encoder(source: Source, embed, latent: tuple[int, ...]) -> tuple[Encode, dict[str, tuple[int, ...]]]:
    """Clips and captions -> records; and the shapes of what they hold besides text."""
    sizes, vae = pretrained.open_part(VAE, source)
    to_latents = jax.jit(lambda params, video: encode_video(params, video, sizes, jnp.float32))
    shapes = {"latent": latent}
    eye_sizes: Any = None
    eye: Any = None
    if PICTURE.value:
        eye_sizes, eye = pretrained.open_part(IMAGE, source)
        shapes |= {"condition": latent, "image": (eye_sizes.num_tokens, eye_sizes.dim)}
        see = jax.jit(lambda params, pixels: encode_image(params, pixels, eye_sizes, jnp.dtype(DTYPE.value)))

    def encode(group: Sequence[Loaded]) -> list[dict[str, Any]]:
        pixels = np.stack([item.clip for item in group])
        video = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        arrays = {"latent": to_latents(vae, video)}
        if PICTURE.value:
            # What the model is told of its first frame: the frame, then mid-grey. CLIP sees it in the clip's size.
            arrays["condition"] = to_latents(vae, video.at[:, 1:].set(0))
            squashed = np.stack([squash_for_clip(clip[0], eye_sizes.image_size) for clip in pixels])
            arrays["image"] = see(eye, jnp.asarray(squashed))
        host = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        records = encode_texts(embed, group)
        return [record | {name: a[i] for name, a in host.items()} for i, record in enumerate(records)]

    return encode, shapes


def teacher_encoder(source: Source, embed, null_text: np.ndarray, latent: tuple[int, ...]) -> Encode:
    """Prompts -> records with clips of the guided teacher. Noise is a function of the seed and the prompt's number.

    Raises:
      UserError: the weights are of an image-to-video model.
    """
    config = pretrained.stored_config(WAN, source.folder) if source.folder else TINY
    if config.image_dim:
        raise UserError(f"--weights={WEIGHTS.value} needs pictures; --teacher makes clips of text alone")
    network = wan_network(config, Compute(jnp.dtype(DTYPE.value)), latent[0], latent[0])
    pad = lambda text: np.pad(text, ((0, config.text_length - len(text)), (0, 0)))
    denoise = guided(network.denoise, jnp.asarray(pad(null_text))[None], GUIDANCE.value)
    params = pretrained.open_part(WAN, source, config, shardings=partial(state_shardings, all_devices()))[1]

    def encode(group: Sequence[Loaded]) -> list[dict[str, Any]]:
        records = encode_texts(embed, group)
        text = jnp.asarray(np.stack([pad(record["text"]) for record in records]))
        keys = numbered_keys(SEED.value, np.array([item.number for item in group]))
        solver: Any = SOLVER.value
        clips = multistep_clip(denoise, params, text, keys, UPDATES.value, SHIFT.value, solver, latent)
        return [record | {"latent": clip} for record, clip in zip(records, clips, strict=True)]

    return encode


def print_report(report: Report, sources: int) -> None:
    """Every source is a record, a line of rejected.jsonl, or in a part that is not there yet."""
    written, rejected = report.written, len(report.rejected)
    left = (
        f" + {sources - written - rejected} in parts that are missing; {report.missing} parts are left to other "
        "processes, or to a next start"
    )
    told = f"{sources} sources = {written} records + {rejected} left out"
    print(f"{DST.value}: {told}{left if report.missing else ''}")
    for name, reason in report.rejected[:LISTED]:
        print(f"  {name}: {reason}".encode(errors="replace").decode())  # names of files may be no text
    if len(report.rejected) > LISTED:
        print(f"  ... and {len(report.rejected) - LISTED} more, in {Path(DST.value) / 'rejected.jsonl'}")


if __name__ == "__main__":
    run_main(main)
