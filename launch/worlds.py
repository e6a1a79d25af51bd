"""What launch.sample does differently for Wan 2.1 and for Moving Shapes: reading, decoding,
files.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from launch import sample_flags as f
from launch.common import all_devices, open_workdir
from launch.request import Request
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.model_folder import IMAGE, TEXT, VAE, WAN, Source, part_file, stored_config
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import digest
from salt_jax.io.video import encode_gif, encode_mp4, visible_scale
from salt_jax.models.attention import compute_here
from salt_jax.models.denoiser import Network, wan_network
from salt_jax.models.image_condition import (
    condition_latents,
    crop_for_clip,
    image_clip,
    squash_for_clip,
)
from salt_jax.models.image_encoder import encode_image
from salt_jax.models.latent_size import FPS, SPACE, pixel_frames
from salt_jax.models.prompts import negative_prompt
from salt_jax.models.vae import encode_video
from salt_jax.moving_shapes import shapes
from salt_jax.sample import stream_pixels
from salt_jax.sharding import state_shardings
from salt_jax.types import Params


class World(NamedTuple):
    """One of the two. What is read is read when it is called for."""

    source: str  # of the network, as the user names it
    made_with: dict[str, Any]  # digests of all that is read, and what else decides the pixels
    negative: str  # what guidance leads away from
    read_texts: Callable[[Sequence[str]], dict[str, np.ndarray]]  # float32 [1, T, D] each
    read_given: Callable[
        [], tuple[Any, np.ndarray | None]
    ]  # (image features, condition), latents to go on from
    network: Network
    params: Callable[[], Params]
    decode: Callable[
        [Iterable[np.ndarray]], np.ndarray
    ]  # latent chunks [1, f, H, W, C] -> uint8 [T, H, W, 3]
    suffixes: tuple[str, ...]  # of the files that a clip becomes
    encode: Callable[[np.ndarray], dict[str, bytes]]  # a clip as files, by suffix


def open_world(request: Request) -> World:
    """The world of a request; the headers of all files that will be read have been looked at.

    Raises:
      UserError: something that will be read is absent, damaged, or of another network.
    """
    return (shapes_world if request.world == "shapes" else wan_world)(request)


def shapes_world(request: Request) -> World:
    run = open_workdir(f.WORKDIR.value or "", f.STEP.value, f.AVERAGE.value)
    recipe = run.recipe
    scale = visible_scale(recipe.world.size, 192)
    made_with = {"network": run.checkpoint}
    made_with["weights"] = {
        "text_encoder": digest(located(recipe.weights)) if recipe.weights else "fresh"
    }

    def decode(chunks):
        return np.concatenate([shapes.to_pixels(chunk[0]) for chunk in chunks])

    def read_given():
        return None, None if request.prefix is None else shapes.to_latent(request.prefix)[None]

    return World(
        f.WORKDIR.value or "",
        made_with,
        request.negative or "",
        lambda prompts: {prompt: run.embed([prompt]) for prompt in prompts},
        read_given,
        run.network,
        lambda: run.params,
        decode,
        ("mp4", "gif"),
        lambda clip: {"mp4": encode_mp4(clip, FPS, scale), "gif": encode_gif(clip, FPS, scale)},
    )


def wan_world(request: Request) -> World:
    config, recipe, dtype = request.config, request.recipe, jnp.dtype(f.DTYPE.value)
    source = Source(f.WEIGHTS.value or (recipe.weights if recipe else ""))
    if recipe and not source.folder and recipe.wan.text_dim != model_folder.TINY[TEXT].dim:
        raise UserError("name the text encoder and the VAE: --weights=DIR of launch.convert_wan")
    where = Source(f.STUDENT.value or source.folder)
    parts = [TEXT, VAE] + [IMAGE] * bool(config.image_dim)
    for part in parts * bool(source.folder):
        stored_config(part, source.folder)
    if not recipe and where.folder and (found := stored_config(WAN, where.folder)) != config:
        raise UserError(
            f"--student={f.STUDENT.value} is {found}, --weights is {config}; give those it came "
            "from"
        )
    if recipe:
        run = open_workdir(f.WORKDIR.value or "", f.STEP.value, f.AVERAGE.value)
        name, network, params = f.WORKDIR.value or "", run.checkpoint, lambda: run.params
    else:
        name = where.folder or f"{f.MODEL.value}, small and random"
        network = {"sha256": digest(part_file(WAN, where.folder)) if where.folder else "fresh"}
        place = partial(state_shardings, all_devices())
        params = lambda: model_folder.open_part(WAN, where, config, shardings=place)[1]
    files = {part.file: part_file(part, source.folder) for part in parts} if source.folder else {}
    files |= {path.name: path for path in model_folder.tokenizer_files(source)[:1]}
    told = {
        name: digest(path)
        for name, path in tqdm(files.items(), desc="checksums of the weights", delay=2)
    }
    policy = request.memory

    def read_texts(prompts):
        rows = model_folder.embed_prompts(source, prompts, config.text_length, dtype)
        return {prompt: row[None] for prompt, row in zip(prompts, rows, strict=True)}

    vae = functools.cache(lambda: model_folder.open_part(VAE, source))

    def decode(chunks):
        sizes, vae_params = vae()
        pixels = stream_pixels(vae_params, sizes, chunks, jnp.float32, f.TILE.value)
        return np.concatenate([frames[0] for frames in pixels])

    chunk = policy.chunk if policy else request.shape[0]
    network_here = wan_network(config, compute_here(config, dtype), request.shape[0], chunk)
    return World(
        name,
        {"network": network, "weights": told, "dtype": f.DTYPE.value, "tile": f.TILE.value},
        negative_prompt(request.negative, bool(config.image_dim)),
        read_texts,
        partial(read_given, request, source),
        network_here,
        params,
        decode,
        ("mp4",),
        lambda clip: {"mp4": encode_mp4(clip, FPS, 1)},
    )


def read_given(request: Request, source: Source) -> tuple[Any, np.ndarray | None]:
    """(features, condition) for a network that reads pictures, or the latents of what a video goes
    on from.
    """
    picture, clip = request.picture, request.prefix
    if picture is not None:
        frames = 1 if request.memory else pixel_frames(request.shape[0])
        clip = image_clip(picture, frames, SPACE * request.shape[1], SPACE * request.shape[2])
    elif clip is not None:
        clip = clip.astype(np.float32) / 127.5 - 1
    else:
        return None, None
    sizes, vae = model_folder.open_part(VAE, source)
    encode = jax.jit(encode_video, static_argnums=(2, 3))
    latents = encode(vae, jnp.asarray(clip)[None], sizes, jnp.float32)
    if picture is None or request.memory:
        return None, np.asarray(latents)
    sizes, eye = model_folder.open_part(IMAGE, source)
    fit = {"squash": squash_for_clip, "crop": crop_for_clip}[f.PICTURE_FIT.value]
    pixels = jnp.asarray(fit(picture, sizes.image_size))[None]
    see = jax.jit(encode_image, static_argnums=(2, 3))
    features = see(eye, pixels, sizes, jnp.dtype(f.DTYPE.value)).astype(jnp.float32)
    return (features, condition_latents(latents)), None
