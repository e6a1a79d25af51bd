"""From a recipe to what a run is made of: weights, captions as the networks read them, teacher, and first state."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.data import shapes
from salt_jax.errors import UserError
from salt_jax.models.closed_form import closed_form_denoiser, closed_form_params
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.tokenizer import byte_tokenize
from salt_jax.models.wan import init_wan
from salt_jax.models.weights import load_weights
from salt_jax.train.recipe import Recipe, make_optimizer
from salt_jax.train.state import TrainState, init_learner, init_state
from salt_jax.train.step import Networks
from salt_jax.types import Params

_encode = jax.jit(encode_text, static_argnums=2)


class Setup(NamedTuple):
    """What a run starts from."""

    state: TrainState
    teacher: Params
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
    """Everything a run starts from, for either stage.

    Raises:
      UserError: weights do not fit, or the closed form has too many clips.
    """
    weights = initial_weights(recipe)
    tokens = functools.partial(tokenize, recipe)
    network = wan_denoiser(recipe.wan, recipe.compute)
    student_tx = make_optimizer(recipe.student_optimizer, recipe.updates)
    kind = recipe.teacher.kind
    if recipe.stage == "denoising":
        as_text = lambda captions: np.stack([tokens(c) for c in captions])[..., None].astype(np.float32)
        teacher = {} if kind == "data" else closed_form(recipe, as_text)
        state = init_state(init_learner(weights, student_tx), None)
        return Setup(state, teacher, Networks(network, network, closed_form_denoiser), tokens)

    encode = functools.partial(embed, recipe, weights["text_encoder"])
    captions = ["", *map(shapes.caption, shapes.scenes(recipe.world))]
    table = dict(zip(captions, encode(captions), strict=True))
    exact = kind == "closed_form"
    teacher, denoise = (
        (closed_form(recipe, encode), closed_form_denoiser) if exact else (weights["wan"], network)
    )
    guided_teacher = guided(denoise, jnp.asarray(table[""][None]), recipe.teacher.guidance)
    critic_tx = make_optimizer(recipe.critic_optimizer, recipe.updates * recipe.critic_updates)
    state = init_state(init_learner(weights["wan"], student_tx), init_learner(weights["wan"], critic_tx))
    return Setup(state, teacher, Networks(network, network, guided_teacher), table.__getitem__)
