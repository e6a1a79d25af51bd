"""A look at a run while it trains: a few clips of the averaged network, as a moving picture and as
numbers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.io.video import encode_gif, looks, visible_scale
from salt_jax.models.lora import merge
from salt_jax.models.text_encoder import encode_text
from salt_jax.moving_shapes import shapes
from salt_jax.moving_shapes.latents import to_pixels
from salt_jax.rollout.causal import Origin, Steps, rollout
from salt_jax.rollout.parallel import sample
from salt_jax.sharding import replicated
from salt_jax.state import fetched
from salt_jax.train.logs import EventLog
from salt_jax.train.setup import Setup
from salt_jax.types import Conditioning, Params

CLIPS = 6  # side by side, spread over the captions


def make_preview(parts: Setup) -> Callable[[Params], np.ndarray] | None:
    """EMA -> uint8 [CLIPS, F, H, W, 3]. Always the same captions and noise; the middle one of
    `config.sample.num_steps`.

    None of kind latents: a look at these takes the VAE and minutes; launch.sample does it beside
    the run. One program that every process runs, replicated, so that one of them may write the
    clips.
    """
    stage, recipe = parts.stage, parts.stage.recipe
    if recipe.data.kind == "latents":
        return None
    assert stage.mesh is not None
    scenes = shapes.scenes(recipe.world)
    captions = [shapes.caption(scenes[i]) for i in shapes.spread(recipe.world, CLIPS)]
    rows = np.stack([parts.encode_caption(caption) for caption in captions])
    num_steps = sorted(recipe.sample.num_steps)[len(recipe.sample.num_steps) // 2]
    levels, solver, shape = recipe.levels(num_steps), recipe.sample.solver, recipe.clip_shape

    @functools.partial(jax.jit, out_shardings=replicated(stage.mesh))
    def clips(ema, base):
        given, keys = jnp.asarray(rows), jax.random.split(jax.random.key(recipe.seed), CLIPS)
        params, text = fetched(ema, recipe.host_state), given
        if "tokens" in stage.needs:
            text = encode_text(params["text_encoder"], given, recipe.text)
            params = params["wan"]
        params, cond = merge(base, params, recipe.lora), Conditioning(text)
        if not recipe.causal:
            return sample(stage.student, params, cond, levels, solver, keys, shape)
        steps = Steps(jnp.asarray(levels), num_steps - 1, solver)
        args = (Origin(cond), steps, keys, shape, recipe.memory)
        return rollout(stage.student, params, *args).x0

    base = parts.frozen.get("student")

    def preview(ema: Params) -> np.ndarray:
        return to_pixels(jax.device_get(clips(ema, base)), recipe.world)

    return preview


def show(events: EventLog, clips: np.ndarray, sizes: tuple[int, ...], step: int) -> None:
    """Writes clips, uint8 [N, F, H, W, 3], side by side as an animated picture, and how they look,
    over training.

    `sizes` are the chunks: what drifts from one to the next is written by chunk.
    """
    frames = np.concatenate(list(clips), axis=2)
    scale = visible_scale(frames.shape[1], 96)
    gif = encode_gif(frames, shapes.FPS, scale)
    height, width = (scale * n for n in frames.shape[1:3])
    events.picture("clips", gif, (height, width), step)
    for name, value in looks(clips).items():
        events.scalar(f"looks/{name}", value, step)
    ends = np.cumsum(sizes)
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        for name, value in looks(clips[:, end - size : end]).items():
            events.scalar(f"looks_by_chunk/{name}_{i}", value, step)
    events.flush()
