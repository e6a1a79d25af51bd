"""Shortcut self-consistency as the only signal, the baseline of Salt, Fig. 2: no critic, no
distribution matching. The student learns a large update from two smaller ones of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from salt_jax.config.schema import Recipe
from salt_jax.flow.prediction import add_noise
from salt_jax.losses.shortcut import shortcut_loss
from salt_jax.models.denoiser import WanDenoiser, guided
from salt_jax.rollout.draws import LevelTriple
from salt_jax.rollout.parallel import midpoint
from salt_jax.stages import single, teachers
from salt_jax.stages.contradictions import no_lora, no_rollouts
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Frozen,
    Inputs,
    Parts,
    Pass,
    Update,
    Weights,
)
from salt_jax.types import Denoiser, Latent, Params, PRNGKey


class ShortcutNoise(NamedTuple):
    clip: Latent
    triple: LevelTriple


@dataclass(frozen=True)
class Shortcut:
    """Whole clips, on the levels of `config.schedule`."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = single.LEARNERS
    needs = ("cond", "video")
    first_state = single.from_start
    records = single.records
    updates = single.updates
    passes = single.passes
    memory = single.memory

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    @property
    def teacher(self) -> Denoiser:
        """Without guidance."""
        return teachers.denoiser(self.recipe, self.mesh)

    def contradictions(self) -> Iterator[str]:
        r = self.recipe
        if _stride(r) < 2:
            yield (
                f"config.schedule.anchor_levels={r.schedule.anchor_levels} leaves no level of "
                f"train_levels={r.schedule.train_levels} between two of inference, and stage "
                "shortcut learns one update from two; lower anchor_levels"
            )
        yield from teachers.contradictions(r)
        yield from no_lora(r)
        yield from no_rollouts(r)

    def parts(self) -> Parts:
        return [teachers.part(self.recipe)]

    def frozen(self, weights: Weights) -> Frozen:
        return teachers.frozen(weights)

    def noise(self, key: PRNGKey, batch: Batch) -> ShortcutNoise:
        """Every level of training with the next one of inference below it, and the one halfway."""
        k_clip, k_level = jax.random.split(key)
        s = self.recipe.schedule
        levels, stride = jnp.asarray(self.recipe.levels(s.train_levels)), _stride(self.recipe)
        start = jax.random.randint(k_level, (batch.size,), 0, s.train_levels)
        end = (start // stride + 1) * stride
        middle = (start + end) // 2
        triple = LevelTriple(levels[start], levels[middle], levels[end], middle > start)
        return ShortcutNoise(jax.random.normal(k_clip, batch.video.shape), triple)

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        (x0, cond), frozen = (inputs.batch.video, inputs.batch.cond), inputs.frozen
        clip, (sigma, sigma_m, sigma_e, _) = inputs.noise
        x = add_noise(x0, clip, sigma)
        v_s = self.student.denoise(params, x, sigma, cond).velocity
        x_m = midpoint(x, v_s, sigma, sigma_m, True)
        v_m = self.student.denoise(jax.lax.stop_gradient(params), x_m, sigma_m, cond).velocity
        guidance = self.recipe.teacher.guidance
        teacher, weights = guided(self.teacher, frozen["teacher"], frozen["null_text"], guidance)
        v_teacher = teacher.denoise(weights, x, sigma, cond).velocity
        value = shortcut_loss(v_s, v_m, v_teacher, sigma, sigma_m, sigma_e).mean()
        return value, Aux({"shortcut": value})

    def mean_passes(self, learner: str) -> list[Pass]:
        (student,) = single.mean_passes(self, learner)
        again = student._replace(name="student: second update", gradient="none")
        return [student, again, *teachers.passes(self.recipe)]


def _stride(recipe: Recipe) -> int:
    """Updates between two levels of training in one between two of inference."""
    return recipe.schedule.train_levels // recipe.schedule.anchor_levels
