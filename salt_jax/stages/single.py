"""What stages that train one network alone answer alike. A stage takes these as its methods."""

from collections.abc import Sequence

from salt_jax.rollout.draws import Draw
from salt_jax.stages.stage import Memory, Pass, RecordSource, Stage, Update, Weights
from salt_jax.state import TrainState, first_state

LEARNERS = ("student",)


def from_start(stage: Stage, weights: Weights) -> TrainState:
    """The first state of a student that begins where the stage before left it."""
    return first_state(stage.recipe, {"student": weights.start})


def records(stage: Stage, source: RecordSource) -> Sequence:
    """The clips or prompts themselves."""
    return source.clips


def updates(stage: Stage, iteration: int) -> list[tuple[Update, Draw | None]]:
    """One, with nothing drawn on the host."""
    return [(Update("student"), None)]


def passes(stage: Stage, update: Update, draw: Draw | None) -> list[Pass]:
    """Every update is as the mean."""
    return stage.mean_passes(update.moves)


def mean_passes(stage: Stage, learner: str) -> list[Pass]:
    """Of whole clips: one."""
    frames = stage.recipe.clip_shape[0]
    return [Pass("student", stage.recipe.wan, ((frames, frames),), 1.0, "weights")]


def memory(stage: Stage, update: Update) -> Memory:
    """Of whole clips: no cache."""
    return Memory(caches=0, slots=0, forwards=1.0)
