"""Networks as denoisers: the only place that turns sigma into Wan's timestep."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from salt_jax.flow.prediction import from_velocity, guide
from salt_jax.models import wan
from salt_jax.models.blocks import TextKV
from salt_jax.models.kv_cache import KVCache, Sight
from salt_jax.models.layout import lay_cache
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.types import Denoiser, ImageText, Latent, Params, Prediction, Sigma, TextEmb, Told

WAVES = (4, 2, 2)  # cosines along frames, rows and columns
PRODUCTS = 2  # of the frames' cosines, multiplied with each of a place
POSITION_CHANNELS = sum(WAVES) + PRODUCTS * (WAVES[1] + WAVES[2])


def position_channels(frames: int, height: int, width: int) -> np.ndarray:
    """Where an element is in its clip: the lowest cosines, float32 [F, H, W, POSITION_CHANNELS].

    Rotary positions tell a token how far another one is, not where it is itself. Large models find
    that out from content; over noise alone, a small one does not. So small presets read these
    channels behind the latent's own, as Wan's image-to-video models read their conditioning. A
    motion is a product of place and time: without the products training did not tell left from
    right (docs/decisions.md, 13b).
    """
    grid = np.meshgrid(*((np.arange(n) + 0.5) / n for n in (frames, height, width)), indexing="ij")
    time, *place = (
        [np.cos(np.pi * k * axis) for k in range(1, n + 1)]
        for axis, n in zip(grid, WAVES, strict=True)
    )
    place = [wave for axis in place for wave in axis]
    return np.stack([*time, *place, *(t * p for t in time[:PRODUCTS] for p in place)], -1).astype(
        np.float32
    )


class Network(NamedTuple):
    """Wan as functions of values.

    `denoise` is a `Denoiser` that may also be told a sight; only it needs a sigma.
    """

    denoise: Callable[..., Prediction]  # (params, x, sigma, text, sight=None)
    keys_values: Callable[..., tuple[Any, Any]]  # (params, x0, text, sight), of clean frames
    read_text: Callable[[Params, Told], TextKV]  # what `text` may be replaced with under one prompt
    features: Callable[..., Any]  # (params, x, sigma, text, layers) -> [B, F, S, D]
    empty_cache: Callable[[Latent, int], KVCache]  # (latents of any number of frames, slots)


def wan_network(config: WanConfig, compute: Compute, clip_frames: int, chunk: int) -> Network:
    """Wan with its input and output in float32 whatever `compute.dtype` is.

    An image-to-video network gets `ImageText.condition` behind the latent, and works whole clips.
    Another one that reads more channels than it writes gets `position_channels` of a clip of
    `clip_frames` there. Frames past the clip stand where its last `chunk` frames do.

    Raises:
      ValueError: the number of additional input channels is that of neither.
    """
    more = config.in_channels - config.out_channels
    if more not in ((config.condition_channels,) if config.image_dim else (0, POSITION_CHANNELS)):
        raise ValueError(
            f"{more} additional input channels; a condition has {config.condition_channels}, "
            f"position channels are {POSITION_CHANNELS}"
        )
    timestep = lambda sigma: 1000.0 * sigma

    def inputs(x: Latent, frames: Any, told: Any) -> Any:
        if isinstance(told, ImageText):
            return jnp.concatenate([x, told.condition], axis=-1)
        if not more or config.image_dim:
            return x
        past = clip_frames - chunk + (frames - clip_frames) % chunk
        table = jnp.asarray(position_channels(clip_frames, *x.shape[2:4]))
        position = table[jnp.where(frames < clip_frames, frames, past)]
        return jnp.concatenate([x, jnp.broadcast_to(position, (*x.shape[:4], more))], axis=-1)

    def denoise(
        params: Params, x: Latent, sigma: Sigma, text: Told | TextKV, sight: Sight | None = None
    ) -> Prediction:
        given = inputs(x, sight.frames if sight else np.arange(x.shape[1]), text)
        return from_velocity(
            x, wan.apply_wan(params, given, timestep(sigma), text, config, compute, sight), sigma
        )

    def keys_values(
        params: Params, x0: Latent, text: Told | TextKV, sight: Sight
    ) -> tuple[Any, Any]:
        clean = jnp.zeros(x0.shape[:1])
        return wan.keys_values(
            params, inputs(x0, sight.frames, text), timestep(clean), text, config, compute, sight
        )

    def features(params: Params, x: Latent, sigma: Sigma, text: Told, layers: int):
        given = inputs(x, np.arange(x.shape[1]), text)
        return wan.features(params, given, timestep(sigma), text, config, compute, layers)

    def empty_cache(like: Latent, slots: int) -> KVCache:
        b, _, h, w, channels = like.shape
        tokens = (h // config.patch_size[1]) * (w // config.patch_size[2])
        heads = (config.num_heads, config.head_width)
        zeros = lay_cache(
            jnp.zeros((config.num_layers, b, slots, tokens, *heads), compute.dtype), compute.mesh
        )
        x0 = jnp.zeros((b, slots, h, w, channels))
        none = jnp.zeros((), jnp.int32)
        return KVCache(zeros, zeros, x0, jnp.zeros(slots, jnp.int32), none, none)

    read_text = lambda params, text: wan.text_keys_values(params, text, config, compute)
    return Network(denoise, keys_values, read_text, features, empty_cache)


class Branches(NamedTuple):
    """What a guided network is told: the prompt, and what guidance leads away from."""

    text: Any
    null: Any


def guided(denoiser: Denoiser, null_text: TextEmb, guidance: float) -> Denoiser:
    """The same denoiser under classifier-free guidance; `null_text` is [1, T, D], guidance 1 is
    none.

    A picture stays what it is; the text alone is nulled. A memory that is seen holds both branches,
    see `guided_network`. Two evaluations a call, as the peers do: their memory then peaks at one
    batch, not at two.
    """
    if guidance == 1.0:
        return denoiser
    call: Any = denoiser  # a network's may be told a sight too

    def denoise(
        params: Params, x: Latent, sigma: Sigma, text: Told | Branches, *sight: Any
    ) -> Prediction:
        sights = zip(*map(_halves, sight), strict=True) if sight else ((), ())
        told = _both(text, null_text)
        given, null = (call(params, x, sigma, t, *s) for t, s in zip(told, sights, strict=True))
        return guide(given, null, guidance)

    return denoise


def guided_network(network: Network, null_text: TextEmb, guidance: float) -> Network:
    """The same network under classifier-free guidance, each branch with a history of its own.

    Its caches hold the keys and values of the prompt's branch and then those of the null text's on
    the batch axis: a chunk's conditional velocity sees earlier chunks as read under the prompt, its
    unconditional one as read under the null text. Arguments as in `guided`.
    """
    if guidance == 1.0:
        return network

    def keys_values(
        params: Params, x0: Latent, text: Told | Branches, sight: Sight
    ) -> tuple[Any, Any]:
        told = _both(text, null_text)
        parts = (
            network.keys_values(params, x0, t, s) for t, s in zip(told, _halves(sight), strict=True)
        )
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
        return k, v

    def read_text(params: Params, text: Told) -> Any:
        return Branches(*(network.read_text(params, t) for t in _both(text, null_text)))

    def empty_cache(like: Latent, slots: int) -> KVCache:
        cache = network.empty_cache(like, slots)
        return replace(cache, k=cache.k.repeat(2, axis=1), v=cache.v.repeat(2, axis=1))

    denoise = guided(network.denoise, null_text, guidance)
    return Network(denoise, keys_values, read_text, network.features, empty_cache)


def _both(text: Any, null_text: TextEmb) -> Branches:
    """What the two branches are told."""
    if isinstance(text, Branches):
        return text
    told = text.text if isinstance(text, ImageText) else text
    null = null_text.repeat(len(told), axis=0)
    return Branches(text, text._replace(text=null) if isinstance(text, ImageText) else null)


def _halves(sight: Sight | None) -> tuple[Sight | None, Sight | None]:
    """A sight of both branches' memory as one for each."""
    if sight is None or sight.memory is None:
        return sight, sight
    halves = zip(*(jnp.split(part, 2, axis=1) for part in sight.memory), strict=True)
    first, second = (sight._replace(memory=half) for half in halves)
    return first, second
