"""From a recipe to what a run is made of: weights, captions as the networks read them, teacher, and first state."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.data import shapes
from salt_jax.errors import UserError
from salt_jax.models.closed_form import closed_form_denoiser, closed_form_params
from salt_jax.models.denoiser import Network, guided, wan_network
from salt_jax.models.lora import init_lora
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.tokenizer import byte_tokenize
from salt_jax.models.wan import init_wan
from salt_jax.models.weights import load_weights, read_metadata
from salt_jax.train.checkpoint import restore_params
from salt_jax.train.recipe import Recipe, from_json, make_optimizer
from salt_jax.train.sharding import make_mesh
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


def initial_weights(recipe: Recipe) -> Params:
    """{"wan", "text_encoder"}: from the file that the recipe names, or fresh."""
    k_wan, k_text = jax.random.split(jax.random.key(recipe.seed))

    def fresh():
        return {"wan": init_wan(k_wan, recipe.wan), "text_encoder": init_text_encoder(k_text, recipe.text)}

    if not recipe.weights:
        return jax.jit(fresh)()
    return load_weights(recipe.weights, jax.eval_shape(fresh))


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


def setup(recipe: Recipe) -> Setup:
    """Everything a run starts from, for any stage.

    Raises:
      UserError: weights or the stage before do not fit, or the closed form has too many clips.
    """
    if recipe.data.kind == "latents":
        raise UserError(
            "config.data.kind=latents: encoded videos cannot be read yet; set it to moving_shapes, with a small preset"
        )
    weights = initial_weights(recipe)
    tokens = functools.partial(tokenize, recipe)
    network = make_network(recipe)
    student_tx = make_optimizer(recipe.student_optimizer, recipe.updates)
    kind = recipe.teacher.kind
    if recipe.stage == "denoising":
        as_text = lambda captions: np.stack([tokens(c) for c in captions])[..., None].astype(np.float32)
        frozen = {} if kind == "data" else {"teacher": closed_form(recipe, as_text)}
        state = init_state(init_learner(weights, student_tx), None)
        return Setup(state, frozen, Networks(network, network.denoise, closed_form_denoiser), tokens)

    encode = functools.partial(embed, recipe, weights["text_encoder"])
    captions = ["", *map(shapes.caption, shapes.scenes(recipe.world))]
    table = dict(zip(captions, encode(captions), strict=True))
    base, null_text = weights["wan"], jnp.asarray(table[""][None])
    start = student_start(recipe, base)
    if recipe.stage != "distil":
        state = init_state(init_learner(start, student_tx), None)
        frozen = {"teacher": start, "null_text": null_text}
        return Setup(state, frozen, Networks(network, network.denoise, network.denoise), table.__getitem__)

    exact = kind == "closed_form"
    frozen = {"teacher": closed_form(recipe, encode) if exact else base}
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
    return Setup(state, frozen, make_networks(recipe, null_text), table.__getitem__)


def make_network(recipe: Recipe, config: WanConfig | None = None) -> Network:
    """The functions of student and critic, or of a network of another size."""
    return wan_network(config or recipe.wan, recipe.compute, recipe.clip_shape[0], recipe.memory.chunk)


def make_networks(recipe: Recipe, null_text: jax.Array) -> Networks:
    """The functions of a distillation."""
    network, exact = make_network(recipe), recipe.teacher.kind == "closed_form"
    teacher = closed_form_denoiser if exact else make_network(recipe, recipe.teacher_wan).denoise
    return Networks(network, network.denoise, guided(teacher, null_text, recipe.teacher.guidance))


def student_start(recipe: Recipe, base: Params) -> Params:
    """Where the student starts: the averaged network of the stage before, from its workdir or file, or the weights.

    Raises:
      UserError: the workdir of `config.init_from` was made for another network, text encoder, data or chunks.
    """
    if not recipe.init_from:
        return base
    file = Path(recipe.init_from)
    exported = file.is_file()
    if not exported and not (file / "config.json").is_file():
        raise UserError(
            f"config.init_from={recipe.init_from} is neither the workdir of a stage (with its config.json) nor a file "
            "of launch.export; name one of these"
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
    return restore_params(
        recipe.init_from, "ema", make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
    )


def empty_stream(recipe: Recipe, network: Network, null_text: jax.Array) -> Stream | None:
    """What streaming long tuning carries, before anything was made; the first update does not look at it."""
    if not recipe.stream.max_frames:
        return None
    like = jnp.zeros((recipe.batch_size, 0, *recipe.clip_shape[1:]))
    cache = network.empty_cache(like, recipe.memory.capacity(0))
    return Stream(cache, jnp.zeros((recipe.batch_size, *null_text.shape[1:])))
