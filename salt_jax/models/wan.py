"""The Wan 2.1 diffusion transformer (text to video), in Flax Linen leaves under our own layer loop.

Parameters are a plain nested dict. The blocks are stacked on a leading layer axis and scanned, so compile
time does not grow with depth. The network maps (x, timestep, text) to a velocity = noise - x0:

    tokens = patchify(x);  e = time MLP(sinusoid(timestep));  e0 = Linear(SiLU(e)) in R^{6 x D}
    block:  h = LN(x) (1 + scale_sa) + shift_sa;   x += gate_sa SelfAttention(h)      (RoPE, RMS q/k)
            x += CrossAttention(LN_affine(x), text)                                   (no gate)
            h = LN(x) (1 + scale_ff) + shift_ff;   x += gate_ff FFN(h)                (GELU tanh)
    head:   velocity = unpatchify(Linear(LN(x) (1 + scale) + shift)), modulated by e, not e0

Matrix products run in `Compute.dtype`; the time path, modulation, norms, RoPE and the residual stream stay
in float32, as in the official code. Text padding is zeros before the text MLP and is attended to, unmasked.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from salt_jax.models.attention import attention
from salt_jax.models.rope import rope_angles, rotate
from salt_jax.types import Latent, Params, PRNGKey, Sigma, TextEmb


@dataclass(frozen=True)
class WanConfig:
    """Architecture. Widths in features, lengths in tokens."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]  # frames, rows, columns of latent per token
    text_dim: int
    text_length: int  # rows of text that cross attention sees, padding included
    freq_dim: int  # width of the sinusoidal time embedding
    eps: float

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim={self.dim} must split into num_heads={self.num_heads} heads of even width")


def _wan(dim, heads, layers, ffn):
    return WanConfig(dim, heads, layers, ffn, 16, 16, (1, 2, 2), 4096, 512, 256, 1e-6)


PRESETS = {
    # Moving Shapes: few wide tokens (6 x 6 pixels each) learn shape in minutes on two cores. 3 channels of colour and
    # 16 of position in, see models.denoiser.
    "tiny": WanConfig(192, 4, 4, 768, 19, 3, (1, 6, 6), 64, 32, 64, 1e-6),
    "small": WanConfig(384, 6, 8, 1536, 19, 3, (1, 4, 4), 64, 80, 128, 1e-6),
    "wan2.1-t2v-1.3b": _wan(1536, 12, 30, 8960),
    "wan2.1-t2v-14b": _wan(5120, 40, 40, 13824),
}


@dataclass(frozen=True)
class Compute:
    """How to run the network, which changes speed and rounding but not the function."""

    dtype: Any = jnp.float32  # of matrix products
    remat: bool = False  # recompute each block in the backward pass


def _dense(features, dtype, name, init=None):
    return nn.Dense(features, dtype=dtype, kernel_init=init or nn.initializers.xavier_uniform(), name=name)


def _apply(module: nn.Module, params: Params, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _rows(layer, x):
    """Applies a layer to `x` as a matrix of rows: XLA's CPU backend halves the backward pass of products that way."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _layer_norm(x, eps):
    """LayerNorm without parameters, in float32."""
    return _apply(nn.LayerNorm(epsilon=eps, use_bias=False, use_scale=False, use_fast_variance=False), {}, x)


class Attention(nn.Module):
    """Queries from `x`, keys and values from `context`; RMS over the full width before the heads are split."""

    config: WanConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, context, angles=None):
        c = self.config
        norm = lambda name, z: nn.RMSNorm(epsilon=c.eps, dtype=self.dtype, name=name)(z)
        q = norm("norm_q", _rows(_dense(c.dim, self.dtype, "q"), x))
        k = norm("norm_k", _rows(_dense(c.dim, self.dtype, "k"), context))
        v = _rows(_dense(c.dim, self.dtype, "v"), context)
        q, k, v = (z.reshape(*z.shape[:2], c.num_heads, c.dim // c.num_heads) for z in (q, k, v))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = attention(q, k, v)
        return _rows(_dense(c.dim, self.dtype, "o"), out.reshape(x.shape))


class Block(nn.Module):
    """One transformer block on tokens [B, F, S, D]; `e0` is [B, 1 or F, 6, D], one row per frame or for all."""

    config: WanConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, e0, text, angles):
        c = self.config
        flat = lambda z: rearrange(z, "b f s d -> b (f s) d")
        tokens = lambda z: z.reshape(x.shape).astype(jnp.float32)
        modulation = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (6, c.dim))
        m = jnp.split((e0 + modulation[None, None])[:, :, None], 6, axis=3)  # six of [B, 1 or F, 1, 1, D]
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (z[:, :, :, 0] for z in m)

        h = flat(_layer_norm(x, c.eps) * (1 + scale_sa) + shift_sa)
        x = x + gate_sa * tokens(Attention(c, self.dtype, name="self_attn")(h, h, angles))

        h = flat(nn.LayerNorm(epsilon=c.eps, use_fast_variance=False, name="norm_cross")(x))
        x = x + tokens(Attention(c, self.dtype, name="cross_attn")(h, text))

        h = flat(_layer_norm(x, c.eps) * (1 + scale_ff) + shift_ff)
        h = nn.gelu(_rows(_dense(c.ffn_dim, self.dtype, "ffn_in"), h), approximate=True)
        return x + gate_ff * tokens(_rows(_dense(c.dim, self.dtype, "ffn_out"), h))


class TextMLP(nn.Module):
    """Text rows [B, T, text_dim] -> [B, T, D]."""

    config: WanConfig
    dtype: Any

    @nn.compact
    def __call__(self, text):
        init = nn.initializers.normal(0.02)
        h = nn.gelu(_dense(self.config.dim, self.dtype, "in", init)(text), approximate=True)
        return _dense(self.config.dim, self.dtype, "out", init)(h)


class TimeMLP(nn.Module):
    """Timestep in [0, 1000], [...] -> (e [..., D], e0 [..., 6, D]), float32."""

    config: WanConfig

    @nn.compact
    def __call__(self, timestep):
        c, init = self.config, nn.initializers.normal(0.02)
        half = c.freq_dim // 2
        angles = jnp.einsum("...,k->...k", timestep, 10_000.0 ** (-jnp.arange(half) / half))
        h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        e = _dense(c.dim, jnp.float32, "out", init)(nn.silu(_dense(c.dim, jnp.float32, "in", init)(h)))
        e0 = _dense(6 * c.dim, jnp.float32, "projection")(nn.silu(e))
        return e, e0.reshape(*e0.shape[:-1], 6, c.dim)


class Head(nn.Module):
    """Tokens [B, F, S, D] and e [B, 1 or F, D] -> patches [B, F, S, pt ph pw C], float32."""

    config: WanConfig

    @nn.compact
    def __call__(self, x, e):
        c = self.config
        modulation = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (2, c.dim))
        m = e[:, :, None] + modulation[None, None]  # [B, 1 or F, 2, D]
        x = _layer_norm(x, c.eps) * (1 + m[:, :, None, 1]) + m[:, :, None, 0]
        pt, ph, pw = c.patch_size
        return _dense(pt * ph * pw * c.out_channels, jnp.float32, "linear", nn.initializers.zeros)(x)


def init_wan(key: PRNGKey, config: WanConfig) -> Params:
    """Fresh parameters, float32, initialised as the official code does (the head starts at zero)."""
    k_patch, k_text, k_time, k_head, k_blocks = jax.random.split(key, 5)
    c, f32 = config, jnp.float32
    pt, ph, pw = c.patch_size
    x, text = jnp.zeros((1, 1, 1, c.dim)), jnp.zeros((1, 1, c.dim))
    e0, angles = jnp.zeros((1, 1, 6, c.dim)), jnp.zeros((1, c.dim // c.num_heads // 2))
    block = lambda key: Block(c, f32).init(key, x, e0, text, angles)["params"]
    patch = jnp.zeros((1, pt * ph * pw * c.in_channels))
    return {
        "patch_embedding": _dense(c.dim, f32, None).init(k_patch, patch)["params"],
        "text_embedding": TextMLP(c, f32).init(k_text, jnp.zeros((1, 1, c.text_dim)))["params"],
        "time_embedding": TimeMLP(c).init(k_time, jnp.zeros((1, 1)))["params"],
        "blocks": jax.vmap(block)(jax.random.split(k_blocks, c.num_layers)),
        "head": Head(c).init(k_head, x, jnp.zeros((1, 1, c.dim)))["params"],
    }


def apply_wan(
    params: Params, x: Latent, timestep: Sigma, text: TextEmb, config: WanConfig, compute: Compute
) -> Float[Array, "b f h w out"]:
    """The velocity at `x`, float32 [B, F, H, W, out_channels].

    Args:
      params: from `init_wan`.
      x: noisy latents; F, H, W must be multiples of the patch size.
      timestep: 1000 sigma, [B] for the whole clip or [B, F] for each (patched) frame.
      text: at most `text_length` rows; shorter text is padded with zero rows.
      config, compute: static.

    Raises:
      ValueError: the latent does not split into patches, or the text is too long.
    """
    c, dtype = config, compute.dtype
    pt, ph, pw = c.patch_size
    b, f, h, w = x.shape[0], x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw
    if x.shape[1:] != (f * pt, h * ph, w * pw, c.in_channels):
        raise ValueError(
            f"latent {x.shape[1:]} does not split into {c.patch_size} patches of {c.in_channels} channels"
        )
    if text.shape[1] > c.text_length:
        raise ValueError(
            f"text has {text.shape[1]} rows, the model reads at most text_length={c.text_length}"
        )

    patches = rearrange(x, "b (f pt) (h ph) (w pw) c -> b f (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    tokens = _apply(_dense(c.dim, dtype, None), params["patch_embedding"], patches)
    text = jnp.pad(text, ((0, 0), (0, c.text_length - text.shape[1]), (0, 0)))
    text = _apply(TextMLP(c, dtype), params["text_embedding"], text)
    per_frame = timestep.reshape(b, -1).astype(jnp.float32)  # [B, 1 or F]
    e, e0 = _apply(TimeMLP(c), params["time_embedding"], per_frame)
    angles = rope_angles(f, h, w, c.dim // c.num_heads).reshape(f * h * w, -1)

    def layer(tokens, block):
        return _apply(Block(c, dtype), block, tokens, e0, text, jnp.asarray(angles)), None

    if compute.remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    tokens, _ = jax.lax.scan(layer, tokens.astype(jnp.float32), params["blocks"])
    out = _apply(Head(c), params["head"], tokens, e)
    return rearrange(out, "b f (h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c", h=h, w=w, pt=pt, ph=ph, pw=pw)
