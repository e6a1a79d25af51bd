"""What a run keeps in memory, in all and on each device, before anything is allocated.

Parameters, moments and what is frozen are counted exactly, by the shapes that a run has and the
shardings of `sharding`. What comes and goes during an update is a model of it, told at `passing`
and at `block_bytes`; XLA's own account of compiled updates is held against both in
tests/planning/test_memory.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_uneven
from salt_jax.models.attention import is_flash
from salt_jax.models.attention_blocks import MOST_SCORES
from salt_jax.models.layout import head_axes
from salt_jax.models.lora import init_lora
from salt_jax.models.presets import Compute, Kernel, WanConfig
from salt_jax.models.text_encoder import init_text_encoder
from salt_jax.models.wan import init_wan
from salt_jax.moving_shapes import shapes
from salt_jax.planning.flops import Pairs, chunk_pairs, going_on, image_tokens
from salt_jax.sharding import WAITING, partition_spec
from salt_jax.state import TrainState, init_learner, init_state
from salt_jax.train.optimizer import make_optimizer
from salt_jax.train.setup import empty_stream, make_network
from salt_jax.train.start import in_dtype

F32 = 4  # bytes


class Held(NamedTuple):
    """One kind of thing in memory."""

    name: str
    count: int  # numbers in it; 0 where only bytes are known
    whole: int  # bytes of one copy, of the whole batch
    device: int  # bytes on each device


def fresh_state(recipe: Recipe) -> tuple[TrainState, dict[str, Any]]:
    """The state and what is frozen, from random weights: in form what `train.setup.setup` reads and
    makes.

    A teacher of its own weights that stays as it is stored is taken to be float32.
    """
    k_base, k_other = jax.random.split(jax.random.key(recipe.seed))
    null_text = jnp.zeros((1, recipe.wan.text_length, recipe.wan.text_dim))
    student_tx = make_optimizer(recipe.student_optimizer, recipe.iterations)
    critic_tx = make_optimizer(recipe.critic_optimizer, recipe.iterations * recipe.critic_ratio)
    base, t = init_wan(k_base, recipe.wan), recipe.teacher
    if recipe.stage == "denoising":
        weights = {"wan": base, "text_encoder": init_text_encoder(k_other, recipe.text)}
        frozen = {} if t.kind == "data" else {"teacher": _closed_form(recipe, 1)}
        return init_state(init_learner(weights, student_tx), None), frozen
    if recipe.stage != "distil":
        state = init_state(init_learner(base, student_tx), None)
        return state, {"teacher": in_dtype(base, t.dtype), "null_text": null_text}
    if t.kind == "closed_form":
        teacher = _closed_form(recipe, recipe.wan.text_dim)
    elif t.weights or recipe.teacher_wan != recipe.wan:
        teacher = in_dtype(init_wan(k_other, recipe.teacher_wan), t.dtype)
    else:
        teacher = in_dtype(base, t.dtype)
    frozen = {"teacher": teacher}
    if (recipe.align.weight and recipe.align.network == "base") or recipe.lora.rank:
        frozen["base"] = base
    trained = init_lora(k_other, base, recipe.lora.rank) if recipe.lora.rank else base
    frozen |= {"student": base} if recipe.lora.rank else {}
    student, critic = (init_learner(trained, tx) for tx in (student_tx, critic_tx))
    return init_state(
        student, critic, empty_stream(recipe, make_network(recipe, None), null_text)
    ), frozen


def _closed_form(recipe: Recipe, text_dim: int) -> dict[str, Any]:
    scenes, modes = shapes.scenes(recipe.world), shapes.modes(recipe.world)
    captions = jnp.zeros((len(scenes), recipe.wan.text_length, text_dim))
    return {"clips": jnp.zeros((len(scenes), len(modes), *recipe.clip_shape)), "captions": captions}


def tree_bytes(tree: Any, mesh: Mapping[str, int]) -> dict[str, Held]:
    """Every array of a tree of shapes, by its path: its sharding decides what a device holds
    of it.
    """
    held = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = [axis for entry in partition_spec(name, leaf.shape, mesh) for axis in _axes(entry)]
        whole = leaf.size * leaf.dtype.itemsize
        held[name] = Held(name, leaf.size, whole, whole // math.prod(mesh[axis] for axis in axes))
    return held


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


KINDS = (
    ("student", "student/params"),
    ("student optimizer", "student/opt_state"),
    ("average of the student", "ema"),
    ("critic", "critic/params"),
    ("critic optimizer", "critic/opt_state"),
    ("videos under way", "stream"),
)
FROZEN = (
    ("teacher", "teacher"),
    ("base", "base"),
    ("student's base", "student"),
    ("null text", "null_text"),
)


def kept(recipe: Recipe, mesh: Mapping[str, int]) -> list[Held]:
    """What stays in memory for the whole run.

    Of what waits with the host a device has none. Counters are left out.
    """
    rows = []
    for tree, kinds in zip(
        jax.eval_shape(lambda: fresh_state(recipe)), (KINDS, FROZEN), strict=True
    ):
        leaves = tree_bytes(tree, mesh)
        for name, prefix in kinds:
            mine = [leaf for path, leaf in leaves.items() if f"{path}/".startswith(f"{prefix}/")]
            if mine:
                held = Held(name, *(sum(column) for column in list(zip(*mine, strict=True))[1:]))
                waits = recipe.host_state and re.search(WAITING, f"{prefix}/")
                rows.append(held._replace(device=0) if waits else held)
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


def needed(recipe: Recipe, mesh: Mapping[str, int], kernel: Kernel) -> list[Held]:
    """All that a run holds at its peak. Arguments and errors as in `passing`."""
    rows = kept(recipe, mesh)
    return rows + passing(recipe, mesh, kernel, rows)


def passing(
    recipe: Recipe, mesh: Mapping[str, int], kernel: Kernel, kept: Sequence[Held]
) -> list[Held]:
    """What comes and goes during an update: a model of its peak, given what is kept.

    The peak is in the student's update: caches, what blocks keep (their inputs, and what
    `model.remat` says), what heads keep (tokens and their norm, 4 D in float32) and gradients live
    while one block of some network is at work, for the clips of one micro-batch. Clips are spread
    over data x fsdp; `tensor` cuts heads and the width of the feed-forward, `context` tokens, and
    heads in a cache.

    Raises:
      UserError: the batch does not spread over the mesh.
    """
    ways, tensor, context = mesh["data"] * mesh["fsdp"], mesh["tensor"], mesh["context"]
    refuse_uneven(recipe, ways)
    wan, size, frames = recipe.wan, jnp.dtype(recipe.model.dtype).itemsize, recipe.clip_shape[0]
    per_frame = math.prod(recipe.clip_shape[1:3]) // math.prod(wan.patch_size[1:])
    block = lambda c, pairs, gradient: block_bytes(
        c, pairs, per_frame, size, kernel, gradient, tensor
    )
    student, whole = _student_pairs(recipe), [(frames, frames)]
    judged = whole if recipe.stage in ("distil", "denoising") else student
    work = max(
        block(wan, student, True), block(wan, judged, True), block(recipe.teacher_wan, whole, False)
    )
    inputs = wan.num_layers * kept_bytes(
        wan, student, per_frame, size, kernel, recipe.compute, tensor
    )
    cache = cache_bytes(wan, _slots(recipe), recipe.clip_shape[1:3], size)
    caches, passes = max(_programs(recipe), key=lambda p: p[0] * cache + p[1] * inputs)
    at_once, batch = (
        recipe.batch_size // recipe.accumulate,
        recipe.batch_size * _batch_bytes(recipe),
    )
    heads = math.prod(mesh[axis] for axis in head_axes(mesh, wan.num_heads) or ())
    rows = (
        ("batch", batch, 1),
        ("caches", at_once * caches * cache, heads),
        ("inputs of blocks", int(at_once * passes * inputs), context),
        (
            "heads of networks",
            int(at_once * passes * 4 * frames * per_frame * wan.dim * F32),
            context,
        ),
        ("one block at work", at_once * work, context),
    )
    spread = [Held(name, 0, n, n // (ways * cut)) for name, n, cut in rows if n]
    networks = {row.name: row for row in kept}
    held = [networks["student"]._replace(name="gradients"), *spread]
    if recipe.accumulate > 1:  # beside those of the micro-batch at work
        held.append(networks["student"]._replace(name="gradients summed"))
    if recipe.host_state:  # fetched when activations are gone, in whose place they are
        fetched = 2 * networks["student"].device - sum(row.device for row in spread)
        held.append(Held("moments fetched", 0, max(0, fetched), max(0, fetched)))
    # student and critic with their adapters merged, and the gradient of one of them
    if recipe.lora.rank:
        base = networks["base"]
        held.append(Held("merged networks", 3 * base.count, 3 * base.whole, 3 * base.device))
    # a block's weights, in the compute type, while it works, and those of the next one
    if mesh["fsdp"] > 1:
        largest = max((wan, recipe.teacher_wan), key=lambda c: c.dim * c.ffn_dim)
        gathered = 2 * size * (8 * largest.dim**2 + 2 * largest.dim * largest.ffn_dim) // tensor
        held.append(Held("gathered blocks", 0, gathered, gathered))
    return held


def _student_pairs(recipe: Recipe) -> Pairs:
    """How the frames of the update's differentiated forward look around."""
    frames = recipe.clip_shape[0]
    if not recipe.causal:
        return [(frames, frames)]
    new = chunk_pairs(recipe.memory, frames)
    return (
        max(new, going_on(recipe), key=lambda pairs: sum(k for _, k in pairs))
        if recipe.stream.max_frames
        else new
    )


def _programs(recipe: Recipe) -> list[tuple[int, float]]:
    """Of each program of the student's update: caches that live at once, and forwards of it with
    gradient.

    A stage before distillation has a clean pass and a noisy one, and its gradient runs through the
    cache. Cache alignment has features with gradient, and a reference, whose rolling window writes
    a new cache at each commit.
    """
    if recipe.stage != "distil":
        return [(2, 2.0) if recipe.causal else (0, 1.0)]
    caches = int(recipe.video == "rollout")
    programs = [(caches, 2.0 if recipe.loss.self_consistency else 1.0)]
    # never with self-consistency: that is at the longest K, alignment at others
    if recipe.align.weight:
        more = caches * (recipe.memory.window > 0)
        programs.append((caches + more, 1 + recipe.align.layers / recipe.wan.num_layers))
    return programs


def _slots(recipe: Recipe) -> int:
    going = recipe.memory.capacity(0) - recipe.stream.overlap if recipe.stream.max_frames else 0
    return recipe.clip_shape[0] + max(going, 0)


def _batch_bytes(recipe: Recipe) -> int:
    wan, clip = recipe.wan, math.prod(recipe.clip_shape)
    states = recipe.schedule.train_levels + 1 if recipe.stage == "ode_regression" else 0
    text = recipe.wan.text_length * (recipe.wan.text_dim if recipe.stage != "denoising" else 1)
    image = image_tokens(wan) * wan.image_dim + clip // wan.out_channels * wan.condition_channels
    return F32 * (clip * (1 + states) + text + bool(wan.image_dim) * image)
