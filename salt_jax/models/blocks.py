"""The parts of the transformer, as Flax Linen modules without state: attention, block, text, time,
head.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from salt_jax.models.attention import attention
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.rope import Angles, rotate
from salt_jax.models.visibility import QueryGroup
from salt_jax.types import Params

P = ParamSpec("P")
T = TypeVar("T")


def dense(features, dtype, name, init=None):
    return nn.Dense(
        features, dtype=dtype, kernel_init=init or nn.initializers.xavier_uniform(), name=name
    )


def apply(module: Callable[P, T], params: Params, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a Flax module makes of its arguments with these parameters."""
    assert isinstance(module, nn.Module)
    return cast(T, module.apply({"params": params}, *args, **kwargs))


def rows(layer, x, compute: Compute):
    """Applies a layer to `x` as a matrix of rows: XLA's CPU backend halves the backward pass of
    products that way.

    Tokens that are cut stay in their axes: a matrix of them could not be cut alike.
    """
    if compute.mesh is not None and compute.mesh.shape["context"] > 1:
        return layer(x)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def layer_norm(x, eps):
    """LayerNorm without parameters, in float32."""
    return apply(
        nn.LayerNorm(epsilon=eps, use_bias=False, use_scale=False, use_fast_variance=False), {}, x
    )


class Context(NamedTuple):
    """What cross attention makes keys and values of, [B, T, D] each; `image` is None for text to
    video.
    """

    text: Float[Array, "b t d"]
    image: Float[Array, "b n d"] | None = None


class CrossKV(NamedTuple):
    """What cross attention reads, in every layer or, inside of one, in that: the same for all calls
    under one prompt.
    """

    k: Float[Array, "*layers b t a d"]
    v: Float[Array, "*layers b t a d"]
    k_image: Float[Array, "*layers b n a d"] | None = None
    v_image: Float[Array, "*layers b n a d"] | None = None


class Attention(nn.Module):
    """The projections around attention; RMS over the full width before the heads are split."""

    config: WanConfig
    compute: Compute
    # cross attention of image-to-video models: also over the image, with the same queries
    image: bool = False

    def setup(self):
        c = self.config
        dtype = self.compute.dtype
        self.q, self.k, self.v, self.o = (dense(c.dim, dtype, None) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(epsilon=c.eps, dtype=dtype) for _ in range(2))
        if self.image:
            self.k_img, self.v_img = (dense(c.dim, dtype, None) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(epsilon=c.eps, dtype=dtype)

    def _heads(self, z):
        return z.reshape(*z.shape[:-1], self.config.num_heads, -1)

    def _rows(self, layer, x):
        return rows(layer, x, self.compute)

    def queries(self, x):
        return self._heads(self.norm_q(self._rows(self.q, x)))

    def keys_values(self, context):
        return self._heads(self.norm_k(self._rows(self.k, context))), self._heads(
            self._rows(self.v, context)
        )

    def read(self, context: Context) -> CrossKV:
        if not self.image:
            return CrossKV(*self.keys_values(context.text))
        k, v = (
            self.norm_k_img(self._rows(self.k_img, context.image)),
            self._rows(self.v_img, context.image),
        )
        return CrossKV(*self.keys_values(context.text), self._heads(k), self._heads(v))

    def cross(self, x, seen: CrossKV):
        """Two softmaxes, summed before the one projection out."""
        q, c = self.queries(x), self.compute
        z = look(q, seen.k, seen.v, None, c)
        return self.output(z + look(q, seen.k_image, seen.v_image, None, c) if self.image else z)

    def output(self, z):
        return self._rows(self.o, z.reshape(*z.shape[:-2], -1))


def look(q, k, v, length, compute: Compute):
    """Attention of frames to frames; with a length for each frame of `q` in a loop, so that one
    kernel is compiled.
    """
    attend = partial(attention, k=k, v=v, kernel=compute.kernel, mesh=compute.mesh)
    if length is None or not length.ndim:
        return attend(q, length=length)

    def one(frame):
        q, length = frame
        return attend(q[:, None], length=length)

    by_frame = jax.lax.map(one, (jnp.moveaxis(q, 1, 0), length))
    return jnp.moveaxis(by_frame[:, :, 0], 0, 1)


def chunked_attention(
    q, k, v, memory, groups: tuple[tuple[QueryGroup, Angles, Angles], ...], compute: Compute
):
    """Self attention of new frames, [B, F, S, A, d] each, with `memory` (keys, values)
    [B, M, S, A, d] or None.

    One dense call for each group, given with the angles of its queries and of its keys.
    """
    outputs, (old_k, old_v) = [], memory or (None, None)
    for group, here, there in groups:
        keys, values = _seen(group, k, old_k), _seen(group, v, old_v)
        mine, keys = rotate(q[:, group.queries], here), rotate(keys, there)
        length = None if group.length is None else group.length * q.shape[2]
        outputs.append(look(mine, keys, values, length, compute))
    return jnp.concatenate(outputs, axis=1)


def straight_through(old, new, start: int):
    """Frames of a memory as they are, which pass gradient to `new`, those from slot `start` on."""
    live = new - jax.lax.stop_gradient(new)
    return old.at[:, start : start + new.shape[1]].add(live.astype(old.dtype))


def _seen(group: QueryGroup, new, old):
    """Keys or values of the new frames and of the memory's that a group sees."""
    parts = [new[:, s] for s in group.own] + [old[:, s] for s in group.past]
    return jnp.concatenate(parts, axis=1)


class Block(nn.Module):
    """One transformer block on tokens [B, F, S, D]; `e0` is [B, 1 or F, 6, D], one row per frame or
    for all.

    Returns the tokens, and the keys and values of their frames.
    """

    config: WanConfig
    compute: Compute
    live_from: int | None = None  # see `visibility.AttentionPlan`

    @nn.compact
    def __call__(self, x, e0, text, groups, memory=None):
        c, compute = self.config, self.compute
        modulation = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (6, c.dim))
        # six of [B, 1 or F, 1, 1, D]
        m = jnp.split((e0 + modulation[None, None])[:, :, None], 6, axis=3)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (z[:, :, :, 0] for z in m)

        def modulated(x, scale, shift):
            # Fused into the product behind it, a scale per frame makes the TPU compiler abort.
            h = (layer_norm(x, c.eps) * (1 + scale) + shift).astype(compute.dtype)
            return jax.lax.optimization_barrier(h)

        h = modulated(x, scale_sa, shift_sa)
        to_self = Attention(c, compute, name="self_attn")
        q, (k, v) = to_self.queries(h), to_self.keys_values(h)
        if self.live_from is not None:
            assert memory is not None
            old_k, old_v = memory
            memory = (
                straight_through(old_k, k, self.live_from),
                straight_through(old_v, v, self.live_from),
            )
        seen = to_self.output(chunked_attention(q, k, v, memory, groups, compute))
        x = x + gate_sa * seen.astype(jnp.float32)

        h = nn.LayerNorm(epsilon=c.eps, use_fast_variance=False, name="norm_cross")(x)
        to_text = Attention(c, compute, bool(c.image_dim), name="cross_attn")
        read = to_text.cross(h, text if isinstance(text, CrossKV) else to_text.read(text))
        x = x + read.astype(jnp.float32)

        h = modulated(x, scale_ff, shift_ff)
        h = nn.gelu(rows(dense(c.ffn_dim, compute.dtype, "ffn_in"), h, compute), approximate=True)
        h = rows(dense(c.dim, compute.dtype, "ffn_out"), h, compute)
        return x + gate_ff * h.astype(jnp.float32), (k, v)


class TextMLP(nn.Module):
    """Text rows [B, T, text_dim] -> [B, T, D]."""

    config: WanConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, text):
        init = nn.initializers.normal(0.02)
        h = nn.gelu(dense(self.config.dim, self.dtype, "in", init)(text), approximate=True)
        return dense(self.config.dim, self.dtype, "out", init)(h)


class ImageMLP(nn.Module):
    """Features of the image encoder, [B, N, image_dim] -> [B, N, D]."""

    config: WanConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image):
        c = self.config
        norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
        h = dense(c.image_dim, self.dtype, "in")(norm(name="norm_in")(image))
        return norm(name="norm_out")(dense(c.dim, self.dtype, "out")(nn.gelu(h, approximate=False)))


def cos_sin(timestep: Float[Array, "*b"], count: int) -> tuple[Array, Array]:
    """Cosines and sines, [*b, count] each, of timestep * 10000^(-k / count), to the last bits of
    float32.

    An angle of up to 1000, rounded to float32, is off by 3e-5, and its cosine by as much; the peers
    take float64. Here the timestep and the frequencies are each split into a part of 12 bits, whose
    product is exact, and a small rest.
    """
    frequency = 10_000.0 ** (-np.arange(count) / count)
    mantissa, exponent = np.frexp(frequency)
    coarse = np.ldexp(np.round(mantissa * 4096) / 4096, exponent)
    across = (*(1,) * timestep.ndim, count)
    parts = (coarse, frequency - coarse, frequency)
    coarse, rest, whole = (np.float32(part).reshape(across) for part in parts)
    timestep = timestep[..., None]
    quarters = jnp.round(4.0 * timestep) / 4.0
    large = quarters * coarse
    small = quarters * rest + (timestep - quarters) * whole
    (c, s), (dc, ds) = ((jnp.cos(a), jnp.sin(a)) for a in (large, small))
    return c * dc - s * ds, s * dc + c * ds


class TimeMLP(nn.Module):
    """Timestep in [0, 1000], [...] -> (e [..., D], e0 [..., 6, D]), float32."""

    config: WanConfig

    @nn.compact
    def __call__(self, timestep):
        c, init = self.config, nn.initializers.normal(0.02)
        h = jnp.concatenate(cos_sin(timestep, c.freq_dim // 2), axis=-1)
        e = dense(c.dim, jnp.float32, "out", init)(
            nn.silu(dense(c.dim, jnp.float32, "in", init)(h))
        )
        e0 = dense(6 * c.dim, jnp.float32, "projection")(nn.silu(e))
        return e, e0.reshape(*e0.shape[:-1], 6, c.dim)


class Head(nn.Module):
    """Tokens [B, F, S, D] and e [B, 1 or F, D] -> patches [B, F, S, pt ph pw C], float32."""

    config: WanConfig

    @nn.compact
    def __call__(self, x, e):
        c = self.config
        modulation = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (2, c.dim))
        m = e[:, :, None] + modulation[None, None]  # [B, 1 or F, 2, D]
        x = layer_norm(x, c.eps) * (1 + m[:, :, None, 1]) + m[:, :, None, 0]
        pt, ph, pw = c.patch_size
        return dense(pt * ph * pw * c.out_channels, jnp.float32, "linear", nn.initializers.zeros)(x)
