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

The same network works chunk by chunk: a `Sight` (models.kv_cache) says which frames see which,
where they are in time, and brings the keys and values of frames that were finished before.
`apply_wan` reads; `keys_values` makes what a cache keeps; `text_keys_values` does the text's part
once for all calls under one prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from salt_jax.models.blocks import (
    Attention,
    Block,
    Context,
    Head,
    ImageMLP,
    TextKV,
    TextMLP,
    TimeMLP,
    apply,
    dense,
)
from salt_jax.models.kv_cache import Sight, whole_clip
from salt_jax.models.layout import BATCH, TOKENS, lay, lay_cache
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.models.remat import recomputed
from salt_jax.models.rope import rope_angles
from salt_jax.types import ImageText, Latent, Params, PRNGKey, Sigma, Told


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
    e0, views = jnp.zeros((1, 1, 6, c.dim)), _with_angles(whole_clip(1), 1, 1, c)
    block = lambda key: Block(c, Compute()).init(key, x, e0, context, views)["params"]
    patch = jnp.zeros((1, pt * ph * pw * c.in_channels))
    image = ImageMLP(c, f32).init(k_image, jnp.zeros((1, 1, c.image_dim))) if c.image_dim else None
    return ({"image_embedding": image["params"]} if image else {}) | {
        "patch_embedding": dense(c.dim, f32, None).init(k_patch, patch)["params"],
        "text_embedding": TextMLP(c, f32).init(k_text, jnp.zeros((1, 1, c.text_dim)))["params"],
        "time_embedding": TimeMLP(c).init(k_time, jnp.zeros((1, 1)))["params"],
        "blocks": jax.vmap(block)(jax.random.split(k_blocks, c.num_layers)),
        "head": Head(c).init(k_head, x, jnp.zeros((1, 1, c.dim)))["params"],
    }


def apply_wan(
    params: Params,
    x: Latent,
    timestep: Sigma,
    text: Told | TextKV,
    config: WanConfig,
    compute: Compute,
    sight: Sight | None = None,
) -> Float[Array, "b f h w out"]:
    """The velocity at `x`, float32 [B, F, H, W, out_channels].

    Args:
      params: from `init_wan`.
      x: noisy latents, and behind them the condition of image to video; F, H, W are multiples of
        the patch size.
      timestep: 1000 sigma, [B] for the whole clip or [B, F] for each (patched) frame.
      text: at most `text_length` rows, shorter text is padded with zero rows; or from
        `text_keys_values`.
      config, compute: static.
      sight: who sees whom; None: every frame of `x` sees every frame of `x`.

    Raises:
      ValueError: the latent does not split into patches, or the text is too long.
    """
    tokens, e, _ = _run_blocks(params, x, timestep, text, config, compute, sight, config.num_layers)
    (pt, ph, pw), (h, w) = config.patch_size, x.shape[2:4]
    out = apply(Head(config), params["head"], tokens, e)
    return rearrange(
        out,
        "b f (h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c",
        h=h // ph,
        w=w // pw,
        pt=pt,
        ph=ph,
        pw=pw,
    )


def keys_values(
    params: Params,
    x: Latent,
    timestep: Sigma,
    text: Told | TextKV,
    config: WanConfig,
    compute: Compute,
    sight: Sight,
) -> tuple[Float[Array, "n b f s heads each"], Float[Array, "n b f s heads each"]]:
    """The raw keys and values of the frames of `x` in every layer. Arguments as in `apply_wan`."""
    k, v = _run_blocks(
        params, x, timestep, text, config, compute, sight, config.num_layers, keep=True
    )[2]
    return lay_cache(k, compute.mesh), lay_cache(v, compute.mesh)


def features(
    params: Params,
    x: Latent,
    timestep: Sigma,
    text: Told,
    config: WanConfig,
    compute: Compute,
    layers: int,
) -> Float[Array, "b f s width"]:
    """The tokens after the first `layers` blocks, float32. Arguments as in `apply_wan`."""
    return _run_blocks(params, x, timestep, text, config, compute, None, layers)[0]


def text_keys_values(params: Params, text: Told, config: WanConfig, compute: Compute) -> TextKV:
    """The keys and values, in every layer, of what the network is told."""
    context = _context(params, text, config, compute)
    to_text = Attention(config, compute, bool(config.image_dim))
    layer = lambda block: to_text.apply({"params": block["cross_attn"]}, context, method="read")
    return jax.lax.map(layer, params["blocks"])


def _context(params, told, config, compute):
    if isinstance(told, ImageText) != bool(config.image_dim):
        raise ValueError(
            f"a network with image_dim={config.image_dim} was told {type(told).__name__}"
        )
    text, image = (told.text, told.image) if isinstance(told, ImageText) else (told, None)
    if text.shape[1] > config.text_length:
        raise ValueError(
            f"text has {text.shape[1]} rows, the model reads at most "
            f"text_length={config.text_length}"
        )
    text = jnp.pad(text, ((0, 0), (0, config.text_length - text.shape[1]), (0, 0)))
    text = lay(
        apply(TextMLP(config, compute.dtype), params["text_embedding"], text), compute.mesh, BATCH
    )
    if image is not None:
        image = apply(ImageMLP(config, compute.dtype), params["image_embedding"], image)
        image = lay(image, compute.mesh, BATCH)
    return Context(text, image)


def _with_angles(sight: Sight, height: int, width: int, config: WanConfig):
    angles = lambda positions: rope_angles(positions, height, width, config.head_width)
    return tuple(
        (view, angles(view.query_positions), angles(view.key_positions)) for view in sight.views
    )


def _run_blocks(
    params, x, timestep, text, config, compute, sight, layers, keep=False
) -> tuple[Any, Any, Any]:
    """Tokens [B, F, S, D] after the first `layers` blocks, e of the time MLP, and all keys and
    values if `keep`.
    """
    c, dtype, cached = config, compute.dtype, isinstance(text, TextKV)
    context = None if cached else _context(params, text, c, compute)
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
    # or it is cut as the kernel that it comes from
    e, e0 = (lay(z, compute.mesh, BATCH) for z in (e, e0))
    sight = sight or whole_clip(f)
    views = _with_angles(sight, h, w, c)

    def layer(tokens, each):
        block, text_kv, memory = each
        seen = context if text_kv is None else text_kv
        tokens = lay(tokens.astype(jnp.float32), compute.mesh, *TOKENS)
        tokens, kv = apply(Block(c, compute), block, tokens, e0, seen, views, memory)
        return lay(tokens, compute.mesh, *TOKENS).astype(compute.residual), kv if keep else None

    layer = recomputed(layer, compute.remat)
    each = (params["blocks"], text if cached else None, sight.memory)
    if layers < c.num_layers:
        each = jax.tree.map(lambda leaf: leaf[:layers], each)
    tokens, kv = jax.lax.scan(layer, tokens.astype(compute.residual), each)
    return tokens.astype(jnp.float32), e, kv
