"""The shipped weights are as good as their README says."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.evaluate import shapes_suite
from salt_jax.models.denoiser import guided
from salt_jax.moving_shapes import shapes
from salt_jax.rollout.sampler import Sampler
from salt_jax.sharding import all_devices
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.texts import embed
from salt_jax.stages.weights import initial_weights


@pytest.mark.slow
@pytest.mark.optimized
def test_nine_clips_of_ten_are_what_their_caption_says():
    """48 clips, one per caption, by 32 guided Euler steps."""
    recipe = read_recipe(base.get_config())
    weights, scenes = initial_weights(recipe, all_devices()), shapes.scenes(recipe.world)
    text = embed(recipe, weights["text_encoder"], ["", *map(shapes.caption, scenes)])
    count, null_text = len(scenes), jnp.asarray(text[:1])
    network, guidance = denoiser_of(recipe, None), recipe.teacher.guidance
    teacher, params = guided(network, weights["wan"], null_text, guidance)
    task = shapes_suite.Task(
        recipe.world,
        np.arange(count),
        text[1:],
        recipe.clip_shape,
        Sampler(32, recipe.schedule.shift),
        seed=7,
        batch_size=count,
    )
    made = shapes_suite.clips(teacher, params, task, 32, "euler")
    card = shapes_suite.shapes_score(made, task)
    assert min(card["shape"], card["colour"], card["direction"], card["clean"], card["all"]) >= 0.9
