"""What does not go together is refused and never broadcast: when traced, so at no cost later."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from salt_jax.losses.cache_alignment import cache_alignment_loss
from salt_jax.losses.dmd import dmd_loss
from salt_jax.losses.flow_matching import flow_matching_loss
from salt_jax.losses.regression import endpoint_loss
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.losses.shortcut import shortcut_loss
from tests.helpers import without_type_checks

CLIP, FRAMES, CLIPS = (2, 3, 4, 5, 6), (2, 3), (2,)
alignment_loss = partial(cache_alignment_loss, margin=0.1)
consistency_loss = partial(self_consistency_loss, stop_gradient="direct", level_weight="one")
GOOD = [
    (dmd_loss, CLIP, CLIP, CLIP),
    (endpoint_loss, CLIP, CLIP),
    (flow_matching_loss, CLIP, CLIP, CLIP),
    (flow_matching_loss, CLIP, CLIP, CLIP, CLIPS),
    (flow_matching_loss, CLIP, CLIP, CLIP, FRAMES),
    (consistency_loss, CLIP, CLIP, CLIPS, CLIPS, CLIPS),
    (consistency_loss, CLIP, CLIP, FRAMES, FRAMES, FRAMES),
    (shortcut_loss, CLIP, CLIP, CLIP, CLIPS, CLIPS, CLIPS),
    (alignment_loss, CLIP[:4], CLIP[:4]),
]
OTHERS = {  # each would broadcast
    CLIP: [(1, 3, 4, 5, 6), (2, 1, 4, 5, 6), (2, 3, 4, 5, 1)],
    CLIP[:4]: [(1, 3, 4, 5), (2, 1, 4, 5)],
    FRAMES: [(2, 1), (1, 3), (1,)],
    CLIPS: [(1,)],
}
BAD = [
    (loss, *shapes[:i], other, *shapes[i + 1 :])
    for loss, *shapes in GOOD
    for i, shape in enumerate(shapes)
    for other in OTHERS[shape]
]


def named(case):
    loss, *shapes = case
    return f"{getattr(loss, 'func', loss).__name__} {shapes}"


def traced(loss, *shapes):
    return jax.eval_shape(loss, *(jnp.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("case", BAD, ids=named)
def test_a_mismatch_raises(case):
    with without_type_checks(), pytest.raises(AssertionError):
        traced(*case)


@pytest.mark.parametrize("case", GOOD, ids=named)
def test_what_goes_together_does_also_under_jit_and_vmap(case):
    loss, *shapes = case
    assert jax.tree.leaves(traced(jax.jit(loss), *shapes))[0].shape == CLIPS
    several = traced(jax.vmap(loss), *((7, *shape) for shape in shapes))
    assert jax.tree.leaves(several)[0].shape == (7, *CLIPS)
