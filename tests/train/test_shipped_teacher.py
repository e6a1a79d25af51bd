"""The weights in assets/ are as good as their README says."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from salt_jax.data import shapes
from salt_jax.data.shapes import to_pixels
from salt_jax.evaluate.shapes_score import score
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.sample import clip_keys, sample_clips
from salt_jax.train.recipe import read_recipe
from salt_jax.train.setup import embed, initial_weights


@pytest.mark.slow
def test_nine_clips_of_ten_are_what_their_caption_says():
    """48 clips, one per caption, by 32 guided Euler updates."""
    recipe = read_recipe(base.get_config())
    weights, scenes = initial_weights(recipe), shapes.scenes(recipe.world)
    text = embed(recipe, weights["text_encoder"], ["", *map(shapes.caption, scenes)])
    teacher = guided(wan_denoiser(recipe.wan, recipe.compute), jnp.asarray(text[:1]), recipe.teacher.guidance)
    args = (clip_keys(7, len(scenes)), 32, recipe.schedule.shift, "euler", recipe.clip_shape, len(scenes))
    (latents,) = sample_clips(teacher, weights["wan"], text[1:], *args)
    card = score(to_pixels(latents), np.arange(len(scenes)), recipe.world)
    assert min(card["shape"], card["colour"], card["direction"], card["clean"], card["all"]) >= 0.9
