"""What launch.encode does: sources go through tokenizer, text encoder and VAE, and become records
of a data set.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from salt_jax.cli import encode_flags as f
from salt_jax.data.clips import READER, read_clip
from salt_jax.data.latents import Report, in_groups, write_records
from salt_jax.data.video_folder import Video
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.model_folder import IMAGE, TEXT, VAE, WAN, Part, Source
from salt_jax.io.tensor_files import digest
from salt_jax.io.tokenizer import PAD
from salt_jax.models.attention import compute_here
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.models.image_condition import squash_for_clip
from salt_jax.models.image_encoder import encode_image
from salt_jax.models.latent_size import FPS, SPACE, TIME
from salt_jax.models.presets import PRESETS
from salt_jax.models.prompts import negative_prompt
from salt_jax.models.text_encoder import encode_prompts
from salt_jax.models.vae import encode_video
from salt_jax.rollout.sampler import numbered_keys, whole_clips
from salt_jax.rollout.settings import Sampler
from salt_jax.sharding import all_devices, state_shardings
from salt_jax.types import Conditioning

TINY = PRESETS["wan2.1-t2v-tiny"]  # with --preset_size=tiny
LISTED = 20  # rejected files that are printed; all are in rejected.jsonl


class Loaded(NamedTuple):
    """A source as it goes to the networks."""

    number: int
    caption: str
    tokens: np.ndarray  # int32 [L], padded
    clip: Any  # uint8 [T, H, W, 3], or None


Encode = Callable[[Sequence[Loaded]], list[dict[str, Any]]]


def encode_all(wanted: f.Wanted) -> None:
    """Writes this process's share of the records.

    Raises:
      UserError: weights are absent or do not fit, or the data set was begun with other settings.
    """
    index = jax.process_index() if f.PROCESS_INDEX.value is None else f.PROCESS_INDEX.value
    count = jax.process_count() if f.PROCESS_COUNT.value is None else f.PROCESS_COUNT.value
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} must be below --process_count={count}")
    source, videos = Source(f.WEIGHTS.value), wanted.videos
    negative = negative_prompt(f.NEGATIVE.value, f.PICTURE.value)
    tokenize, embed = text_reader(source)
    (null_text,) = embed([tokenize(negative, TINY.text_length)])
    batch = f.BATCH.value or (1 if f.VIDEOS.value or f.TEACHER.value else 16)
    latent = (
        1 + f.FRAMES.value // TIME,
        wanted.height // SPACE,
        wanted.width // SPACE,
        TINY.out_channels,
    )
    shapes: dict[str, tuple[int | None, ...]] = {"text": (None, null_text.shape[1])}
    parts = [TEXT]
    encode = partial(encode_texts, embed)
    if f.TEACHER.value:
        shapes["latent"], parts = latent, [TEXT, WAN]
        encode = teacher_encoder(source, embed, null_text, latent)
    elif f.VIDEOS.value:
        encode, more = clip_encoder(source, embed, latent)
        shapes, parts = shapes | more, [TEXT, VAE] + ([IMAGE] if f.PICTURE.value else [])
    read_file = (
        partial(read_whole, wanted.height, wanted.width) if f.VIDEOS.value else lambda file: None
    )
    load = partial(load_source, videos, tokenize, read_file)
    report = write_records(
        f.DST.value,
        settings(source, parts, videos, negative),
        shapes,
        null_text,
        [video.name for video in videos],
        f.PER_PART.value,
        lambda numbers: in_groups(numbers, load, encode, batch),
        index,
        count,
    )
    print_report(report, len(videos))


def settings(
    source: Source, parts: Sequence[Part], videos: Sequence[Video], negative: str
) -> dict[str, Any]:
    """Everything the records depend on."""
    size = lambda file: os.path.getsize(file) if os.path.isfile(file) else 0
    listed = [(v.name, v.caption, size(v.file)) for v in videos]
    told: dict[str, Any] = {
        "kind": "teacher" if f.TEACHER.value else "videos" if f.VIDEOS.value else "prompts",
        "sources_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "negative_prompt": negative,
        "dtype": f.DTYPE.value,
    }
    for part in tqdm(parts, desc="checksums of the weights", unit="file", delay=1):
        told[part.file] = (
            "random" if not source.folder else digest(model_folder.part_file(part, source.folder))
        )
    if f.VIDEOS.value:
        told |= {"reader": READER}
    if f.VIDEOS.value or f.TEACHER.value:
        told |= {"size": f.SIZE.value, "frames": f.FRAMES.value, "fps": FPS}
    if f.TEACHER.value:
        of_teacher = (f.NUM_STEPS, f.GUIDANCE, f.SHIFT, f.SOLVER, f.SEED)
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
        return Loaded(
            number, video.caption, tokenize(video.caption, TINY.text_length), read_file(video.file)
        )
    except Exception as error:  # whatever a file does to a decoder must not stop the others
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def read_whole(height: int, width: int, file: Path) -> np.ndarray:
    """The clip in a file.

    Raises ValueError where it is too short, or for another reason not to use it.
    """
    clip = read_clip(file, f.FRAMES.value, height, width, FPS)
    if len(clip) < f.FRAMES.value:
        raise ValueError(
            f"it gives {len(clip)} frames at {FPS} a second, --frames={f.FRAMES.value} are wanted"
        )
    return clip


def text_reader(
    source: Source,
) -> tuple[Callable[[str, int], np.ndarray], Callable[[Sequence[np.ndarray]], list]]:
    """(text, length) -> tokens, and rows of tokens -> their embeddings [n, D] without padding.

    Beside a teacher the text encoder is in memory only while it reads.
    """
    held = None if f.TEACHER.value else model_folder.open_part(TEXT, source)

    def embed(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        config, params = held or model_folder.open_part(TEXT, source)
        rows = encode_prompts(params, np.stack(tokens), config, dtype=jnp.dtype(f.DTYPE.value))
        rows = np.asarray(rows, np.float32)
        return [row[: np.count_nonzero(t != PAD)] for row, t in zip(rows, tokens, strict=True)]

    return model_folder.open_tokenizer(source), embed


def encode_texts(
    embed: Callable[[Sequence[np.ndarray]], list], group: Sequence[Loaded]
) -> list[dict[str, Any]]:
    texts = embed([item.tokens for item in group])
    return [
        {"caption": item.caption, "text": text} for item, text in zip(group, texts, strict=True)
    ]


def clip_encoder(
    source: Source, embed, latent: tuple[int, ...]
) -> tuple[Encode, dict[str, tuple[int, ...]]]:
    """Clips and captions -> records; and the shapes of what they hold besides text."""
    sizes, vae = model_folder.open_part(VAE, source)
    to_latents = jax.jit(lambda params, video: encode_video(params, video, sizes, jnp.float32))
    shapes = {"latent": latent}
    eye_sizes: Any = None
    eye: Any = None
    if f.PICTURE.value:
        eye_sizes, eye = model_folder.open_part(IMAGE, source)
        shapes |= {"condition": latent, "image": (eye_sizes.num_tokens, eye_sizes.dim)}
        see = jax.jit(
            lambda params, pixels: encode_image(params, pixels, eye_sizes, jnp.dtype(f.DTYPE.value))
        )

    def encode(group: Sequence[Loaded]) -> list[dict[str, Any]]:
        pixels = np.stack([item.clip for item in group])
        video = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        arrays = {"latent": to_latents(vae, video)}
        if f.PICTURE.value:
            # The condition on the first frame: the frame, then mid-grey. CLIP sees it in
            # the clip's size.
            arrays["condition"] = to_latents(vae, video.at[:, 1:].set(0))
            squashed = np.stack([squash_for_clip(clip[0], eye_sizes.image_size) for clip in pixels])
            arrays["image"] = see(eye, jnp.asarray(squashed))
        host = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        records = encode_texts(embed, group)
        return [
            record | {name: a[i] for name, a in host.items()} for i, record in enumerate(records)
        ]

    return encode, shapes


def teacher_encoder(
    source: Source, embed, null_text: np.ndarray, latent: tuple[int, ...]
) -> Encode:
    """Prompts -> records with clips of the guided teacher. Noise is a function of the seed and the
    prompt's number.

    Raises:
      UserError: the weights are of an image-to-video model.
    """
    config = model_folder.stored_config(WAN, source.folder) if source.folder else TINY
    if config.image_dim:
        raise UserError(
            f"--weights={f.WEIGHTS.value} needs pictures; --teacher makes clips of text alone"
        )
    compute = compute_here(config, jnp.dtype(f.DTYPE.value))
    network = wan_denoiser(config, compute, latent[0], latent[0])
    pad = lambda text: np.pad(text, ((0, config.text_length - len(text)), (0, 0)))
    params = model_folder.open_part(
        WAN, source, config, shardings=partial(state_shardings, all_devices())
    )[1]
    null = jnp.asarray(pad(null_text))[None]
    teacher, params = guided(network, params, null, f.GUIDANCE.value)
    solver: Any = f.SOLVER.value
    sampler = Sampler(f.NUM_STEPS.value, f.SHIFT.value, solver, stepwise=True)

    def encode(group: Sequence[Loaded]) -> list[dict[str, Any]]:
        records = encode_texts(embed, group)
        text = jnp.asarray(np.stack([pad(record["text"]) for record in records]))
        keys = numbered_keys(f.SEED.value, np.array([item.number for item in group]))
        clips = whole_clips(sampler, teacher, params, Conditioning(text), keys, latent)
        return [record | {"latent": clip} for record, clip in zip(records, clips, strict=True)]

    return encode


def print_report(report: Report, sources: int) -> None:
    """Every source is a record, a line of rejected.jsonl, or in a part that is not there yet."""
    written, rejected = report.written, len(report.rejected)
    left = (
        f" + {sources - written - rejected} in parts that are missing; {report.missing} parts are "
        "left to other "
        "processes, or to a next start"
    )
    told = f"{sources} sources = {written} records + {rejected} left out"
    print(f"{f.DST.value}: {told}{left if report.missing else ''}")
    for name, reason in report.rejected[:LISTED]:
        # file names may not be valid text
        print(f"  {name}: {reason}".encode(errors="replace").decode())
    if len(report.rejected) > LISTED:
        print(
            f"  ... and {len(report.rejected) - LISTED} more, in "
            f"{Path(f.DST.value) / 'rejected.jsonl'}"
        )
