"""From a recipe to what a run is made of: weights, captions as the networks read them, teacher, and
first state.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.config.schema import Recipe
from salt_jax.data.latents import open_records
from salt_jax.errors import UserError
from salt_jax.io.tokenizer import byte_tokenize
from salt_jax.models.attention import choose_kernel, is_flash
from salt_jax.models.denoiser import Network, guided, wan_network
from salt_jax.models.layout import platform_of
from salt_jax.models.lora import init_lora
from salt_jax.models.presets import Kernel, WanConfig
from salt_jax.models.text_encoder import encode_text
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.exact import closed_form_denoiser, closed_form_params
from salt_jax.sharding import state_shardings
from salt_jax.state import Stream, TrainState, init_learner, init_state
from salt_jax.train.optimizer import make_optimizer
from salt_jax.train.roles import refuse_roles
from salt_jax.train.start import in_dtype, initial_weights, student_start, teacher_weights
from salt_jax.train.step import Networks
from salt_jax.types import Params

_encode = jax.jit(encode_text, static_argnums=2)


class Setup(NamedTuple):
    """What a run starts from."""

    state: TrainState  # its form and layout, jax.ShapeDtypeStruct each
    fresh: Callable[[], TrainState] | None  # makes the first one, once; None after that
    frozen: dict[str, Params]
    networks: Networks
    encode_caption: Callable[
        [str], np.ndarray
    ]  # how a caption enters a batch; pure numpy, safe in a loader thread
    # of encoded videos or prompts, which bring their text's embedding
    records: Sequence | None = None


def tokenize(recipe: Recipe, caption: str) -> np.ndarray:
    """A caption as int32 [T]. Raises UserError if it is too long."""
    try:
        return byte_tokenize(caption, recipe.wan.text_length)
    except ValueError as error:
        raise UserError(
            f"{error}; shorten it, or choose a config.model.preset that reads more text"
        ) from error


def embed(recipe: Recipe, text_encoder: Params, captions: Sequence[str]) -> np.ndarray:
    """Captions as float32 [N, T, D], by the frozen text encoder."""
    tokens = np.stack([tokenize(recipe, c) for c in captions])
    return np.asarray(_encode(text_encoder, jnp.asarray(tokens), recipe.text))


def closed_form(recipe: Recipe, encode: Callable[[Sequence[str]], np.ndarray]) -> Params:
    """All clips of the world by caption, for the closed-form denoiser.

    Raises:
      UserError: the pair world, whose clips are too many.
    """
    world = recipe.world
    if world.pair:
        raise UserError(
            "config.world.pair has too many clips for the closed form; set "
            "config.teacher.kind=network"
        )
    clips = [
        [shapes.to_latent(shapes.render(s, m, world)) for m in shapes.modes(world)]
        for s in shapes.scenes(world)
    ]
    return closed_form_params(
        np.array(clips), encode([shapes.caption(s) for s in shapes.scenes(world)])
    )


def read_texts(
    recipe: Recipe, weights: Params
) -> tuple[dict[str, np.ndarray], jax.Array, Sequence | None]:
    """Embeddings of all captions of the world, the null text [1, T, D], and the records that bring
    their own.

    Raises:
      UserError: there are no encoded records, or not what the stage and the network read.
    """
    if recipe.data.kind == "moving_shapes":
        captions = ["", *map(shapes.caption, shapes.scenes(recipe.world))]
        table = dict(zip(captions, embed(recipe, weights["text_encoder"], captions), strict=True))
        return table, jnp.asarray(table[""][None]), None
    directory = recipe.data.dir
    records, null_text, _ = open_records(directory, recipe.clip_shape, recipe.wan.text_length)
    there, width = set(records[0]), null_text.shape[1]
    if width != recipe.wan.text_dim:
        raise UserError(
            f"the texts in {directory} have rows of {width}, {recipe.model.preset} reads rows of "
            f"{recipe.wan.text_dim}; encode with the text encoder of its weights"
        )
    if recipe.wan.image_dim and not {"image", "condition"} <= there:
        raise UserError(
            f"{directory} was encoded without pictures, which {recipe.model.preset} reads; encode "
            "it with --image"
        )
    if "video" not in there and not (recipe.stage == "distil" and recipe.video == "rollout"):
        raise UserError(
            f"{directory} has prompts alone, and this run reads videos; encode videos, or set "
            "config.video=rollout"
        )
    return {}, jnp.asarray(null_text[None]), records


def setup(recipe: Recipe, mesh: Mesh) -> Setup:
    """Everything a run starts from, for any stage.

    Raises:
      UserError: weights, data or the stage before do not fit, or the closed form has too many
        clips.
    """
    refuse_roles(recipe)
    weights = initial_weights(recipe, mesh)
    tokens = functools.partial(tokenize, recipe)
    network = make_network(recipe, mesh)
    student_tx = make_optimizer(recipe.student_optimizer, recipe.iterations)
    alone = lambda p: init_state(init_learner(p, student_tx), None)
    first = functools.partial(first_state, mesh=mesh, host=recipe.host_state)
    kind = recipe.teacher.kind
    if recipe.stage == "denoising":
        as_text = lambda captions: np.stack([tokens(c) for c in captions])[..., None].astype(
            np.float32
        )
        frozen = {} if kind == "data" else {"teacher": closed_form(recipe, as_text)}
        nets = Networks(network, network.denoise, closed_form_denoiser)
        return Setup(*first(alone, (weights,), frozen), frozen, nets, tokens)

    table, null_text, records = read_texts(recipe, weights)
    base = weights["wan"]
    start = student_start(recipe, base, mesh)
    if recipe.stage != "distil":
        frozen = {"teacher": in_dtype(start, recipe.teacher.dtype), "null_text": null_text}
        nets = Networks(network, network.denoise, network.denoise)
        return Setup(*first(alone, (start,), frozen), frozen, nets, table.__getitem__, records)

    if kind == "closed_form":
        encode = functools.partial(embed, recipe, weights["text_encoder"])
        frozen = {"teacher": closed_form(recipe, encode)}
    else:
        frozen = {"teacher": teacher_weights(recipe, base, mesh)}
    if (recipe.align.weight and recipe.align.network == "base") or recipe.lora.rank:
        frozen["base"] = base
    critic_tx = make_optimizer(recipe.critic_optimizer, recipe.iterations * recipe.critic_ratio)

    def make(*starts: Params) -> TrainState:
        student, critic = (
            init_learner(p, tx) for p, tx in ((starts[0], student_tx), (starts[-1], critic_tx))
        )
        return init_state(student, critic, empty_stream(recipe, network, null_text))

    starts = (start,) if start is base else (start, base)
    if recipe.lora.rank:
        frozen["student"] = start
        keys = jax.random.split(jax.random.key(recipe.seed))
        starts = tuple(
            init_lora(k, p, recipe.lora.rank) for k, p in zip(keys, (start, base), strict=True)
        )
    nets = make_networks(recipe, null_text, mesh)
    return Setup(*first(make, starts, frozen), frozen, nets, table.__getitem__, records)


def first_state(
    make: Callable[..., TrainState],
    starts: tuple[Params, ...],
    frozen: dict[str, Params],
    mesh: Mesh,
    host: bool = False,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The form of the state before the first iteration, and what makes it on the mesh.

    That works once: parameters that it starts from and that are not frozen are given up for it, so
    that there are never two copies of them.

    Args:
      make: `starts` -> state.
      host: as in `sharding.state_shardings`.
    """
    like = jax.eval_shape(make, *starts)
    shardings = state_shardings(mesh, like, host)
    stay = {id(x) for x in jax.tree.leaves(frozen)}
    free = [i for i, start in enumerate(starts) if stay.isdisjoint(map(id, jax.tree.leaves(start)))]
    fresh = jax.jit(make, out_shardings=shardings, donate_argnums=free)
    form = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(form, like, shardings), functools.partial(fresh, *starts)


def make_network(recipe: Recipe, mesh: Mesh | None, config: WanConfig | None = None) -> Network:
    """The functions of student and critic, or of a network of another size.

    On a mesh every device keeps to its share of a batch that divides. Without one it runs on the
    first device here.
    """
    c = config or recipe.wan
    compute = replace(
        recipe.compute, kernel=attention_kernel(recipe, c, platform_of(mesh)), mesh=mesh
    )
    return wan_network(c, compute, recipe.clip_shape[0], recipe.memory.chunk)


def attention_kernel(recipe: Recipe, config: WanConfig, platform: str) -> Kernel:
    """What a network's attention runs on devices of a platform."""
    asked = recipe.model.attention
    best = choose_kernel(platform, recipe.compute.dtype, config.head_width)
    return best if asked == "auto" else asked


def runs_flash(recipe: Recipe, platform: str) -> bool:
    """Whether the student's attention keeps no scores there."""
    return is_flash(attention_kernel(recipe, recipe.wan, platform))


def make_networks(recipe: Recipe, null_text: jax.Array, mesh: Mesh | None) -> Networks:
    """The functions of a distillation."""
    network, exact = make_network(recipe, mesh), recipe.teacher.kind == "closed_form"
    teacher = (
        closed_form_denoiser if exact else make_network(recipe, mesh, recipe.teacher_wan).denoise
    )
    return Networks(network, network.denoise, guided(teacher, null_text, recipe.teacher.guidance))


def empty_stream(recipe: Recipe, network: Network, null_text: jax.Array) -> Stream | None:
    """What streaming long tuning carries, before anything was made; the first update does not look
    at it.
    """
    if not recipe.stream.max_frames:
        return None
    like = jnp.zeros((recipe.batch_size, 0, *recipe.clip_shape[1:]))
    cache = network.empty_cache(like, recipe.memory.capacity(0))
    return Stream(cache, jnp.zeros((recipe.batch_size, *null_text.shape[1:])))
