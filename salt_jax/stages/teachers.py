"""The teacher of the stages that learn from another network: the same weights, others, or the exact
optimum of Moving Shapes.
"""

from collections.abc import Iterator

from jax.sharding import Mesh

from salt_jax.config.schema import Recipe
from salt_jax.moving_shapes.exact import ClosedForm
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import CLOSED_FORM, Frozen, Pass, Weights
from salt_jax.types import Denoiser


def denoiser(recipe: Recipe, mesh: Mesh | None) -> Denoiser:
    """Without guidance."""
    if recipe.teacher.kind == "closed_form":
        return ClosedForm()
    return denoiser_of(recipe, mesh, recipe.teacher_wan)


def contradictions(recipe: Recipe) -> Iterator[str]:
    if recipe.teacher.kind == "data":
        yield (
            "config.teacher.kind=data leaves no teacher to distil; set it to network or closed_form"
        )


def part(recipe: Recipe) -> tuple[str, str]:
    """Its name and where it is read from."""
    t = recipe.teacher
    own = t.weights or (recipe.weights if recipe.teacher_wan == recipe.wan else "")
    return "teacher", own if t.kind == "network" else CLOSED_FORM


def frozen(weights: Weights) -> Frozen:
    """What evaluating it reads."""
    return {"teacher": weights.teacher, "null_text": weights.null_text}


def passes(recipe: Recipe) -> list[Pass]:
    """Of one evaluation, under guidance."""
    frames, t = recipe.clip_shape[0], recipe.teacher
    times = 0 if t.kind == "closed_form" else 1 + (t.guidance != 1.0)
    return [Pass("teacher: score", recipe.teacher_wan, ((frames, frames),), times)]
