"""From a stage to what a run is made of: parameters, the first state, and texts."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from salt_jax.sharding import laid_out, state_shardings
from salt_jax.stages import weights
from salt_jax.stages.roles import refuse_roles
from salt_jax.stages.stage import Frozen, Stage, Weights
from salt_jax.state import TrainState


class Setup(NamedTuple):
    """What a run starts from."""

    stage: Stage
    state: TrainState  # its form and layout, jax.ShapeDtypeStruct each
    fresh: Callable[[], TrainState] | None  # makes the first one, once; None after that
    frozen: Frozen
    encode_caption: Callable[[str], np.ndarray]  # see `stages.texts.Texts`
    records: Sequence | None


def setup(stage: Stage) -> Setup:
    """Everything a run starts from, on the mesh of its stage.

    Raises:
      UserError: weights, data or the stage before do not fit, or the closed form has too many
        clips.
    """
    assert stage.mesh is not None
    refuse_roles(stage)
    loaded, texts = weights.load(stage, stage.mesh)
    frozen = stage.frozen(loaded)
    form, fresh = first_state(stage, loaded, frozen)
    return Setup(stage, form, fresh, frozen, texts.encode_caption, texts.records)


def first_state(
    stage: Stage, loaded: Weights, frozen: Frozen
) -> tuple[TrainState, Callable[[], TrainState]]:
    """The form of the state before the first iteration, and what makes it on the mesh.

    That works once: parameters that it starts from and that are not frozen are given up for it, so
    that there are never two copies of them.
    """
    mesh = stage.mesh
    assert mesh is not None
    like = jax.eval_shape(stage.first_state, loaded)
    both = loaded.start is loaded.base  # which is given up once then
    loaded = loaded._replace(start=None) if both else loaded
    shardings = state_shardings(mesh, like, stage.recipe.host_state)
    stay = {id(x) for x in jax.tree.leaves(frozen)}
    free = [stay.isdisjoint(map(id, jax.tree.leaves(part))) for part in loaded]

    def make(given_up, read):
        pairs = zip(free, given_up, read, strict=True)
        weights = Weights(*(a if is_free else b for is_free, a, b in pairs))
        return stage.first_state(weights._replace(start=weights.base) if both else weights)

    given_up = tuple(part if is_free else None for part, is_free in zip(loaded, free, strict=True))
    read = tuple(None if is_free else part for part, is_free in zip(loaded, free, strict=True))
    fresh = jax.jit(make, out_shardings=shardings, donate_argnums=0)
    return laid_out(like, shardings), functools.partial(fresh, given_up, read)
