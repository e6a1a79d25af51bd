"""What launch.encode does: sources go through tokenizer, text encoder and VAE, and become records
of a data set.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from salt_jax import hosts
from salt_jax.choices import TeacherSolver
from salt_jax.cli import encode_flags as f
from salt_jax.cli.encode_report import print_report
from salt_jax.data.clips import READER, read_clip
from salt_jax.data.latents import padded
from salt_jax.data.video_folder import Video
from salt_jax.data.writing_latents import (
    Make,
    Plan,
    Record,
    begin,
    complete,
    in_groups,
    write_parts,
)
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.files import AnyPath, in_bucket, size
from salt_jax.io.model_folder import IMAGE, TEXT, VAE, WAN, Part, Source
from salt_jax.io.tensor_files import digest
from salt_jax.io.tokenizer import PAD
from salt_jax.keys import Json
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
from salt_jax.sharding import own_devices, state_shardings
from salt_jax.types import Conditioning

TINY = PRESETS["wan2.1-t2v-tiny"]  # with --preset_size=tiny


class Loaded(NamedTuple):
    """A source as it goes to the networks."""

    number: int
    caption: str
    tokens: np.ndarray  # int32 [L], padded
    clip: np.ndarray | None  # uint8 [T, H, W, 3]; None: a prompt alone
    switch: np.ndarray | None = None  # tokens of the switch prompt, where prompts are paired


Tokenize = Callable[[str, int], np.ndarray]  # (text, length) -> int32 [length], padded
Embed = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # tokens -> [n, D], without padding
Encode = Callable[[Sequence[Loaded]], list[Record]]


def encode_all(wanted: f.Wanted) -> None:
    """Writes this process's share of the records.

    Raises:
      UserError: weights are absent or do not fit, or the data set was begun with other settings.
    """
    index, count = f.read_share(jax.process_index(), jax.process_count())
    with hosts.agreed("the weights"):
        plan, make = prepare(wanted)
    hosts.only_first(lambda: begin(f.DST.value, plan), f.DST.value)
    with hosts.agreed("encoding", hosts.LONG):
        begin(f.DST.value, plan)  # and all of them found the same sources
        write_parts(f.DST.value, plan, make, index, count)
    finish = lambda: print_report(complete(f.DST.value, plan), len(wanted.videos))
    hosts.only_first(finish, "completing the data set")


def prepare(wanted: f.Wanted) -> tuple[Plan, Make]:
    """What the data set is to hold, and what makes its records.

    Raises:
      UserError: weights are absent or do not fit.
    """
    source, videos = Source(f.WEIGHTS.value), wanted.videos
    negative = negative_prompt(f.NEGATIVE.value, f.PICTURE.value)
    tokenize, embed = text_reader(source)
    (null_text,) = embed([tokenize(negative, TINY.text_length)])
    batch = f.BATCH.value or (1 if f.VIDEOS.value or f.TEACHER.value else 16)
    rows, columns = wanted.height // SPACE, wanted.width // SPACE
    latent = (1 + f.FRAMES.value // TIME, rows, columns, TINY.out_channels)
    shapes: dict[str, tuple[int | None, ...]] = {"text": (None, null_text.shape[1])}
    if any(video.switch for video in videos):
        shapes["switch"] = shapes["text"]
    parts = [TEXT]
    encode = partial(encode_texts, embed)
    if f.TEACHER.value:
        shapes["latent"], parts = latent, [TEXT, WAN]
        encode = teacher_encoder(source, embed, null_text, latent)
    elif f.VIDEOS.value:
        encode, more = clip_encoder(source, embed, latent)
        shapes, parts = shapes | more, [TEXT, VAE] + ([IMAGE] if f.PICTURE.value else [])
    read_file = partial(read_whole, wanted.height, wanted.width) if f.VIDEOS.value else None
    load = partial(load_source, videos, tokenize, read_file)
    plan = Plan(
        settings(source, parts, videos, negative),
        shapes,
        null_text,
        [video.name for video in videos],
        f.PER_PART.value,
    )
    return plan, partial(in_groups, load=load, encode=encode, size=batch)


def settings(source: Source, parts: Sequence[Part], videos: Sequence[Video], negative: str) -> Json:
    """Everything the records depend on."""
    sizes = [size(v.file) if is_file(v.file) else 0 for v in videos]
    listed = [
        (v.name, v.caption, n, *[v.switch] * bool(v.switch))
        for v, n in zip(videos, sizes, strict=True)
    ]
    found: Json = {
        "kind": "teacher" if f.TEACHER.value else "videos" if f.VIDEOS.value else "prompts",
        "sources_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "negative_prompt": negative,
        "dtype": f.DTYPE.value,
    }
    for part in tqdm(parts, desc="checksums of the weights", unit="file", delay=1):
        found[part.file] = (
            "random" if not source.folder else digest(model_folder.part_file(part, source.folder))
        )
    if f.VIDEOS.value:
        found |= {"reader": READER}
    if f.VIDEOS.value or f.TEACHER.value:
        found |= {"size": f.SIZE.value, "frames": f.FRAMES.value, "fps": FPS}
    if f.TEACHER.value:
        of_teacher = (f.NUM_STEPS, f.GUIDANCE, f.SHIFT, f.SOLVER, f.SEED)
        found |= {flag.name: flag.value for flag in of_teacher}
    return found


def is_file(file: AnyPath) -> bool:
    """Also of a name that no file can have."""
    return file.is_file() if in_bucket(file) else os.path.isfile(file)


def load_source(
    videos: Sequence[Video],
    tokenize: Tokenize,
    read_file: Callable[[AnyPath], np.ndarray] | None,
    number: int,
) -> Loaded | str:
    """A source's tokens and pixels, or why it cannot be used."""
    video = videos[number]
    if video.problem:
        return video.problem
    try:
        video.caption.encode()  # half a pair of surrogates cannot be stored
        tokens = tokenize(video.caption, TINY.text_length)
        switch = tokenize(video.switch, TINY.text_length) if video.switch else None
        return Loaded(number, video.caption, tokens, read_file and read_file(video.file), switch)
    except Exception as error:  # whatever a file does to a decoder must not stop the others
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def read_whole(height: int, width: int, file: AnyPath) -> np.ndarray:
    """The clip in a file.

    Raises ValueError where it is too short, or for another reason not to use it.
    """
    clip = read_clip(file, f.FRAMES.value, height, width, FPS)
    if len(clip) < f.FRAMES.value:
        raise ValueError(
            f"it gives {len(clip)} frames at {FPS} a second, --frames={f.FRAMES.value} are wanted"
        )
    return clip


def text_reader(source: Source) -> tuple[Tokenize, Embed]:
    """Tokenizer and text encoder.

    Beside a teacher the text encoder is in memory only while it reads.
    """
    opened = None if f.TEACHER.value else model_folder.open_part(TEXT, source)

    def embed(tokens: Sequence[np.ndarray]) -> list[np.ndarray]:
        config, params = opened or model_folder.open_part(TEXT, source)
        rows = encode_prompts(params, np.stack(tokens), config, dtype=jnp.dtype(f.DTYPE.value))
        rows = np.asarray(rows, np.float32)
        return [row[: np.count_nonzero(t != PAD)] for row, t in zip(rows, tokens, strict=True)]

    return model_folder.open_tokenizer(source), embed


def encode_texts(embed: Embed, group: Sequence[Loaded]) -> list[Record]:
    found = {"text": embed([item.tokens for item in group])}
    if switches := [item.switch for item in group if item.switch is not None]:
        found["switch"] = embed(switches)
    return [
        {"caption": item.caption} | {name: texts[i] for name, texts in found.items()}
        for i, item in enumerate(group)
    ]


def clip_encoder(
    source: Source, embed: Embed, latent: tuple[int, ...]
) -> tuple[Encode, dict[str, tuple[int, ...]]]:
    """Clips and captions -> records; and the shapes of what they hold besides text."""
    sizes, vae = model_folder.open_part(VAE, source)
    to_latents = jax.jit(partial(encode_video, config=sizes, dtype=jnp.float32))
    shapes, see = {"latent": latent}, None
    if f.PICTURE.value:
        see, features = picture_reader(source)
        shapes |= {"condition": latent, "image": features}

    def encode(group: Sequence[Loaded]) -> list[Record]:
        pixels = np.stack([item.clip for item in group if item.clip is not None])
        video = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        arrays = {"latent": to_latents(vae, video)}
        if see:
            # What the model is given of its first frame: the frame, then mid-grey.
            arrays["condition"] = to_latents(vae, video.at[:, 1:].set(0))
            arrays["image"] = see(pixels[:, 0])
        host = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        records = encode_texts(embed, group)
        return [
            {**record, **{k: a[i] for k, a in host.items()}} for i, record in enumerate(records)
        ]

    return encode, shapes


def picture_reader(source: Source) -> tuple[Callable[[np.ndarray], jax.Array], tuple[int, int]]:
    """Pictures, uint8 [B, H, W, 3] of the size of the clips -> features of CLIP; their shape."""
    sizes, params = model_folder.open_part(IMAGE, source)
    encode = jax.jit(partial(encode_image, config=sizes, dtype=jnp.dtype(f.DTYPE.value)))

    def see(pictures: np.ndarray) -> jax.Array:
        squashed = [squash_for_clip(picture, sizes.image_size) for picture in pictures]
        return encode(params, jnp.asarray(np.stack(squashed)))

    return see, (sizes.num_tokens, sizes.dim)


def teacher_encoder(
    source: Source, embed: Embed, null_text: np.ndarray, latent: tuple[int, ...]
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
    params = model_folder.open_part(
        WAN, source, config, shardings=partial(state_shardings, own_devices())
    )[1]
    null = jnp.asarray(padded(null_text, config.text_length))[None]
    teacher, params = guided(network, params, null, f.GUIDANCE.value)
    solver = cast(TeacherSolver, f.SOLVER.value)
    sampler = Sampler(f.NUM_STEPS.value, f.SHIFT.value, solver, stepwise=True)

    def encode(group: Sequence[Loaded]) -> list[Record]:
        records = encode_texts(embed, group)
        texts = [padded(np.asarray(record["text"]), config.text_length) for record in records]
        keys = numbered_keys(f.SEED.value, np.array([item.number for item in group]))
        cond = Conditioning(jnp.asarray(np.stack(texts)))
        clips = whole_clips(sampler, teacher, params, cond, keys, latent)
        return [{**record, "latent": clip} for record, clip in zip(records, clips, strict=True)]

    return encode
