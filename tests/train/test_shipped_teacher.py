"""The shipped weights are as good as their README says."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from launch.common import all_devices
from salt_jax.config.reading import read_recipe
from salt_jax.evaluate import shapes_suite
from salt_jax.models.denoiser import guided
from salt_jax.moving_shapes import shapes
from salt_jax.train.setup import embed, initial_weights, make_network


@pytest.mark.slow
@pytest.mark.optimized
def test_nine_clips_of_ten_are_what_their_caption_says():
    """48 clips, one per caption, by 32 guided Euler steps."""
    recipe = read_recipe(base.get_config())
    weights, scenes = initial_weights(recipe, all_devices()), shapes.scenes(recipe.world)
    text, count = (
        embed(recipe, weights["text_encoder"], ["", *map(shapes.caption, scenes)]),
        len(scenes),
    )
    network = make_network(recipe, None)
    teacher = network._replace(
        denoise=guided(network.denoise, jnp.asarray(text[:1]), recipe.teacher.guidance)
    )
    task = shapes_suite.Task(
        recipe.world,
        np.arange(count),
        text[1:],
        recipe.clip_shape,
        recipe.schedule.shift,
        7,
        count,
        None,
        0,
    )
    card = shapes_suite.shapes_score(
        shapes_suite.clips(teacher, weights["wan"], task, 32, "euler"), task
    )
    assert min(card["shape"], card["colour"], card["direction"], card["clean"], card["all"]) >= 0.9
