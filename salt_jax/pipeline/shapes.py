"""Text encoder and decoder of a network of Moving Shapes."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import digest
from salt_jax.moving_shapes import latents, shapes
from salt_jax.pipeline.model import Given, Model, Parts
from salt_jax.rollout.settings import Sampler
from salt_jax.workdir import Trained


def shapes_model(
    run: Trained, source: str, negative: str | None = None, guidance: float = 1.0
) -> Model:
    """Of a workdir or an exported file."""
    recipe = run.recipe
    text_encoder = digest(located(run.text_file)) if run.text_file else "fresh"

    def read_given(pixels: np.ndarray, shape: tuple[int, ...], chunks: bool) -> Given:
        return Given(latents=latents.to_latent(pixels, recipe.world)[None])

    def decode(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return (latents.to_pixels(chunk[0], recipe.world) for chunk in chunks)

    def read_texts(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {prompt: run.embed([prompt]) for prompt in prompts}

    parts = Parts(
        source=source,
        made_with={"network": run.made_with, "weights": {"text_encoder": text_encoder}},
        network=run.stage.student,
        read_params=lambda: run.params,
        read_texts=read_texts,
        read_given=read_given,
        decode=decode,
        frames_of=int,
        negative=negative or "",
        fps=shapes.FPS,
    )
    return Model(parts, sampler_of(recipe), recipe.clip_shape, guidance)


def sampler_of(recipe: Recipe) -> Sampler:
    """What a student was trained for, at the middle one of `config.sample.num_steps`."""
    steps = sorted(recipe.sample.num_steps)
    return Sampler(
        steps[len(steps) // 2],
        recipe.schedule.shift,
        recipe.sample.solver,
        recipe.memory if recipe.causal else None,
        recipe.rollout.first_steps if recipe.causal else 0,
        tuple(level for level in recipe.schedule.levels if level),
    )
