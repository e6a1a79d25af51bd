"""Accelerator memory of a run, in total and on each device, before anything is allocated.

Parameters, moments and what is frozen are counted exactly, by the shapes that a run has and the
shardings of `sharding`. Activation memory is estimated, as `transient`
and `block_bytes` say; XLA's own account of compiled updates is held against both in
tests/planning/test_memory.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.models.attention import is_flash
from salt_jax.models.attention_blocks import MOST_SCORES
from salt_jax.models.latent_size import SPACE
from salt_jax.models.layout import head_axes
from salt_jax.models.presets import Compute, Kernel, WanConfig
from salt_jax.models.vae import decode_first, init_vae
from salt_jax.planning.flops import Pairs, image_tokens
from salt_jax.planning.updates import programs
from salt_jax.sharding import WAITING, partition_spec
from salt_jax.stages import weights
from salt_jax.stages.stage import Frozen, Pass, Stage
from salt_jax.stages.weights import vae_sizes
from salt_jax.state import TrainState

F32 = 4  # bytes


class MemoryRow(NamedTuple):
    """One row of the account: bytes of one kind."""

    name: str
    count: int  # numbers in it; 0 where only bytes are known
    whole: int  # bytes of one copy, of the whole batch
    device: int  # bytes on each device


def fresh_state(stage: Stage) -> tuple[TrainState, Frozen]:
    """The state and what is frozen, from random weights: in form what a run reads and makes."""
    loaded = weights.fresh(stage)
    return stage.first_state(loaded), stage.frozen(loaded)


def tree_bytes(tree: TrainState | Frozen, mesh: Mapping[str, int]) -> dict[str, MemoryRow]:
    """Every array of a tree of shapes, by its path: its sharding decides what a device holds
    of it.
    """
    rows = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = [axis for entry in partition_spec(name, leaf.shape, mesh) for axis in _axes(entry)]
        whole = leaf.size * leaf.dtype.itemsize
        rows[name] = MemoryRow(
            name, leaf.size, whole, whole // math.prod(mesh[axis] for axis in axes)
        )
    return rows


def _axes(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


FROZEN = {"student": "student's base", "critic": "critic's base", "vae": "VAE"}
FROZEN |= {"null_text": "null text"}


def kinds(stage: Stage) -> tuple[dict[str, str], dict[str, str]]:
    """Beginning of a path in the state or the frozen weights -> name of what it holds."""
    state = {}
    for name in stage.learners:
        state[f"learners/{name}/params"] = name
        state[f"learners/{name}/opt_state"] = f"{name} optimizer"
    state |= {"ema": "average of the student", "stream": "videos under way"}
    return state, {name: FROZEN.get(name, name) for name in ("teacher", "base", *FROZEN)}


def persistent(stage: Stage, mesh: Mapping[str, int]) -> list[MemoryRow]:
    """Memory in use for the whole run. What is kept on the host has no bytes on a device. Counters
    are left out.
    """
    rows = []
    trees = jax.eval_shape(partial(fresh_state, stage))
    for tree, names in zip(trees, kinds(stage), strict=True):
        leaves = tree_bytes(tree, mesh)
        for prefix, name in names.items():
            mine = [leaf for path, leaf in leaves.items() if f"{path}/".startswith(f"{prefix}/")]
            if mine:
                columns = list(zip(*mine, strict=True))[1:]
                row = MemoryRow(name, *(sum(column) for column in columns))
                waits = stage.recipe.host_state and re.search(WAITING, f"{prefix}/")
                rows.append(row._replace(device=0) if waits else row)
    return rows


def cache_bytes(c: WanConfig, frames: int, picture: tuple[int, int], itemsize: int) -> int:
    """Keys and values of a clip's frames, in all layers."""
    tokens = picture[0] * picture[1] // (c.patch_size[1] * c.patch_size[2])
    return 2 * c.num_layers * frames * tokens * c.dim * itemsize


def block_bytes(
    c: WanConfig,
    pairs: Pairs,
    per_frame: int,
    itemsize: int,
    kernel: Kernel,
    gradient: bool,
    tensor: int,
) -> int:
    """The most that one block holds at a time, for one clip.

    Forward, by token: 3 D in float32 (the residual stream and its norms), 4 D and 2 F in the
    compute type. With gradient what the block computes waits for its backward pass: 6 D in float32,
    12 D and 3 F. Chunks each gather the keys and values they see. Attention without a kernel has
    scores too, in float32, some at a time or all. As XLA's compilers for GPU and TPU assign buffers
    (docs/scaling.md). `tensor` cuts heads and F.
    """
    tokens = per_frame * sum(q for q, _ in pairs)
    seen = [per_frame * k for _, k in pairs]
    scores = [per_frame * q * k for (q, _), k in zip(pairs, seen, strict=True)]
    gathered, scored = (sum(seen), sum(scores)) if gradient else (max(seen), max(scores))
    stream, wide, ffn = (6, 12, 3) if gradient else (3, 4, 2)
    made = (
        c.num_heads * scored if kernel == "plain" else min(c.num_heads * max(scores), MOST_SCORES)
    )
    at_once = {"plain": 1 + gradient, "blocks": 2 + gradient}.get(kernel, 0) * made
    inner = tokens * (wide * c.dim + ffn * c.ffn_dim) + 2 * gathered * c.dim * (len(pairs) > 1)
    inner = inner * itemsize + at_once * F32
    return tokens * stream * c.dim * F32 + inner // tensor


def kept_bytes(
    c: WanConfig,
    pairs: Pairs,
    per_frame: int,
    itemsize: int,
    kernel: Kernel,
    compute: Compute,
    tensor: int,
) -> int:
    """What one block leaves for its backward pass, for one clip: its input, and more as
    `Compute.remat` says.

    By token: D of the input; of attention, over itself and the text, 2 D and two row sums a head;
    of products with weights 7 D and F. Exactly what jax keeps, but for the text's keys and values:
    see tests/planning/test_memory.py. Without recomputation it is about 8 D in float32, 18 D and 5
    F.
    """
    how, tokens, flash = compute.remat, per_frame * sum(q for q, _ in pairs), is_flash(kernel)
    start = 0 if how == "offload" else tokens * c.dim * np.dtype(compute.residual).itemsize
    attention = tokens * (2 * c.dim * itemsize + 2 * c.num_heads * F32)
    scores = c.num_heads * per_frame**2 * sum(q * k for q, k in pairs) * F32 + attention
    products = tokens * (7 * c.dim + c.ffn_dim) * itemsize
    gathered = 2 * per_frame * sum(k for _, k in pairs) * c.dim * (len(pairs) > 1)
    everything = (
        tokens * 8 * c.dim * F32 + (tokens * (18 * c.dim + 5 * c.ffn_dim) + gathered) * itemsize
    )
    more = {
        "save_attention": attention if flash else 0,
        "dots_no_batch": products + (attention if flash else 0),
        "dots": products + (attention if flash else scores),
        "none": everything - start + (0 if flash else 2 * scores),
    }
    return start + more.get(how, 0) // tensor


def vae_bytes(recipe: Recipe) -> int:
    """The most that `vae_window.as_first` holds at a time, for one clip: what its convolutions
    remember, before a latent and after it, and of the four frames of a latent at full resolution
    four values a channel in float32, as XLA's buffers have it (tests/planning/test_memory.py).
    """
    c, (_, height, width, channels) = vae_sizes(recipe), recipe.clip_shape
    params = jax.eval_shape(lambda: init_vae(jax.random.key(0), c))
    latent = jax.ShapeDtypeStruct((1, 1, height, width, channels), jnp.float32)
    decode = partial(decode_first, config=c, dtype=recipe.compute.dtype)
    _, cache = jax.eval_shape(decode, params, latent)
    remembered = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return 2 * remembered + 16 * F32 * c.dim * height * width * SPACE**2


def needed(stage: Stage, mesh: Mapping[str, int], kernel: Kernel) -> list[MemoryRow]:
    """All memory at the peak of a run. Arguments and errors as in `transient`."""
    rows = persistent(stage, mesh)
    return rows + transient(stage, mesh, kernel, rows)


def transient(
    stage: Stage, mesh: Mapping[str, int], kernel: Kernel, stays: Sequence[MemoryRow]
) -> list[MemoryRow]:
    """Memory that is allocated and freed during an update: an estimate of its peak, given
    `persistent`.

    The peak is in the student's update: caches, what blocks store (their inputs, and what
    `model.remat` says), what heads store (tokens and their norm, 4 D in float32) and gradients live
    while one block of some network is at work, for the clips of one micro-batch. Clips are spread
    over data x fsdp; `tensor` cuts heads and the width of the feed-forward, `context` tokens, and
    heads in a cache.

    Raises:
      UserError: the batch does not spread over the mesh.
    """
    recipe = stage.recipe
    refuse_uneven(recipe, mesh["data"] * mesh["fsdp"])
    spread = _spread(stage, mesh, kernel)
    networks = {row.name: row for row in stays}
    rows = [networks["student"]._replace(name="gradients"), *spread]
    if recipe.accumulate > 1:  # beside those of the micro-batch at work
        rows.append(networks["student"]._replace(name="gradients summed"))
    if recipe.host_state:  # fetched when activations are gone, in whose place they are
        fetched = 2 * networks["student"].device - sum(row.device for row in spread)
        rows.append(MemoryRow("moments fetched", 0, max(0, fetched), max(0, fetched)))
    # student and critic with their adapters merged, and the gradient of one of them
    if recipe.lora.rank:
        base = networks["student's base"]
        rows.append(MemoryRow("merged networks", 3 * base.count, 3 * base.whole, 3 * base.device))
    # a block's weights, in the compute type, while it works, and those of the next one
    if mesh["fsdp"] > 1:
        size = jnp.dtype(recipe.model.dtype).itemsize
        largest = max((p.network for p in _passes(stage)), key=lambda c: c.dim * c.ffn_dim)
        numbers = 8 * largest.dim**2 + 2 * largest.dim * largest.ffn_dim
        gathered = 2 * size * numbers // mesh["tensor"]
        rows.append(MemoryRow("gathered blocks", 0, gathered, gathered))
    return rows


def _spread(stage: Stage, mesh: Mapping[str, int], kernel: Kernel) -> list[MemoryRow]:
    """What is of clips, and so cut with the batch."""
    recipe, tensor = stage.recipe, mesh["tensor"]
    wan, size = recipe.wan, jnp.dtype(recipe.model.dtype).itemsize
    frames, *picture, _ = recipe.clip_shape
    per_frame = math.prod(picture) // math.prod(wan.patch_size[1:])
    work = max(
        block_bytes(p.network, p.pairs, per_frame, size, kernel, p.gradient != "none", tensor)
        for p in _passes(stage)
    )
    learns = [p.pairs for p in stage.mean_passes("student") if p.gradient == "weights"]
    pairs = max(learns, key=lambda pairs: sum(k for _, k in pairs))
    stored = kept_bytes(wan, pairs, per_frame, size, kernel, recipe.compute, tensor)
    peaks = [stage.memory(update) for update in programs(stage) if update.moves == "student"]
    cache = cache_bytes(wan, peaks[0].slots, (picture[0], picture[1]), size)
    inputs = wan.num_layers * stored
    peak = max(peaks, key=lambda m: m.caches * cache + m.forwards * inputs)
    at_once = recipe.batch_size // recipe.accumulate
    ways, context = mesh["data"] * mesh["fsdp"], mesh["context"]
    heads = math.prod(mesh[axis] for axis in head_axes(mesh, wan.num_heads) or ())
    head = 4 * frames * per_frame * wan.dim * F32
    vae = vae_bytes(recipe) if recipe.reencodes else 0
    rows = (
        ("batch", recipe.batch_size * _batch_bytes(stage), 1),
        ("caches", at_once * peak.caches * cache, heads),
        ("inputs of blocks", int(at_once * peak.forwards * inputs), context),
        ("heads of networks", int(at_once * peak.forwards * head), context),
        ("one block at work", at_once * work, context),
        # in a block's place, and not cut by context
        ("VAE at work, above it", at_once * max(0, vae - work // context), 1),
    )
    return [MemoryRow(name, 0, n, n // (ways * cut)) for name, n, cut in rows if n]


def _passes(stage: Stage) -> list[Pass]:
    return [p for learner in stage.learners for p in stage.mean_passes(learner)]


def _batch_bytes(stage: Stage) -> int:
    recipe = stage.recipe
    wan, clip = recipe.wan, math.prod(recipe.clip_shape)
    videos = ("video" in stage.needs) + (
        recipe.schedule.train_levels + 1 if "states" in stage.needs else 0
    )
    text = wan.text_length * (1 if "tokens" in stage.needs else wan.text_dim)
    image = image_tokens(wan) * wan.image_dim + clip // wan.out_channels * wan.condition_channels
    return F32 * (clip * videos + text + bool(wan.image_dim) * image)
