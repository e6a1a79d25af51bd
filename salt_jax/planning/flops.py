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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from salt_jax.config.schema import Recipe
from salt_jax.flow.schedule import triples
from salt_jax.models.image_encoder import PRESETS as IMAGE_PRESETS
from salt_jax.models.kv_cache import CachePolicy
from salt_jax.models.presets import Remat, WanConfig
from salt_jax.rollout.draws import Choice, Draw, as_reference

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
    linear = lambda into, out: (into + 1) * out
    ends = linear(patch * c.in_channels, d) + linear(d, patch * c.out_channels) + 2 * d
    text = linear(c.text_dim, d) + linear(d, d)
    time = linear(c.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    image = bool(i) * (2 * i + linear(i, i) + linear(i, d) + 2 * d)
    return c.num_layers * block + ends + text + time + image


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
    frames = lambda n: n * frame // c.patch_size[0]
    context = (c.text_length, image_tokens(c))
    each = [forward_flops(c, frames(q), frames(k), *context) for q, k in pairs]
    return Work(
        sum(w.linear for w in each), sum(w.attention for w in each), each[0].context if each else 0
    )


def chunk_pairs(policy: CachePolicy, frames: int, before: int = 0) -> Pairs:
    """The next `frames` of a video that has `before` frames, chunk by chunk."""
    stops = before + np.cumsum(policy.sizes(frames, before))
    sizes = zip(policy.sizes(frames, before), stops.tolist(), strict=True)
    past = lambda start, stop: sum(s.stop - s.start for s in policy.visible(start, stop))
    return [(n, n + past(stop - n, stop)) for n, stop in sizes]


class Mix(NamedTuple):
    """How much of everything an update has: of one draw, or the mean over a run's."""

    first: float  # evaluations of a rollout's first chunk, the commit among them
    rest: float  # of each other chunk
    reference_first: float  # the same of the reference that cache alignment looks up to
    reference_rest: float
    self_consistency: float  # 1 or 0, or the share of the updates that have it
    alignment: float
    on: float  # going on with a video under way
    switch: float  # reading its cache again under another prompt


def mix_of(recipe: Recipe, choice: Choice, draw: Draw | None) -> Mix:
    """Of one update."""
    on, switch, passes = choice.sequence != "new", False, (0.0,) * 4
    if draw is not None:
        switch = on and bool(draw.switch)
        reference = as_reference(draw, recipe.rollout.first_steps)
        made = [int(e) + 2.0 for d in (draw, reference) for e in (d.first_exit, d.exit_step)]
        passes = (*made[:2], *(choice.alignment * n for n in made[2:]))
    return Mix(*passes, *map(float, (choice.self_consistency, choice.alignment, on, switch)))


def mean_mix(recipe: Recipe) -> Mix:
    """The mean over a run's draws, once cache alignment has begun: see
    `rollout.draws.draw_rollout`.
    """
    on = float(recipe.loss.self_consistency > 0)
    if recipe.stage != "distil" or recipe.video != "rollout":
        return Mix(0.0, 0.0, 0.0, 0.0, on, 0.0, 0.0, 0.0)
    r, s, m, longest = recipe.rollout, recipe.schedule, recipe.stream, max(recipe.rollout.num_steps)
    coin = recipe.align.probability if recipe.align.weight else 0.0
    drawn = list(zip(r.num_steps, r.probabilities, strict=True))
    rest = sum(p * (k + 1) / 2 for k, p in drawn) + 1
    first = (r.first_steps + 1) / 2 + 1 if r.first_steps else rest
    aligned = [(min(2 * k, longest), p * coin) for k, p in drawn if k < longest]
    exists = (triples(longest, s.anchor_levels).probability.sum(1) > 0).mean()
    at_longest = sum(p for k, p in drawn if k == longest)
    new = recipe.clip_shape[0] - m.overlap
    calls = 1 + (m.max_frames - recipe.clip_shape[0]) // new if m.max_frames else 1
    return Mix(
        first=first,
        rest=rest,
        reference_first=sum((p * ((r.first_steps or k) + 1) for k, p in aligned), 0.0),
        reference_rest=sum((p * (k + 1) for k, p in aligned), 0.0),
        self_consistency=float(on * at_longest * exists),
        alignment=sum((p for _, p in aligned), 0.0),
        on=1 - 1 / calls,
        switch=m.switch / calls if calls > 1 else 0.0,
    )


def gradient_flops(work: Work, flash: bool, weights: bool = True) -> float:
    """The backward pass of a forward; `weights`: whether the weights get a gradient, besides the
    tokens.
    """
    return (1 + weights) * (work.linear + work.context) + (2.5 if flash else 2.0) * work.attention


def remade(how: Remat, work: Work, flash: bool) -> float:
    """What of a forward the backward pass makes once more.

    Policies know attention by its flash kernels' results.
    """
    if how in ("none", "dots"):
        return 0.0
    if how == "dots_no_batch":
        return 0.0 if flash else work.attention
    return work.total - (work.attention if how == "save_attention" and flash else 0.0)


def student_flops(recipe: Recipe, mix: Mix, flash: bool) -> dict[str, float]:
    """FLOPs of one student update over the whole batch, as "network: part"."""
    if recipe.stage != "distil":
        return stage_flops(recipe, flash)
    (frames, *_), wan, picture = recipe.clip_shape, recipe.wan, recipe.clip_shape[1:3]
    video = _video(recipe, mix)
    whole = lambda config: sweep(config, picture, [(frames, frames)]).total
    teachers = 0 if recipe.teacher.kind == "closed_form" else 1 + (recipe.teacher.guidance != 1.0)
    looked = sweep(
        dataclasses.replace(wan, num_layers=recipe.align.layers), picture, [(frames, frames)]
    )
    learnt = 1 + mix.self_consistency
    parts = {
        "student: rollout": _rollout(recipe, mix, mix.first, mix.rest),
        "student: replay, forward": video.total,
        "student: replay, backward": gradient_flops(video, flash),
        "student: self-consistency, forward": mix.self_consistency * video.total,
        "student: self-consistency, backward": mix.self_consistency * gradient_flops(video, flash),
        "student: reference rollout": _rollout(
            recipe, mix, mix.reference_first, mix.reference_rest
        ),
        "student: recompute": learnt * remade(recipe.model.remat, video, flash),
        "critic: score": whole(wan),
        "teacher: score": teachers * whole(recipe.teacher_wan),
        "features: forward": 2 * mix.alignment * looked.total,
        "features: backward": mix.alignment * gradient_flops(looked, flash, weights=False),
        "features: recompute": mix.alignment * remade(recipe.model.remat, looked, flash),
    }
    return {name: recipe.batch_size * flops for name, flops in parts.items() if flops}


def critic_flops(recipe: Recipe, mix: Mix, flash: bool) -> dict[str, float]:
    """FLOPs of one critic update over the whole batch; nothing in a stage without a critic."""
    if recipe.stage != "distil":
        return {}
    frames = recipe.clip_shape[0]
    work = sweep(recipe.wan, recipe.clip_shape[1:3], [(frames, frames)])
    rollout = recipe.video == "rollout"
    parts = {
        "student: rollout": _rollout(recipe, mix, mix.first, mix.rest),
        "student: one update": 0 if rollout else _video(recipe, mix).total,
        "critic: forward": work.total,
        "critic: backward": gradient_flops(work, flash),
        "critic: recompute": remade(recipe.model.remat, work, flash),
    }
    return {name: recipe.batch_size * flops for name, flops in parts.items() if flops}


def stage_flops(recipe: Recipe, flash: bool) -> dict[str, float]:
    """FLOPs of one update of the stages in `train.stages`."""
    (frames, *_), picture, policy = recipe.clip_shape, recipe.clip_shape[1:3], recipe.memory
    if recipe.stage == "denoising":
        work = sweep(recipe.wan, picture, [(frames, frames)])
    else:  # a clean pass for the cache, and the noisy one that sees it
        work = Work(*(2 * part for part in sweep(recipe.wan, picture, chunk_pairs(policy, frames))))
    consistency = recipe.stage == "consistency"
    parts = {
        "student: forward": work.total,
        "student: backward": gradient_flops(work, flash),
        "student: recompute": remade(recipe.model.remat, work, flash),
        "ema: forward": consistency * work.total,
        "teacher: forward": consistency * 2 * work.total,
    }
    return {name: recipe.batch_size * flops for name, flops in parts.items() if flops}


def _video(recipe: Recipe, mix: Mix) -> Work:
    """The student's forward that the update is about: all chunks at their exit step, or the whole
    clip.
    """
    frames, picture, policy = recipe.clip_shape[0], recipe.clip_shape[1:3], recipe.memory
    if recipe.video == "noised":
        return sweep(recipe.wan, picture, [(frames, frames)])
    new = sweep(recipe.wan, picture, chunk_pairs(policy, frames))
    if not mix.on:
        return new
    going = sweep(recipe.wan, picture, going_on(recipe))
    return Work(*((1 - mix.on) * a + mix.on * b for a, b in zip(new, going, strict=True)))


def going_on(recipe: Recipe) -> Pairs:
    policy = recipe.memory
    return chunk_pairs(policy, recipe.clip_shape[0] - recipe.stream.overlap, policy.capacity(0))


def _rollout(recipe: Recipe, mix: Mix, first: float, rest: float) -> float:
    """A clip's chunks, each `rest` times, or `first` times the first one of a video, under one
    reading of the text.
    """
    if recipe.video != "rollout" or not first + rest:
        return 0.0
    wan, picture, policy = recipe.wan, recipe.clip_shape[1:3], recipe.memory
    start, *others = chunk_pairs(policy, recipe.clip_shape[0])
    bare = lambda pairs: sum(sweep(wan, picture, pairs)[:2])
    made = (1 - mix.on) * (first * bare([start]) + rest * bare(others))
    made += mix.on * rest * bare(going_on(recipe)) if mix.on else 0.0
    slots = policy.capacity(0)
    everything = dataclasses.replace(policy, window=0, sink=0, first=policy.chunk)
    again = (
        sweep(wan, picture, chunk_pairs(everything, slots - slots % policy.chunk))
        if mix.switch
        else None
    )
    return (
        made + sweep(wan, picture, [start]).context + (mix.switch * again.total if again else 0.0)
    )


def traced_flops(function: Callable, *args: Any, loops: int = 1) -> float:
    """FLOPs of the matrix products and convolutions of any function, read off its trace: nothing is
    compiled or run.

    A scan counts as often as it runs, which XLA's own account does not do. `loops` is how often a
    loop without a fixed number of turns goes round; of branches the dearest counts. Kernels that
    hide their products count nothing.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr, loops)


def _jaxpr_flops(jaxpr: Any, loops: int) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            total += (
                2
                * eqn.outvars[0].aval.size
                * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        elif name == "conv_general_dilated":
            kernel, layout = eqn.invars[1].aval, p["dimension_numbers"].rhs_spec
            total += 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[layout[0]]
        inner = [_jaxpr_flops(sub, loops) for sub in jaxprs_in_params(p)]
        if inner:
            times = p["length"] if name == "scan" else loops if name == "while" else 1
            total += times * (max(inner) if name == "cond" else sum(inner))
    return total
