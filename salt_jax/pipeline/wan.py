"""Text encoder, VAE, and CLIP for image to video, of a network of Wan 2.1."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from salt_jax.convert.tiny_decoder import read_tiny_decoder
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.files import as_path
from salt_jax.io.model_folder import IMAGE, TEXT, VAE, WAN, Source, part_file, stored_config
from salt_jax.io.tensor_files import digest
from salt_jax.models.attention import compute_here
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.image_condition import (
    condition_latents,
    crop_for_clip,
    image_clip,
    squash_for_clip,
)
from salt_jax.models.image_encoder import encode_image
from salt_jax.models.latent_size import FPS, SPACE, latent_frames, pixel_frames
from salt_jax.models.presets import WanConfig
from salt_jax.models.prompts import negative_prompt
from salt_jax.models.vae import VAEConfig, encode_video
from salt_jax.pipeline.parts import Decode, Decoded, Given, Parts
from salt_jax.rollout.pixels import decode_chunk, decode_chunk_tiny, decode_whole, to_bytes
from salt_jax.sharding import own_devices, state_shardings
from salt_jax.types import Params
from salt_jax.workdir import Trained

_encode_video = jax.jit(encode_video, static_argnums=(2, 3))
_encode_image = jax.jit(encode_image, static_argnums=(2, 3))


EXAMPLES = (
    "A cat walks through tall grass in the morning sun, close up.",
    "A red vintage car drives along a coast road, seen from above.",
    "Waves break on black rocks under a stormy sky, slow motion.",
)


class WanOptions(NamedTuple):
    """How the parts of Wan 2.1 run."""

    dtype: DTypeLike = "bfloat16"  # of all but the VAE, which is float32
    tile: int = 0  # decode in tiles of so many latent rows, to save memory; 0: whole
    image_fit: Literal["squash", "crop"] = "squash"  # how CLIP sees a picture: as Wan, or diffusers
    negative: str | None = None  # what guidance leads away from; None: Wan's own
    decodes: bool = True  # whether the folder has to have a VAE
    tiny_decoder: str = ""  # a file of TAEHV, which decodes in place of the VAE; "": none
    keeps_text: bool = False  # whether the text encoder stays in memory, for prompts to come


class WanSource(NamedTuple):
    """Where a network and its parts are."""

    name: str  # as the user names the network
    folder: Source  # of text encoder, VAE and CLIP; small and random ones where it names none
    config: WanConfig
    student: str = ""  # a converted student's file, in place of the folder's network
    run: Trained | None = None  # a workdir's network, in place of both


def wan_parts(source: WanSource, clip: tuple[int, int], options: WanOptions) -> Parts:
    """The headers of all files that will be read have been looked at.

    Args:
      clip: latent frames of a clip, and of a chunk.

    Raises:
      UserError: something that will be read is absent, damaged, or of another network.
    """
    config, folder, dtype = source.config, source.folder, jnp.dtype(options.dtype)
    decode, digests = _decoder(folder, options)
    weights = _checked(source, options.decodes) | digests
    made_with, read_params = _network(source)

    open_tokenizer = functools.partial(model_folder.open_tokenizer, folder)
    open_encoder = functools.partial(model_folder.open_part, TEXT, folder)
    if options.keeps_text:
        open_tokenizer = functools.cache(open_tokenizer)
        open_encoder = functools.cache(open_encoder)

    def read_texts(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        rows = model_folder.embed_prompts(
            open_tokenizer(), open_encoder, prompts, config.text_length, dtype
        )
        return {prompt: row[None] for prompt, row in zip(prompts, rows, strict=True)}

    def as_bytes(decoded: Decoded) -> np.ndarray:
        return to_bytes(np.concatenate(decoded, axis=1))[0]

    how = {"dtype": dtype.name, "tile": options.tile}
    return Parts(
        source=source.name,
        made_with={"network": made_with, "weights": weights, **how},
        network=wan_denoiser(config, compute_here(config, dtype), *clip),
        read_params=read_params,
        read_texts=read_texts,
        read_given=functools.partial(read_given, folder, config, options),
        decode=decode,
        to_bytes=as_bytes,
        whole=bool(options.tile),
        frames_of=latent_frames,
        shown=pixel_frames,
        learnt=lambda prompt: True,
        examples=EXAMPLES,
        negative=negative_prompt(options.negative, bool(config.image_dim)),
        fps=FPS,
        zoom=SPACE,
    )


def _decoder(folder: Source, options: WanOptions) -> tuple[Decode, dict[str, str]]:
    """`Parts.decode`, and the digest of the file of a tiny decoder."""
    if file := options.tiny_decoder:
        tiny = read_tiny_decoder(file)
        return functools.partial(decode_chunk_tiny, tiny), {"tiny_decoder": digest(as_path(file))}

    @functools.cache
    def vae() -> tuple[VAEConfig, Params]:
        return model_folder.open_part(VAE, folder)

    def decode(memory: Params | None, latents: jax.Array) -> tuple[Decoded, Params | None]:
        sizes, params = vae()
        if options.tile:
            return (decode_whole(params, sizes, jnp.float32, options.tile, latents),), None
        return decode_chunk(params, sizes, jnp.float32, memory, latents)

    return decode, {}


def _checked(source: WanSource, decodes: bool) -> dict[str, str]:
    """Digests of the files beside the network, whose headers have been looked at."""
    config, folder, run = source.config, source.folder, source.run
    if run and not folder.folder and config.text_dim != TEXT.tiny.dim:
        raise UserError("name the text encoder and the VAE: --weights=DIR of launch.convert_wan")
    where = Source(source.student or folder.folder)
    used: list[model_folder.Part] = [TEXT] + [VAE] * decodes + [IMAGE] * bool(config.image_dim)
    for part in used if folder.folder else ():
        stored_config(part, folder.folder)
    if not run and where.folder and (found := stored_config(WAN, where.folder)) != config:
        raise UserError(
            f"--student={source.student} is {found}, --weights is {config}; give those it came from"
        )
    files = {part.file: part_file(part, folder.folder) for part in used if folder.folder}
    files |= {path.name: path for path in model_folder.tokenizer_files(folder)[:1]}
    progress = tqdm(files.items(), desc="checksums of the weights", delay=2)
    return {name: digest(path) for name, path in progress}


def _network(source: WanSource) -> tuple[dict[str, object], Callable[[], Params]]:
    """What tells which network it is, and what reads its parameters."""
    run, where = source.run, Source(source.student or source.folder.folder)
    if run:
        return run.made_with, lambda: run.params
    place = functools.partial(state_shardings, own_devices())
    sha256 = digest(part_file(WAN, where.folder)) if where.folder else "fresh"

    def read() -> Params:
        return model_folder.open_part(WAN, where, source.config, shardings=place)[1]

    return {"sha256": sha256}, read


def read_given(
    folder: Source,
    config: WanConfig,
    options: WanOptions,
    pixels: np.ndarray,
    shape: tuple[int, ...],
    chunks: bool,
) -> Given:
    """Features and condition of a picture for a network that reads pictures, or the latents of a
    picture or clip that a video continues.
    """
    if pixels.ndim == 3:
        frames = 1 if chunks else pixel_frames(shape[0])
        clip = image_clip(pixels, frames, SPACE * shape[1], SPACE * shape[2])
    else:
        clip = pixels.astype(np.float32) / 127.5 - 1
    sizes, vae = model_folder.open_part(VAE, folder)
    latents = _encode_video(vae, jnp.asarray(clip)[None], sizes, jnp.float32)
    if chunks or not config.image_dim:
        return Given(latents=np.asarray(latents))
    sizes, eye = model_folder.open_part(IMAGE, folder)
    fit = {"squash": squash_for_clip, "crop": crop_for_clip}[options.image_fit]
    picture = jnp.asarray(fit(pixels, sizes.image_size))[None]
    features = _encode_image(eye, picture, sizes, jnp.dtype(options.dtype)).astype(jnp.float32)
    return Given(image=(features, condition_latents(latents)))
