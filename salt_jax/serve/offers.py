"""Models as viewers may choose them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from salt_jax.errors import UserError
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.pipeline.model import Model

STEPS = (2, 4, 8)


class Offer(NamedTuple):
    """A model as viewers may choose it."""

    model: Model
    steps: tuple[int, ...]
    memories: Mapping[str, CachePolicy]


def make_offer(model: Model) -> Offer:
    """What a model can do. Raises UserError where it makes whole clips."""
    policy, sampler = model.sampler.memory, model.sampler
    if policy is None:
        raise UserError(
            f"{model.parts.source} makes whole clips; serve a student that works chunk by chunk"
        )
    if sampler.levels:
        steps = (len(sampler.levels),)
    else:
        steps = tuple(sorted({*STEPS, sampler.num_steps}))
    return Offer(model, steps, memories(policy, policy.nearest(model.shape[0])[0]))


def memories(policy: CachePolicy, clip: int) -> Mapping[str, CachePolicy]:
    """Ways to remember a video without end, by name, the best first: for 30 s of Moving Shapes, see
    docs/results.md. None sees more than a clip of `clip` latent frames.
    """
    relative = replace(policy, window=clip, sink=0, positions="relative", period=0)
    with_sink = replace(relative, sink=policy.chunk)
    found = {
        "window": relative,
        "last chunks": replace(relative, window=2 * policy.chunk),
        "window and sink": with_sink,
    }
    if policy.first == policy.chunk and clip % policy.chunk == 0:
        found = {"cyclic": replace(with_sink, positions="cyclic", period=clip)} | found
    if policy.window:
        found = {"as trained": policy} | found
    return {name: way for name, way in found.items() if way.window >= way.sink + way.chunk}
