"""Text encoder and decoder of a network of Moving Shapes."""

from collections.abc import Sequence

import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import digest
from salt_jax.moving_shapes import latents, shapes
from salt_jax.pipeline.model import Model
from salt_jax.pipeline.parts import Decoded, Given, Parts
from salt_jax.rollout.settings import Sampler
from salt_jax.workdir import Trained

EXAMPLES = 8


def shapes_model(
    run: Trained, source: str, negative: str | None = None, guidance: float = 1.0
) -> Model:
    """Of a workdir or an exported file."""
    recipe = run.recipe
    text_encoder = digest(located(run.text_file)) if run.text_file else "fresh"

    captions = [shapes.caption(scene) for scene in shapes.scenes(recipe.world)]

    def read_given(pixels: np.ndarray, shape: tuple[int, ...], chunks: bool) -> Given:
        return Given(latents=latents.to_latent(pixels, recipe.world)[None])

    def to_bytes(decoded: Decoded) -> np.ndarray:
        (latent,) = decoded
        return latents.to_pixels(np.asarray(latent)[0], recipe.world)  # no work for the device

    def read_texts(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {prompt: run.embed([prompt]) for prompt in prompts}

    parts = Parts(
        source=source,
        made_with={"network": run.made_with, "weights": {"text_encoder": text_encoder}},
        network=run.stage.student,
        read_params=lambda: run.params,
        read_texts=read_texts,
        read_given=read_given,
        decode=lambda memory, latent: ((latent,), memory),
        to_bytes=to_bytes,
        whole=False,
        frames_of=int,
        shown=int,
        learnt=captions.__contains__,
        examples=tuple(captions[i] for i in shapes.spread(recipe.world, EXAMPLES)),
        negative=negative or "",
        fps=shapes.FPS,
        zoom=max(recipe.world.patch, 1),
    )
    return Model(parts, sampler_of(recipe), recipe.clip_shape, guidance)


def sampler_of(recipe: Recipe) -> Sampler:
    """What a student was trained for, at the middle one of `config.sample.num_steps`."""
    return Sampler(
        recipe.sample.one,
        recipe.schedule.shift,
        recipe.sample.solver,
        recipe.memory if recipe.causal else None,
        recipe.rollout.first_steps if recipe.causal else 0,
        tuple(level for level in recipe.schedule.levels if level),
    )
