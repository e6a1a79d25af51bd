"""A teacher from data: flow matching on whole clips, of the transformer and its text encoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.losses.flow_matching import flow_matching_loss
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.text_encoder import encode_text
from salt_jax.moving_shapes.exact import ClosedForm
from salt_jax.stages import single
from salt_jax.stages.contradictions import no_lora, no_rollouts
from salt_jax.stages.judging import Renoised, draw_renoised
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    CLOSED_FORM,
    NO_TEACHER,
    Aux,
    Batch,
    Frozen,
    Inputs,
    Parts,
    Update,
    Weights,
)
from salt_jax.state import TrainState, first_state
from salt_jax.types import Conditioning, Params, PRNGKey


class DenoisingNoise(NamedTuple):
    drop: Bool[Array, "b 1"]  # whether an example sees the empty caption
    renoised: Renoised


@dataclass(frozen=True)
class Denoising:
    """The parameters are {"wan", "text_encoder"}."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = single.LEARNERS
    needs = ("tokens", "video")
    records = single.records
    updates = single.updates
    passes = single.passes
    mean_passes = single.mean_passes
    memory = single.memory

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    def contradictions(self) -> Iterator[str]:
        r = self.recipe
        if r.teacher.kind == "network":
            yield (
                "config.stage=denoising makes a teacher; set config.teacher.kind to data or "
                "closed_form"
            )
        if r.schedule.levels:
            yield (
                f"config.schedule.levels={r.schedule.levels} are a student's, and stage denoising "
                "makes a teacher; leave them ()"
            )
        yield from no_lora(r)
        yield from no_rollouts(r)

    def parts(self) -> Parts:
        none = self.recipe.teacher.kind == "data"
        return [("teacher", NO_TEACHER if none else CLOSED_FORM)]

    def frozen(self, weights: Weights) -> Frozen:
        return {} if self.recipe.teacher.kind == "data" else {"teacher": weights.teacher}

    def first_state(self, weights: Weights) -> TrainState:
        trained = {"wan": weights.base, "text_encoder": weights.text_encoder}
        return first_state(self.recipe, {"student": trained})

    def noise(self, key: PRNGKey, batch: Batch) -> DenoisingNoise:
        k_drop, k_renoise = jax.random.split(key)
        drop = jax.random.bernoulli(k_drop, self.recipe.caption_dropout, (batch.size, 1))
        shape = batch.video.shape
        return DenoisingNoise(drop, draw_renoised(k_renoise, shape, self.recipe.renoise))

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        """Some examples see the empty caption.

        The target is the data's velocity, or, where there is a teacher already, its velocity: for
        the closed form that is the conditional mean of the former, so the minimiser is the same and
        the gradient has less variance.
        """
        x0, tokens = inputs.batch.video, inputs.batch.tokens
        noise, sigma = inputs.noise.renoised
        null = jnp.zeros_like(tokens).at[:, 0].set(1)  # the empty caption: only the end token
        tokens = jnp.where(inputs.noise.drop, null, tokens)
        text = encode_text(params["text_encoder"], tokens, self.recipe.text)
        x = add_noise(x0, noise, sigma)
        cond = Conditioning(text)
        velocity = self.student.denoise(params["wan"], x, sigma, cond).velocity
        if self.recipe.teacher.kind != "data":
            # the closed form knows a caption by its tokens
            caption = Conditioning(tokens[..., None].astype(jnp.float32))
            target = ClosedForm().denoise(inputs.frozen["teacher"], x, sigma, caption)
            x0 = noise - target.velocity
        value = flow_matching_loss(velocity, x0, noise).mean()
        return value, Aux({"denoising": value})
