"""What is trained: one file for each stage, behind `stage.Stage`."""

from jax.sharding import Mesh

from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.stages.consistency import Consistency
from salt_jax.stages.denoising import Denoising
from salt_jax.stages.distil import Distil
from salt_jax.stages.ode_regression import OdeRegression
from salt_jax.stages.shortcut import Shortcut
from salt_jax.stages.stage import Stage
from salt_jax.stages.teacher_forcing import TeacherForcing

STAGES = {
    "denoising": Denoising,
    "teacher_forcing": TeacherForcing,
    "ode_regression": OdeRegression,
    "consistency": Consistency,
    "shortcut": Shortcut,
    "distil": Distil,
}


def make_stage(recipe: Recipe, mesh: Mesh | None = None) -> Stage:
    """The stage of a recipe, for the devices of a mesh.

    Raises:
      UserError: the recipe asks of the stage what it cannot do.
    """
    stage = STAGES[recipe.stage](recipe, mesh)
    for contradiction in stage.contradictions():
        raise UserError(contradiction)
    return stage
