"""The Wan 2.1 diffusion transformer, in Flax Linen leaves under our own layer loop.

Parameters are a plain nested dict. The blocks are stacked on a leading layer axis and scanned, so
compile time does not grow with depth. The network maps (x, timestep, text) to a
velocity = noise - x0:

    tokens = patchify(x);  e = time MLP(sinusoid(timestep));  e0 = Linear(SiLU(e)) in R^{6 x D}
    block:  h = LN(x) (1 + scale_sa) + shift_sa;   x += gate_sa SelfAttention(h)    (RoPE, RMS q/k)
            x += CrossAttention(LN_affine(x), text, image)                          (no gate)
            h = LN(x) (1 + scale_ff) + shift_ff;   x += gate_ff FFN(h)              (GELU tanh)
    head:   velocity = unpatchify(Linear(LN(x) (1 + scale) + shift)), modulated by e, not e0

Matrix products run in `Compute.dtype`; the time path, modulation, norms, RoPE and the residual
stream stay in float32, as in the official code. Text padding is zeros before the text MLP and is
attended to, unmasked. Image to video models also attend to features of the image, and read its
latent as channels behind the noisy one.

The same network works chunk by chunk: an `AttentionPlan` (models.visibility) says which frames
see which, where they are in time, and brings the keys and values of finished frames. `apply_wan`
reads; `keys_values` makes what a cache stores; `cross_keys_values` does the text's part once for
all calls under one prompt.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from salt_jax.models.blocks import (
    Attention,
    Block,
    Context,
    CrossKV,
    Head,
    ImageMLP,
    TextMLP,
    TimeMLP,
    apply,
    dense,
)
from salt_jax.models.layout import BATCH, TOKENS, lay, lay_cache
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.remat import recomputed
from salt_jax.models.rope import rope_angles
from salt_jax.models.visibility import AttentionPlan, KeysValues, plan_whole_clip
from salt_jax.types import Conditioning, Latent, Params, PRNGKey, Sigma


def init_wan(key: PRNGKey, config: WanConfig) -> Params:
    """Fresh parameters, float32, initialised as the official code does
    (the head starts at zero).
    """
    k_patch, k_text, k_time, k_head, k_blocks = jax.random.split(key, 5)
    k_image = jax.random.fold_in(key, 5)
    c, f32 = config, jnp.float32
    pt, ph, pw = c.patch_size
    x, row = jnp.zeros((1, 1, 1, c.dim)), jnp.zeros((1, 1, c.dim))
    context = Context(row, row if c.image_dim else None)
    e0, groups = jnp.zeros((1, 1, 6, c.dim)), _with_angles(plan_whole_clip(1), 1, 1, c)

    def block(key):
        return Block(c, Compute()).init(key, x, e0, context, groups)["params"]

    patch = jnp.zeros((1, pt * ph * pw * c.in_channels))
    image = ImageMLP(c, f32).init(k_image, jnp.zeros((1, 1, c.image_dim))) if c.image_dim else None
    return ({"image_embedding": image["params"]} if image else {}) | {
        "patch_embedding": dense(c.dim, f32, None).init(k_patch, patch)["params"],
        "text_embedding": TextMLP(c, f32).init(k_text, jnp.zeros((1, 1, c.text_dim)))["params"],
        "time_embedding": TimeMLP(c).init(k_time, jnp.zeros((1, 1)))["params"],
        "blocks": jax.vmap(block)(jax.random.split(k_blocks, c.num_layers)),
        "head": Head(c).init(k_head, x, jnp.zeros((1, 1, c.dim)))["params"],
    }


class Inputs(NamedTuple):
    """What one evaluation sees."""

    # [B, F, H, W, in_channels], noisy latents, and behind them position channels or the condition
    # of image to video; F, H, W are multiples of the patch size
    x: Latent
    timestep: Sigma  # 1000 sigma, [B] for the whole clip or [B, F] for each (patched) frame
    # text of at most `text_length` rows, shorter text is padded with zero rows; or from
    # `cross_keys_values`
    cond: Conditioning | CrossKV
    plan: AttentionPlan | None = None  # None: every frame of `x` sees every frame of `x`


def apply_wan(
    params: Params, inputs: Inputs, config: WanConfig, compute: Compute
) -> Float[Array, "b f h w out"]:
    """The velocity at `inputs.x`, float32 [B, F, H, W, out_channels].

    Args:
      params: from `init_wan`.
      config, compute: static.

    Raises:
      ValueError: the latent does not split into patches, or the text is too long.
    """
    made = _run_blocks(params, inputs, config, compute, config.num_layers)
    return _velocity(params, inputs, config, made)


def _velocity(params: Params, inputs: Inputs, config: WanConfig, made: "_Made") -> Latent:
    (pt, ph, pw), (h, w) = config.patch_size, inputs.x.shape[2:4]
    out = apply(Head(config), params["head"], made.tokens, made.e)
    form = "b f (h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c"
    return rearrange(out, form, h=h // ph, w=w // pw, pt=pt, ph=ph, pw=pw)


def keys_values(params: Params, inputs: Inputs, config: WanConfig, compute: Compute) -> KeysValues:
    """The raw keys and values of the frames of `inputs.x` in every layer, [n, B, F, S, A, d]."""
    made = _run_blocks(params, inputs, config, compute, config.num_layers, keep=True)
    return _kept(made, compute)


def apply_and_keep(
    params: Params, inputs: Inputs, config: WanConfig, compute: Compute
) -> tuple[Latent, KeysValues]:
    """Both `apply_wan` and `keys_values`, of one evaluation."""
    made = _run_blocks(params, inputs, config, compute, config.num_layers, keep=True)
    return _velocity(params, inputs, config, made), _kept(made, compute)


def _kept(made: "_Made", compute: Compute) -> KeysValues:
    assert made.keys_values is not None
    return KeysValues(*(lay_cache(x, compute.mesh) for x in made.keys_values))


def features(
    params: Params, inputs: Inputs, config: WanConfig, compute: Compute, layers: int
) -> Float[Array, "b f s width"]:
    """The tokens after the first `layers` blocks, float32."""
    return _run_blocks(params, inputs, config, compute, layers).tokens


def cross_keys_values(
    params: Params, cond: Conditioning, config: WanConfig, compute: Compute
) -> CrossKV:
    """Keys and values of text and image, in every layer."""
    context = _context(params, cond, config, compute)
    to_text = Attention(config, compute, bool(config.image_dim))

    def layer(block):
        return to_text.apply({"params": block["cross_attn"]}, context, method="read")

    return jax.lax.map(layer, params["blocks"])


def _context(params: Params, cond: Conditioning, config: WanConfig, compute: Compute) -> Context:
    text, image = cond.text, cond.image
    if (image is not None) != bool(config.image_dim):
        raise ValueError(
            f"a network with image_dim={config.image_dim} got "
            f"{'no picture' if image is None else 'a picture'}"
        )
    if text.shape[1] > config.text_length:
        raise ValueError(
            f"text has {text.shape[1]} rows, the model reads at most "
            f"text_length={config.text_length}"
        )
    text = jnp.pad(text, ((0, 0), (0, config.text_length - text.shape[1]), (0, 0)))
    text = apply(TextMLP(config, compute.dtype), params["text_embedding"], text)
    text = lay(text, compute.mesh, BATCH)
    if image is not None:
        image = apply(ImageMLP(config, compute.dtype), params["image_embedding"], image)
        image = lay(image, compute.mesh, BATCH)
    return Context(text, image)


def _with_angles(plan: AttentionPlan, height: int, width: int, config: WanConfig):
    angles = partial(rope_angles, height=height, width=width, head_dim=config.head_width)
    return tuple(
        (group, angles(group.query_positions), angles(group.key_positions)) for group in plan.groups
    )


class _Made(NamedTuple):
    """What the blocks make."""

    tokens: Float[Array, "b f s d"]
    e: Float[Array, "b f d"]  # of the time MLP; F is 1 where all frames have one level
    keys_values: tuple[Array, Array] | None  # of every layer, where they are asked for


def _run_blocks(
    params: Params,
    inputs: Inputs,
    config: WanConfig,
    compute: Compute,
    layers: int,
    keep: bool = False,
) -> _Made:
    """The first `layers` blocks; keys and values are returned if `keep`."""
    c, dtype, (x, timestep, cond, plan) = config, compute.dtype, inputs
    cross = cond if isinstance(cond, CrossKV) else None
    context = _context(params, cond, c, compute) if isinstance(cond, Conditioning) else None
    pt, ph, pw = c.patch_size
    b, f, h, w = x.shape[0], x.shape[1] // pt, x.shape[2] // ph, x.shape[3] // pw
    if x.shape[1:] != (f * pt, h * ph, w * pw, c.in_channels):
        raise ValueError(
            f"latent {x.shape[1:]} does not split into {c.patch_size} patches of {c.in_channels} "
            "channels"
        )
    patches = rearrange(
        x, "b (f pt) (h ph) (w pw) c -> b f (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw
    )
    tokens = apply(dense(c.dim, dtype, None), params["patch_embedding"], patches)
    e, e0 = apply(TimeMLP(c), params["time_embedding"], timestep.reshape(b, -1).astype(jnp.float32))
    # otherwise XLA shards it like the kernel that it comes from
    e, e0 = (lay(z, compute.mesh, BATCH) for z in (e, e0))
    plan = plan or plan_whole_clip(f)
    groups = _with_angles(plan, h, w, c)

    def layer(tokens, each):
        block, cross, memory = each
        seen = context if cross is None else cross
        tokens = lay(tokens.astype(jnp.float32), compute.mesh, *TOKENS)
        tokens, kv = apply(
            Block(c, compute, plan.live_from), block, tokens, e0, seen, groups, memory
        )
        return lay(tokens, compute.mesh, *TOKENS).astype(compute.residual), kv if keep else None

    layer = recomputed(layer, compute.remat)
    each = (params["blocks"], cross, plan.memory)
    if layers < c.num_layers:
        each = jax.tree.map(lambda leaf: leaf[:layers], each)
    tokens, kv = jax.lax.scan(layer, tokens.astype(compute.residual), each)
    return _Made(tokens.astype(jnp.float32), e, kv)
