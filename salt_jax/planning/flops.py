"""What an update costs in FLOPs, and what a network has in parameters: closed forms, nothing is
allocated.

FLOPs are those of matrix products, a multiply-add being 2. Norms, rotations, the time MLP and the
optimisers are left out. Of a cache that is still filling only the filled part counts, which is what
a kernel that knows the length computes.

    forward of n layers   tokens (12 D^2 + 4 D F) n + 4 queries keys D n
                          + cross attention + patches and head
    backward              2 x the products with weights (1 x where the weights get no gradient),
                          2.5 x attention where a flash kernel makes its scores again, else 2 x
    recompute             one more forward, less what `model.remat` keeps
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params

from salt_jax.config.schema import Recipe
from salt_jax.models.image_encoder import PRESETS as IMAGE_PRESETS
from salt_jax.models.presets import Remat, WanConfig
from salt_jax.stages.stage import Pass

Pairs = Sequence[tuple[int, int]]
"""For each chunk how many frames look, and how many they see."""


def params_count(c: WanConfig) -> int:
    """Numbers in a transformer's parameters, in closed form."""
    d, f, patch, i = c.dim, c.ffn_dim, int(np.prod(c.patch_size)), c.image_dim
    block = (
        8 * d * d
        + 8 * d
        + 4 * d
        + 2 * d * f
        + f
        + d
        + 2 * d
        + 6 * d
        + bool(i) * (2 * d * d + 3 * d)
    )
    ends = _linear(patch * c.in_channels, d) + _linear(d, patch * c.out_channels) + 2 * d
    text = _linear(c.text_dim, d) + _linear(d, d)
    time = _linear(c.freq_dim, d) + _linear(d, d) + _linear(d, 6 * d)
    image = bool(i) * (2 * i + _linear(i, i) + _linear(i, d) + 2 * d)
    return c.num_layers * block + ends + text + time + image


def _linear(into: int, out: int) -> int:
    """Numbers in a layer's kernel and bias."""
    return (into + 1) * out


class Work(NamedTuple):
    """FLOPs of one forward of one clip."""

    linear: float  # products of the tokens with weights
    attention: float
    context: float  # keys and values of text and image, which all calls under one prompt may share

    @property
    def total(self) -> float:
        return sum(self)


def forward_flops(
    c: WanConfig, query_tokens: int, key_tokens: int, text_tokens: int, image_tokens: int
) -> Work:
    """One forward of `query_tokens` that see `key_tokens`, their own among them."""
    d, n, patch = c.dim, c.num_layers, int(np.prod(c.patch_size))
    ends = 2 * query_tokens * patch * (c.in_channels + c.out_channels) * d
    linear = n * query_tokens * (12 * d * d + 4 * d * c.ffn_dim) + ends
    attention = n * 4 * query_tokens * (key_tokens + text_tokens + image_tokens) * d
    text = 2 * text_tokens * (c.text_dim * d + d * d) + n * text_tokens * 4 * d * d
    image = 2 * image_tokens * (c.image_dim**2 + c.image_dim * d) + n * image_tokens * 4 * d * d
    return Work(*map(float, (linear, attention, text + image)))


def image_tokens(c: WanConfig) -> int:
    """Rows that the image encoder of a network's width makes of a picture."""
    return next((e.num_tokens for e in IMAGE_PRESETS.values() if e.dim == c.image_dim), 0)


def sweep(c: WanConfig, picture: tuple[int, int], pairs: Pairs) -> Work:
    """Every chunk of a clip once, under one reading of the text.

    `picture` is (H, W) of the latent.
    """
    frame = picture[0] * picture[1] // (c.patch_size[1] * c.patch_size[2])
    tokens = [(q * frame // c.patch_size[0], k * frame // c.patch_size[0]) for q, k in pairs]
    context = (c.text_length, image_tokens(c))
    each = [forward_flops(c, q, k, *context) for q, k in tokens]
    return Work(
        sum(w.linear for w in each), sum(w.attention for w in each), each[0].context if each else 0
    )


def gradient_flops(work: Work, flash: bool, weights: bool = True) -> float:
    """The backward pass of a forward; `weights`: whether the weights get a gradient, besides the
    tokens.
    """
    return (1 + weights) * (work.linear + work.context) + (2.5 if flash else 2.0) * work.attention


def remade(how: Remat, work: Work, flash: bool) -> float:
    """The part of a forward that the backward pass recomputes.

    Policies know attention by its flash kernels' results.
    """
    if how in ("none", "dots"):
        return 0.0
    if how == "dots_no_batch":
        return 0.0 if flash else work.attention
    return work.total - (work.attention if how == "save_attention" and flash else 0.0)


def update_flops(recipe: Recipe, passes: Sequence[Pass], flash: bool) -> dict[str, float]:
    """FLOPs of an update over the whole batch, as "network: part".

    Args:
      passes: of `Stage.passes` or `Stage.mean_passes`.
      flash: whether attention makes its scores again for a gradient.
    """
    parts: dict[str, float] = {}

    def add(name: str, flops: float) -> None:
        parts[name] = parts.get(name, 0.0) + recipe.batch_size * flops

    for p in passes:
        work = work_of(p, recipe.clip_shape[1:3])
        network, _, part = p.name.partition(": ")
        if p.gradient == "none":
            add(p.name, work.total)
            continue
        joint = ", " if part else ": "
        add(f"{p.name}{joint}forward", work.total)
        add(f"{p.name}{joint}backward", gradient_flops(work, flash, p.gradient == "weights"))
        add(f"{network}: recompute", remade(recipe.model.remat, work, flash))
    return {name: flops for name, flops in parts.items() if flops}


def work_of(p: Pass, picture: tuple[int, int]) -> Work:
    """Of one clip; `picture` is (H, W) of the latent."""
    layers = p.network.num_layers if p.layers is None else p.layers
    once = sweep(dataclasses.replace(p.network, num_layers=layers), picture, p.pairs)
    reads = p.times if p.reads is None else p.reads
    return Work(p.times * once.linear, p.times * once.attention, reads * once.context)


def traced_flops(function: Callable[..., object], *args: object, loops: int = 1) -> float:
    """FLOPs of the matrix products and convolutions of any function, read off its trace: nothing is
    compiled or run.

    A scan counts as often as it runs, which XLA's own account does not do. `loops` is how often a
    loop without a fixed number of turns goes round; of branches the dearest counts. Kernels that
    hide their products count nothing.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr, loops)


def _jaxpr_flops(jaxpr: Jaxpr, loops: int) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            factors = math.prod(_shape(eqn.invars[0])[i] for i in contracted)
            total += 2 * math.prod(_shape(eqn.outvars[0])) * factors
        elif name == "conv_general_dilated":
            kernel, layout = _shape(eqn.invars[1]), p["dimension_numbers"].rhs_spec
            size = math.prod(kernel)
            total += 2 * math.prod(_shape(eqn.outvars[0])) * size / kernel[layout[0]]
        inner = [_jaxpr_flops(sub, loops) for sub in jaxprs_in_params(p)]
        if inner:
            times = p["length"] if name == "scan" else loops if name == "while" else 1
            total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _shape(variable) -> tuple[int, ...]:
    """Of an array in a trace."""
    return variable.aval.shape
