"""From a recipe to what a run is made of: weights, captions as the networks read them, teacher, and first state."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from salt_jax.data import shapes
from salt_jax.data.latents import open_records
from salt_jax.errors import UserError
from salt_jax.models.closed_form import closed_form_denoiser, closed_form_params
from salt_jax.models.denoiser import Network, guided, wan_network
from salt_jax.models.header import read_metadata
from salt_jax.models.lora import init_lora
from salt_jax.models.presets import WanConfig
from salt_jax.models.pretrained import WAN, Source, open_part, part_file
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.tokenizer import byte_tokenize
from salt_jax.models.wan import init_wan
from salt_jax.models.weights import load_weights
from salt_jax.train.checkpoint import restore_params
from salt_jax.train.optimizer import make_optimizer
from salt_jax.train.recipe import Recipe, from_json
from salt_jax.train.sharding import batch_sharding, state_shardings
from salt_jax.train.state import Stream, TrainState, init_learner, init_state
from salt_jax.train.step import Networks
from salt_jax.types import Params

_encode = jax.jit(encode_text, static_argnums=2)


class Setup(NamedTuple):
    """What a run starts from."""

    state: TrainState
    frozen: dict[str, Params]
    networks: Networks
    encode_caption: Callable[
        [str], np.ndarray
    ]  # how a caption enters a batch; pure numpy, safe in a loader thread
    records: Sequence | None = None  # of encoded videos or prompts, which bring their text's embedding


def initial_weights(recipe: Recipe, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """{"wan", "text_encoder"}: from the file or folder that the recipe names, or fresh, cut over the mesh.

    Of kind latents "wan" alone: the texts are embedded already. `dtype` None is as stored.

    Raises:
      UserError: what is there is absent, damaged, or of another network.
    """
    if recipe.data.kind == "latents":
        return {"wan": open_wan(recipe, recipe.weights, mesh, dtype)}
    k_wan, k_text = jax.random.split(jax.random.key(recipe.seed))

    def fresh():
        return {"wan": init_wan(k_wan, recipe.wan), "text_encoder": init_text_encoder(k_text, recipe.text)}

    like = jax.eval_shape(fresh)
    shardings = state_shardings(mesh, like)
    if not recipe.weights:
        return jax.jit(fresh, out_shardings=shardings)()
    return load_weights(recipe.weights, like, dtype, shardings)


def open_wan(recipe: Recipe, where: str, mesh: Mesh, dtype: Any) -> Params:
    """The transformer in a folder or file of launch.convert_wan; "" is a fresh one.

    Raises:
      UserError: it is absent, damaged, or of other sizes than the recipe's.
    """
    place = functools.partial(state_shardings, mesh)
    config, wan = open_part(WAN, Source(where, recipe.seed), recipe.wan, dtype, place)
    if config != recipe.wan:
        raise UserError(
            f"the weights in {where} are {config}, not {recipe.wan}; "
            "check the presets and weights of config.model and config.teacher, and config.init_from"
        )
    return wan


def teacher_weights(recipe: Recipe, base: Params, mesh: Mesh) -> Params:
    """The network that is distilled: the weights, or another one's as they are stored."""
    t = recipe.teacher
    if not t.weights and recipe.teacher_wan == recipe.wan:
        return base
    model = replace(recipe.model, preset=t.preset or recipe.model.preset)
    another = replace(recipe, weights=t.weights, model=model, seed=recipe.seed + 1)
    return initial_weights(another, mesh, None)["wan"]


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
            "config.world.pair has too many clips for the closed form; set config.teacher.kind=network"
        )
    clips = [
        [shapes.to_latent(shapes.render(s, m, world)) for m in shapes.modes(world)]
        for s in shapes.scenes(world)
    ]
    return closed_form_params(np.array(clips), encode([shapes.caption(s) for s in shapes.scenes(world)]))


def read_texts(recipe: Recipe, weights: Params) -> tuple[dict[str, np.ndarray], jax.Array, Sequence | None]:
    """Embeddings of all captions of the world, the null text [1, T, D], and the records that bring their own.

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
            f"{directory} was encoded without pictures, which {recipe.model.preset} reads; encode it with --image"
        )
    if "video" not in there and not (recipe.stage == "distil" and recipe.video == "rollout"):
        raise UserError(
            f"{directory} has prompts alone, and this run reads videos; encode videos, or set config.video=rollout"
        )
    return {}, jnp.asarray(null_text[None]), records


def setup(recipe: Recipe, mesh: Mesh) -> Setup:
    """Everything a run starts from, for any stage.

    Raises:
      UserError: weights, data or the stage before do not fit, or the closed form has too many clips.
    """
    weights = initial_weights(recipe, mesh)
    tokens = functools.partial(tokenize, recipe)
    network = make_network(recipe, mesh)
    student_tx = make_optimizer(recipe.student_optimizer, recipe.updates)
    kind = recipe.teacher.kind
    if recipe.stage == "denoising":
        as_text = lambda captions: np.stack([tokens(c) for c in captions])[..., None].astype(np.float32)
        frozen = {} if kind == "data" else {"teacher": closed_form(recipe, as_text)}
        state = init_state(init_learner(weights, student_tx), None)
        return Setup(state, frozen, Networks(network, network.denoise, closed_form_denoiser), tokens)

    table, null_text, records = read_texts(recipe, weights)
    base = weights["wan"]
    start = student_start(recipe, base, mesh)
    if recipe.stage != "distil":
        state = init_state(init_learner(start, student_tx), None)
        frozen = {"teacher": start, "null_text": null_text}
        nets = Networks(network, network.denoise, network.denoise)
        return Setup(state, frozen, nets, table.__getitem__, records)

    if kind == "closed_form":
        encode = functools.partial(embed, recipe, weights["text_encoder"])
        frozen = {"teacher": closed_form(recipe, encode)}
    else:
        frozen = {"teacher": teacher_weights(recipe, base, mesh)}
    if (recipe.align.weight and recipe.align.network == "base") or recipe.lora.rank:
        frozen["base"] = base
    student, critic = start, base
    if recipe.lora.rank:
        k_student, k_critic = jax.random.split(jax.random.key(recipe.seed))
        frozen["student"] = start
        student, critic = (
            init_lora(k, p, recipe.lora.rank) for k, p in ((k_student, start), (k_critic, base))
        )
    critic_tx = make_optimizer(recipe.critic_optimizer, recipe.updates * recipe.critic_updates)
    state = init_state(
        init_learner(student, student_tx),
        init_learner(critic, critic_tx),
        empty_stream(recipe, network, null_text),
    )
    return Setup(state, frozen, make_networks(recipe, null_text, mesh), table.__getitem__, records)


def make_network(recipe: Recipe, mesh: Mesh | None, config: WanConfig | None = None) -> Network:
    """The functions of student and critic, or of a network of another size.

    On a mesh every device keeps to its share of a batch that divides.
    """
    compute = replace(recipe.compute, tokens=batch_sharding(mesh) if mesh else None)
    return wan_network(config or recipe.wan, compute, recipe.clip_shape[0], recipe.memory.chunk)


def make_networks(recipe: Recipe, null_text: jax.Array, mesh: Mesh | None) -> Networks:
    """The functions of a distillation."""
    network, exact = make_network(recipe, mesh), recipe.teacher.kind == "closed_form"
    teacher = closed_form_denoiser if exact else make_network(recipe, mesh, recipe.teacher_wan).denoise
    return Networks(network, network.denoise, guided(teacher, null_text, recipe.teacher.guidance))


def student_start(recipe: Recipe, base: Params, mesh: Mesh) -> Params:
    """Where the student starts: the averaged network of the stage before, from its workdir or file, or the weights.

    Of Wan 2.1 also a converted network, such as a causal start that others have trained.

    Raises:
      UserError: the workdir of `config.init_from` was made for another network, text encoder, data or chunks.
    """
    if not recipe.init_from:
        return base
    if recipe.data.kind == "latents" and part_file(WAN, recipe.init_from).is_file():
        return open_wan(recipe, recipe.init_from, mesh, jnp.float32)
    file = Path(recipe.init_from)
    exported = file.is_file()
    if not exported and not (file / "config.json").is_file():
        raise UserError(
            f"config.init_from={recipe.init_from} is neither the workdir of a stage (with its config.json) nor a file "
            "of launch.export or a folder of launch.convert_wan; name one of these"
        )
    told = read_metadata(file).get("config") if exported else (file / "config.json").read_text()
    if not told:
        raise UserError(
            f"config.init_from={recipe.init_from} has no config in it; name a file of launch.export"
        )
    before = from_json(told)
    if before.stage == "denoising" or before.lora.rank:
        raise UserError(
            f"config.init_from={recipe.init_from} holds a teacher or an adapted student; "
            "write it to a file with launch.export and name that in config.weights"
        )
    same = ["model.preset", "text_encoder", "weights", "data.kind", "data.clip", "world"]
    same += ["memory.chunk", "memory.first"] if before.causal else []
    for name in same:
        there, here = (functools.reduce(getattr, name.split("."), r) for r in (before, recipe))
        if there != here:
            raise UserError(
                f"config.init_from={recipe.init_from} was made with {name}={there}, this run has {here}; "
                "make them equal or start from another stage"
            )
    if exported:
        like = {
            "wan": base,
            "text_encoder": jax.eval_shape(lambda: init_text_encoder(jax.random.key(0), recipe.text)),
        }
        return load_weights(file, like)["wan"]
    return restore_params(recipe.init_from, "ema", mesh)


def empty_stream(recipe: Recipe, network: Network, null_text: jax.Array) -> Stream | None:
    """What streaming long tuning carries, before anything was made; the first update does not look at it."""
    if not recipe.stream.max_frames:
        return None
    like = jnp.zeros((recipe.batch_size, 0, *recipe.clip_shape[1:]))
    cache = network.empty_cache(like, recipe.memory.capacity(0))
    return Stream(cache, jnp.zeros((recipe.batch_size, *null_text.shape[1:])))
