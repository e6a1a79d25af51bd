"""The causal 3-D VAE of Wan 2.1 (arXiv:2503.20314, section 4.1): video <-> latents, 4x fewer
frames, 8x fewer rows.

The first frame of a video is coded alone, each later latent frame codes four frames.
Convolutions look back only, so the networks run through a video with two programs: one for the
first frame, one for all others, which passes on the last frames that each convolution saw. Whole
videos and streams use the same two.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from salt_jax.models import vae_blocks
from salt_jax.models.latent_size import SPACE, TIME
from salt_jax.models.vae_blocks import (
    Cache,
    Layer,
    conv,
    conv_shapes,
    decoder_layers,
    encoder_layers,
    run_layers,
)
from salt_jax.types import Latent, Params, PRNGKey

Video = Float[Array, "b t height width 3"]
"""Frames of a clip in [-1, 1]."""


# Of each latent channel over Wan's training data: latents are normalised with them.
MEAN = np.array(
    [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
    + [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
    np.float32,
)
STD = np.array(
    [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
    + [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    np.float32,
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE."""

    dim: int  # channels at full resolution; twice and four times as many below
    z_dim: int  # channels of a latent

    def __post_init__(self):
        if self.z_dim != len(MEAN):
            raise ValueError(
                f"z_dim={self.z_dim} must be {len(MEAN)}: mean and std are known of that many "
                "channels"
            )


PRESETS = {"wan2.1": VAEConfig(96, 16), "tiny": VAEConfig(8, 16)}


def init_vae(key: PRNGKey, config: VAEConfig) -> Params:
    """Fresh float32 parameters: kernels of variance 1 / fan-in, biases zero, gains one."""
    z = config.z_dim
    tree = {
        "encoder": _network_shapes(encoder_layers(config.dim), 4 * config.dim, 2 * z),
        "to_moments": conv_shapes(1, 1, 1, 2 * z, 2 * z),
        "from_latent": conv_shapes(1, 1, 1, z, z),
        "decoder": _network_shapes(decoder_layers(config.dim, z), config.dim, 3),
    }
    leaves = cast(dict[tuple[str, ...], tuple[int, ...]], flatten_dict(tree))
    # one draw for all kernels, and a barrier against fusing it into each: XLA compiles a hundred
    # for minutes
    ends = np.cumsum([math.prod(shape) * (path[-1] == "kernel") for path, shape in leaves.items()])
    draws = jnp.split(lax.optimization_barrier(jax.random.normal(key, (int(ends[-1]),))), ends[:-1])

    def fresh(path, shape, draw):
        if path[-1] == "kernel":
            return draw.reshape(shape) * math.prod(shape[:-1]) ** -0.5
        return jnp.full(shape, float(path[-1] == "scale"))

    pairs = zip(leaves.items(), draws, strict=True)
    return unflatten_dict({path: fresh(path, shape, draw) for (path, shape), draw in pairs})


def _network_shapes(layers: list[Layer], width: int, out: int) -> Params:
    """Of encoder or decoder: its layers, then a norm of `width` and a convolution to `out`."""
    return {
        **unflatten_dict({layer.path: vae_blocks.shapes(layer) for layer in layers}, sep="/"),
        "norm_out": {"scale": (width,)},
        "conv_out": conv_shapes(3, 3, 3, width, out),
    }


def encode_video(params: Params, video: Video, config: VAEConfig, dtype: DTypeLike) -> Latent:
    """Frames [B, 4k+1, 8h, 8w, 3] in [-1, 1] -> normalised latents [B, k+1, h, w, 16], the mean of
    the posterior.

    `dtype` is that of the convolutions. Raises ValueError for other numbers of frames, rows or
    columns.
    """
    _check_shape(video)
    b, t, height, width, _ = video.shape
    p, layers = _cast(params, ("encoder", "to_moments"), dtype), encoder_layers(config.dim)
    video = video.astype(dtype)

    def step(cache, frames):
        x, cache = run_layers(layers, p["encoder"], frames, cache)
        mean = conv(p["to_moments"], x)[..., : config.z_dim].astype(jnp.float32)
        return cache, (mean - _row(MEAN)) / _row(STD)

    cache, first = step(None, video[:, :1])
    if t == 1:
        return first
    chunks = jnp.moveaxis(video[:, 1:].reshape(b, -1, TIME, height, width, 3), 1, 0)
    _, rest = lax.scan(step, cache, chunks)
    return jnp.concatenate([first, jnp.moveaxis(rest[:, :, 0], 0, 1)], axis=1)


def decode_video(params: Params, latents: Latent, config: VAEConfig, dtype: DTypeLike) -> Video:
    """Normalised latents [B, F, h, w, 16] -> frames [B, 4F-3, 8h, 8w, 3] in [-1, 1].

    `dtype` as in `encode_video`.
    """
    frames, cache = decode_first(params, latents[:, :1], config, dtype)
    if latents.shape[1] == 1:
        return frames
    rest, _ = decode_next(params, cache, latents[:, 1:], config, dtype)
    return jnp.concatenate([frames, rest], axis=1)


def decode_first(
    params: Params, latents: Latent, config: VAEConfig, dtype: DTypeLike
) -> tuple[Video, Cache]:
    """Starts a stream: the first latent frame [B, 1, h, w, 16] -> its one frame, and the cache to
    continue with.
    """
    if latents.shape[1] != 1:
        raise ValueError(f"a stream starts with one latent frame, not {latents.shape[1]}")
    cache, frames = _decoder(params, config, dtype)(None, latents)
    return frames, cache


def decode_next(
    params: Params, cache: Cache, latents: Latent, config: VAEConfig, dtype: DTypeLike
) -> tuple[Video, Cache]:
    """Continues a stream: latents [B, n, h, w, 16] -> frames [B, 4n, 8h, 8w, 3], and the cache
    after them.

    However the latents of a video are split into calls, the frames are those of `decode_video`.
    """
    step = _decoder(params, config, dtype)
    cache, frames = lax.scan(step, cache, jnp.moveaxis(latents[:, :, None], 1, 0))  # [n, B, 4, ...]
    frames = jnp.moveaxis(frames, 0, 1)
    return frames.reshape(frames.shape[0], -1, *frames.shape[3:]), cache


def _check_shape(video):
    _, t, height, width, _ = video.shape
    if t % TIME != 1:
        raise ValueError(
            f"a video of {t} frames cannot be encoded: their number must be {TIME}k + 1"
        )
    if height % SPACE or width % SPACE:
        raise ValueError(
            f"frames of {height} x {width} cannot be encoded: both must be multiples of {SPACE}"
        )


def _decoder(params, config, dtype):
    """(cache, one latent frame [B, 1, h, w, 16]) -> (cache, its frames)."""
    p, layers = (
        _cast(params, ("from_latent", "decoder"), dtype),
        decoder_layers(config.dim, config.z_dim),
    )

    def step(cache, latent):
        z = (latent * _row(STD) + _row(MEAN)).astype(dtype)
        x, cache = run_layers(layers, p["decoder"], conv(p["from_latent"], z), cache)
        return cache, jnp.clip(x.astype(jnp.float32), -1, 1)

    return step


def _cast(params, names, dtype):
    return jax.tree.map(lambda w: w.astype(dtype), {name: params[name] for name in names})


def _row(channels):
    return channels[None, None, None, None]


def encode_tiled(
    params: Params, video: Video, config: VAEConfig, dtype: DTypeLike, tile: int, overlap: int
) -> Latent:
    """`encode_video` in the memory of one tile at a time, see `decode_tiled`."""
    _check_shape(video)
    encode = partial(encode_video, params, config=config, dtype=dtype)
    return _tiled(encode, video, tile, overlap, SPACE, 1)


def decode_tiled(
    params: Params, latents: Latent, config: VAEConfig, dtype: DTypeLike, tile: int, overlap: int
) -> Video:
    """`decode_video` in the memory of one tile at a time: tiles of at most `tile` x `tile` latent
    positions that overlap by at least `overlap`, blended linearly where they do.

    An approximation: convolutions and attention of a tile do not see past its edges. Tiles are of
    one size, so that one program serves all, and evenly spread; diffusers' `tiled_decode` lets the
    last ones be as narrow as `overlap`. Raises ValueError unless 0 <= overlap < tile.
    """
    decode = partial(decode_video, params, config=config, dtype=dtype)
    return _tiled(decode, latents, tile, overlap, 1, SPACE)


def _tiled(run, x, tile, overlap, unit_in, unit_out):
    """Sums `run(tile) * weight` over all tiles.

    A latent row or column is `unit_in` of x, `unit_out` of the result.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} must be at least 0 and less than tile={tile}")
    height, width = (size // unit_in for size in x.shape[2:4])
    rows, row_weights = _axis_tiles(height, tile, overlap, unit_out)
    columns, column_weights = _axis_tiles(width, tile, overlap, unit_out)
    tile_in = (*x.shape[:2], min(tile, height) * unit_in, min(tile, width) * unit_in, x.shape[4])
    b, t, *_, c = jax.eval_shape(run, jax.ShapeDtypeStruct(tile_in, x.dtype)).shape

    def add(total, place):
        row, column, row_weight, column_weight = place
        read, write = ((0, 0, row * unit, column * unit, 0) for unit in (unit_in, unit_out))
        piece = run(lax.dynamic_slice(x, read, tile_in))
        piece *= (row_weight[:, None] * column_weight[None])[None, None, :, :, None]
        piece += lax.dynamic_slice(total, write, piece.shape)
        return lax.dynamic_update_slice(total, piece, write), None

    i, j = (axis.reshape(-1) for axis in np.indices((len(rows), len(columns))))
    total = jnp.zeros((b, t, height * unit_out, width * unit_out, c))
    return lax.scan(add, total, (rows[i], columns[j], row_weights[i], column_weights[j]))[0]


def _axis_tiles(size, tile, overlap, unit):
    """Where tiles along an axis start, int32 [n], and their weights [n, tile * unit], which sum to
    one everywhere.
    """
    tile = min(tile, size)
    count = 1 if tile == size else math.ceil((size - overlap) / (tile - overlap))
    starts = np.round(np.linspace(0, size - tile, count)).astype(np.int32)
    weights = np.ones((count, tile * unit), np.float32)
    for i, shared in enumerate((starts[:-1] + tile - starts[1:]) * unit):
        ramp = np.arange(shared, dtype=np.float32) / max(shared, 1)
        weights[i, tile * unit - shared :] *= 1 - ramp
        weights[i + 1, :shared] *= ramp
    total = np.zeros(size * unit, np.float32)
    for start, weight in zip(starts * unit, weights, strict=True):
        total[start : start + tile * unit] += weight
    return starts, weights / np.stack(
        [total[start : start + tile * unit] for start in starts * unit]
    )
