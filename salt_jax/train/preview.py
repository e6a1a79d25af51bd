"""A look at a run while it trains: a few clips of the averaged network, as a moving picture for TensorBoard."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tensorboardX import SummaryWriter
from tensorboardX.proto import summary_pb2

from salt_jax.data import shapes
from salt_jax.flow.schedule import grid
from salt_jax.models.text_encoder import encode_text
from salt_jax.rollout.parallel import sample
from salt_jax.train.recipe import Recipe
from salt_jax.train.setup import Setup
from salt_jax.types import Params
from salt_jax.video import encode_gif, visible_scale

CLIPS = 6  # side by side, spread over the captions


def make_preview(recipe: Recipe, parts: Setup, everywhere: NamedSharding) -> Callable[[Params], np.ndarray]:
    """EMA -> uint8 [F, H, CLIPS * W, 3]. Always the same captions and noise; the middle number of updates.

    `everywhere` is the replicated sharding: every process computes the clips, so that one may write them.
    """
    scenes = shapes.scenes(recipe.world)
    captions = [shapes.caption(scenes[i]) for i in shapes.spread(recipe.world, CLIPS)]
    given = jnp.asarray(np.stack([parts.encode_caption(caption) for caption in captions]))
    keys = jax.random.split(jax.random.key(recipe.seed), CLIPS)
    updates = sorted(recipe.sample.num_updates)[len(recipe.sample.num_updates) // 2]
    sigmas = grid(updates, recipe.schedule.shift)
    teacher_to_be = recipe.stage == "denoising"

    @functools.partial(jax.jit, out_shardings=everywhere)
    def clips(ema):
        text = encode_text(ema["text_encoder"], given, recipe.text) if teacher_to_be else given
        params = ema["wan"] if teacher_to_be else ema
        return sample(
            parts.networks.student, params, text, sigmas, recipe.sample.solver, keys, recipe.clip_shape
        )

    return lambda ema: np.concatenate(list(shapes.to_pixels(jax.device_get(clips(ema)))), axis=2)


def show(writer: SummaryWriter, frames: np.ndarray, step: int) -> None:
    """Writes a clip, uint8 [F, H, W, 3], as an animated picture."""
    scale = visible_scale(frames.shape[1], 96)
    gif = encode_gif(frames, shapes.FPS, scale)
    height, width = (scale * n for n in frames.shape[1:3])
    proto: Any = summary_pb2  # its classes are made when it is imported, out of a type checker's sight
    picture = proto.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    file: Any = writer.file_writer
    file.add_summary(proto.Summary(value=[proto.Summary.Value(tag="clips", image=picture)]), step)
    writer.flush()
