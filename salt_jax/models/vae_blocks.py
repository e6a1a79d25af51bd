"""The parts of the causal 3-D VAE, and the cache that lets it run through a video a few frames at a
time.

A layer maps (params, x [B, T, H, W, C], cache) to (x, cache). The cache holds the last frames that
its convolutions in time have seen; None before the first frame of the video, where it counts as
zeros. The dtype of the activations is that of `x` and of the parameters; norms are computed in
float32.
"""

from functools import partial, reduce
from operator import getitem
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from salt_jax.types import Params

Frames = Float[Array, "b _ _ _ _"]
"""Some frames inside the networks, [B, T, H, W, C]."""

Kernel = Float[Array, "kt kh kw i o"]

Cache = dict[str, Frames | tuple[Frames, ...]]
"""By layer: the last frames that each of its convolutions in time has seen."""


class Layer(NamedTuple):
    """One layer of the encoder or decoder: where its parameters are, what it is, channels in and
    out.
    """

    path: str
    kind: str
    channels: int
    out: int


def encoder_layers(dim: int) -> list[Layer]:
    """Frames -> features 8x smaller in space; the two samplers in time halve the frames after the
    first.
    """
    found, before = [], dim
    for width, sampler in zip(
        (dim, 2 * dim, 4 * dim, 4 * dim), ("down2d", "down3d", "down3d", ""), strict=True
    ):
        found += [("res", before, width), ("res", width, width)] + [(sampler, width, width)] * bool(
            sampler
        )
        before = width
    down = [Layer(f"down/{i}", *layer) for i, layer in enumerate(found)]
    return [Layer("conv_in", "conv", 3, dim), *down, *_middle(4 * dim)]


def decoder_layers(dim: int, z_dim: int) -> list[Layer]:
    """The way back.

    Samplers halve the channels, so the first block of a level may widen them again.
    """
    found, before = [], 4 * dim
    for width, sampler in zip(
        (4 * dim, 4 * dim, 2 * dim, dim), ("up3d", "up3d", "up2d", ""), strict=True
    ):
        found += [("res", before, width)] + [("res", width, width)] * 2
        found += [(sampler, width, width // 2)] * bool(sampler)
        before = width // 2
    up = [Layer(f"up/{i}", *layer) for i, layer in enumerate(found)]
    return [Layer("conv_in", "conv", z_dim, 4 * dim), *_middle(4 * dim), *up]


def _middle(width):
    kinds = {"res_in": "res", "attention": "attention", "res_out": "res"}
    return [Layer(f"middle/{name}", kind, width, width) for name, kind in kinds.items()]


def shapes(layer: Layer) -> Params:
    """The shape of every parameter of a layer."""
    _, kind, channels, out = layer
    if kind == "conv":
        return conv_shapes(3, 3, 3, channels, out)
    if kind == "attention":
        projections = {
            "qkv": conv_shapes(1, 1, channels, 3 * channels),
            "proj": conv_shapes(1, 1, channels, channels),
        }
        return {"norm": {"scale": (channels,)}, **projections}
    if kind == "res":
        tree = {
            "norm1": {"scale": (channels,)},
            "conv1": conv_shapes(3, 3, 3, channels, out),
            "norm2": {"scale": (out,)},
            "conv2": conv_shapes(3, 3, 3, out, out),
        }
        if channels != out:
            tree["shortcut"] = conv_shapes(1, 1, 1, channels, out)
        return tree
    spatial = {"conv": conv_shapes(3, 3, channels, out)}
    time_out = {"down3d": channels, "up3d": 2 * channels}
    return (
        spatial | {"time_conv": conv_shapes(3, 1, 1, channels, time_out[kind])}
        if kind in time_out
        else spatial
    )


def conv_shapes(*kernel: int) -> dict[str, tuple[int, ...]]:
    """Those of a convolution with a kernel of this shape."""
    return {"kernel": kernel, "bias": kernel[-1:]}


def run_layers(
    layers: list[Layer], params: Params, x: Frames, cache: Cache | None
) -> tuple[Frames, Cache]:
    """Pushes a few frames through all layers and the last norm and convolution: the first frame of
    a video with `cache` None, later ones with what the call before returned.
    """
    new = {}
    for path, kind, *_ in layers:
        past = None if cache is None else cache[path]
        x, new[path] = _RUN[kind](reduce(getitem, path.split("/"), params), x, past)
    last = None if cache is None else cache["conv_out"]
    assert not isinstance(last, tuple)
    x, new["conv_out"] = causal_conv(params["conv_out"], norm_silu(params["norm_out"], x), last)
    return x, new


def conv(
    params: Params,
    x: Frames,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int] | None = None,
) -> Frames:
    """Convolution, without padding in time; `padding` is that before and after rows and columns,
    "same" if None.

    Kernels are [kt, kh, kw, I, O] or [kh, kw, I, O].
    """
    kernel = params["kernel"]
    kernel = kernel[None] if kernel.ndim == 4 else kernel
    pad = [padding or (size // 2, size // 2) for size in kernel.shape[1:3]]
    how = dict(stride=stride, pad=pad)
    # Decided by the devices that a program is for. A CPU is twice as fast that way.
    y = lax.platform_dependent(
        x, kernel, cpu=partial(conv_by_frame, **how), default=partial(conv_at_once, **how)
    )
    return y + params["bias"][None, None, None, None]


def conv_at_once(
    x: Frames, kernel: Kernel, stride: tuple[int, int, int], pad: list[tuple[int, int]]
) -> Frames:
    """One 3-D convolution."""
    return lax.conv_general_dilated(
        x, kernel, stride, [(0, 0), *pad], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def conv_by_frame(
    x: Frames, kernel: Kernel, stride: tuple[int, int, int], pad: list[tuple[int, int]]
) -> Frames:
    """The same as a sum of 2-D ones, one for each frame of the kernel."""
    taps = len(kernel)
    frames = (x.shape[1] - taps) // stride[0] + 1

    def tap(i):
        seen = lax.slice_in_dim(x, i, i + (frames - 1) * stride[0] + 1, stride[0], axis=1)
        seen = seen.reshape(-1, *x.shape[2:])
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(seen, kernel[i], stride[1:], pad, dimension_numbers=numbers)
        return y.reshape(-1, frames, *y.shape[1:])

    return sum((tap(i) for i in range(1, taps)), tap(0))


def causal_conv(params: Params, x: Frames, past: Frames | None) -> tuple[Frames, Frames]:
    """3 x 3 x 3 convolution that sees two frames back.

    `past` and the second result are those frames [B, 2, ...].
    """
    if past is None:  # only the last tap of the kernel meets something else than zeros
        zeros = jnp.zeros_like(x)
        return conv(params | {"kernel": params["kernel"][-1:]}, x), jnp.concatenate(
            [zeros, x], axis=1
        )
    x = jnp.concatenate([past, x], axis=1)
    return conv(params, x), x[:, -2:]


def norm(params: Params, x: Frames) -> Float[Array, "b _ _ _ _"]:
    """Channels of every position to root mean square `scale`, float32."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    gain = params["scale"].astype(jnp.float32) * x.shape[-1] ** 0.5
    return x / jnp.maximum(length, 1e-12) * gain[None, None, None, None]


def norm_silu(params: Params, x: Frames) -> Frames:
    return jax.nn.silu(norm(params, x)).astype(x.dtype)


def _res(params, x, past):
    past1, past2 = past or (None, None)
    h, past1 = causal_conv(params["conv1"], norm_silu(params["norm1"], x), past1)
    h, past2 = causal_conv(params["conv2"], norm_silu(params["norm2"], h), past2)
    return h + (conv(params["shortcut"], x) if "shortcut" in params else x), (past1, past2)


def _attention(params, x, past):
    """Every position sees all others of its frame; one head as wide as all channels."""
    b, t, h, w, c = x.shape
    qkv = conv(params["qkv"], norm(params["norm"], x).astype(x.dtype)).reshape(
        b * t, h * w, 1, 3 * c
    )
    # not models.attention: flash kernels end at 128 or 256 channels a head, this one has 384
    seen = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1), implementation="xla")
    return x + conv(params["proj"], seen.reshape(x.shape)), ()


def _down2d(params, x, past):
    return conv(params["conv"], x, (1, 2, 2), (0, 1)), ()


def _down3d(params, x, past):
    """Halves rows and columns, then frames: each new frame sees two, and the last one of the call
    before.
    """
    x, _ = _down2d(params, x, ())
    last = x[:, -1:]
    if past is None:  # the first frame of a video stays one frame
        return x, last
    return conv(params["time_conv"], jnp.concatenate([past, x], axis=1), (2, 1, 1)), last


def _up2d(params, x, past):
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return conv(params["conv"], x), ()


def _up3d(params, x, past):
    """Doubles frames: one convolution in time has the channels of both; then rows and columns.

    The first frame of a video stays one frame, and those after it see zeros in its place.
    """
    if past is None:
        zeros = jnp.zeros_like(x)
        return _up2d(params, x, ())[0], jnp.concatenate([zeros, zeros], axis=1)
    seen = jnp.concatenate([past, x], axis=1)
    b, t, h, w, c = x.shape
    pairs = conv(params["time_conv"], seen).reshape(b, t, h, w, 2, c)
    x = jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, h, w, c)
    return _up2d(params, x, ())[0], seen[:, -2:]


_RUN = {
    "conv": causal_conv,
    "res": _res,
    "attention": _attention,
    "down2d": _down2d,
    "down3d": _down3d,
    "up2d": _up2d,
    "up3d": _up3d,
}
