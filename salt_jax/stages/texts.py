"""Captions and prompts as the networks of a run read them, and the records that bring them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from salt_jax.config.schema import Recipe
from salt_jax.data.latents import open_records
from salt_jax.errors import UserError
from salt_jax.hosts import fetch
from salt_jax.io.stored_jit import StoredJit
from salt_jax.io.tokenizer import byte_tokenize
from salt_jax.models.image_condition import condition_latents
from salt_jax.models.text_encoder import encode_text
from salt_jax.moving_shapes import shapes
from salt_jax.stages.stage import ABSENT, Batch, Stage
from salt_jax.types import Conditioning, Leaf, Params, TextEmb

_encode = StoredJit(encode_text, static=(2,))


class Texts(NamedTuple):
    """Of a run."""

    # how a caption enters a batch: tokens or rows; pure numpy, safe in a loader thread
    encode_caption: Callable[[str], np.ndarray]
    null_text: TextEmb  # [1, T, D]; `ABSENT` where the stage trains the text encoder
    # of encoded videos or prompts, which bring their text's embedding; None: Moving Shapes
    records: Sequence | None


def tokenize(recipe: Recipe, caption: str) -> Int[np.ndarray, "t"]:
    """Raises UserError if the caption is too long."""
    try:
        return byte_tokenize(caption, recipe.wan.text_length)
    except ValueError as error:
        raise UserError(
            f"{error}; shorten it, or choose a config.model.preset that reads more text"
        ) from error


def embed(
    recipe: Recipe, text_encoder: Params, captions: Sequence[str]
) -> Float[np.ndarray, "n t d"]:
    """Captions by the frozen text encoder."""
    tokens = np.stack([tokenize(recipe, c) for c in captions])
    return fetch(_encode(text_encoder, tokens, recipe.text))


def read_texts(stage: Stage, text_encoder: Params | None) -> Texts:
    """The texts of a run.

    Raises:
      UserError: there are no encoded records, or not what the stage and the network read.
    """
    recipe = stage.recipe
    if "tokens" in stage.needs:
        return Texts(partial(tokenize, recipe), ABSENT, None)
    if recipe.data.kind == "moving_shapes":
        captions = ["", *map(shapes.caption, shapes.scenes(recipe.world))]
        table = dict(zip(captions, embed(recipe, text_encoder, captions), strict=True))
        return Texts(table.__getitem__, jnp.asarray(table[""][None]), None)
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
            f"{directory} was encoded without pictures, which {recipe.model.preset} reads; "
            "encode it with --image"
        )
    if "video" in stage.needs and "video" not in there:
        raise UserError(
            f"{directory} has prompts alone, and this run reads videos; encode videos, or set "
            "config.video=rollout"
        )
    return Texts({}.__getitem__, jnp.asarray(null_text[None]), records)


def to_batch(stage: Stage, arrays: Mapping[str, Leaf]) -> Batch:
    """What `data.pipeline.batches` yields, as a stage reads it; of what it does not read nothing
    goes to the devices.
    """
    text = arrays["text"]
    given = {name: arrays[name] for name in ("video", "states") if name in stage.needs}
    if "tokens" in stage.needs:
        return Batch(tokens=text, **given)
    if "switch" in stage.needs and "switch" in arrays:
        given["switch"] = arrays["switch"]
    cond = Conditioning(text)
    if "image" in arrays:
        cond = Conditioning(text, arrays["image"], condition_latents(arrays["condition"]))
    return Batch(cond, **given)
