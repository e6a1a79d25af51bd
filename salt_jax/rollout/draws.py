"""What is drawn at each step: pure functions of a key or of (seed, index), so every host draws the
same without a broadcast. What decides which program runs is drawn with numpy, before anything runs
on a device.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from salt_jax.flow.draws import draw_triple
from salt_jax.flow.schedule import triples
from salt_jax.types import PRNGKey


class Plan(NamedTuple):
    """One triple of Salt Eq. 9 per example, or per frame; where there is none the levels are equal,
    `exists` False.
    """

    sigma_s: Float[Array, "b"] | Float[Array, "b f"]
    sigma_m: Any
    sigma_e: Any
    exists: Bool[Array, "b"] | Bool[Array, "b f"]


def draw_plan(key: PRNGKey, batch: int, levels: np.ndarray, anchor_levels: int) -> Plan:
    """sigma_s uniform on the non-zero `levels` of T_train, then (sigma_m, sigma_e) as
    `flow.schedule.triples` says.
    """
    k_start, k_triple = jax.random.split(key)
    train_levels, sigmas = len(levels) - 1, jnp.asarray(levels)
    start = jax.random.randint(k_start, (batch,), 0, train_levels)
    middle, end, exists = draw_triple(k_triple, start, triples(train_levels, anchor_levels))
    return Plan(sigmas[start], sigmas[middle], sigmas[end], exists)


def draw_chunk_plan(
    key: PRNGKey, batch: int, sizes: Sequence[int], levels: np.ndarray, anchor_levels: int
) -> Plan:
    """As `draw_plan` with a draw for each chunk, [B, F]; a chunk may also be clean already, sigma 0
    (CausVid).
    """
    plan = draw_plan(key, batch * len(sizes), levels, anchor_levels)
    clean = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 / len(levels), (batch * len(sizes),))
    spread = lambda value: jnp.repeat(
        value.reshape(batch, -1), np.array(sizes), axis=1, total_repeat_length=sum(sizes)
    )
    s, m, e = (spread(jnp.where(clean, 0.0, level)) for level in plan[:3])
    return Plan(s, m, e, spread(plan.exists & ~clean))


class Choice(NamedTuple):
    """What is static in an update: each value is a program of its own."""

    self_consistency: bool = False
    alignment: bool = False
    sequence: Literal["new", "on"] = "new"  # start a video, or go on with the one under way


class Draw(NamedTuple):
    """What is drawn for one rollout, shared by all clips and chunks.

    Levels are padded with zeros to one length.
    """

    levels: Any  # T(K)
    exit_step: Any
    first_levels: Any  # of the first chunk
    first_exit: Any
    sigma_m: Float[
        np.ndarray | Array, ""
    ]  # of the triple that starts at the exit step; that level where none is
    sigma_e: Any
    reference_levels: Any  # T(2K), all of whose num_steps the reference runs
    reference_exit: Any
    switch: Any = np.False_  # whether a video that goes on does so under another prompt


def draw_rollout(
    seed: int,
    index: int,
    num_steps: Sequence[int],
    probabilities: Sequence[float],
    first_steps: int,
    anchor_levels: int,
    levels: Callable[[int], np.ndarray],
    self_consistency: bool,
    alignment: float,
) -> tuple[Choice, Draw]:
    """K, then the exit step uniform on its K, then a triple of Eq. 9, then the coin of the
    alignment.

    Self-consistency is trained at the longest K only (Salt 3.3), where T_train is T(K); alignment
    at the others, whose reference takes twice as many steps. Every call draws the same amount, so
    that a term that is off changes no draw.

    Args:
      index: number of the optimizer call in the run.
      first_steps: K of the first chunk, which then runs to an exit of its own; 0 is as the
        others.
      levels: K -> T(K), K + 1 noise levels that end at 0.
      self_consistency: whether the term is on; alignment: the probability of that term.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    longest, u = max(num_steps), rng.random(4)
    k = int(
        num_steps[
            min(np.searchsorted(np.cumsum(probabilities), u[0], side="right"), len(num_steps) - 1)
        ]
    )
    exit_step = int(u[1] * k)
    train = levels(longest)
    padded = lambda k: np.pad(levels(k), (0, max(longest, first_steps) - k))

    table, start = triples(longest, anchor_levels), exit_step
    middle = end = start * (longest // k)
    exists = k == longest and table.probability[start].sum() > 0
    if exists:
        known = np.cumsum(table.probability[start][table.probability[start] > 0])
        column = min(np.searchsorted(known, u[2], side="right"), len(known) - 1)
        middle, end = int(table.middle[start, column]), int(table.end[start, column])
    first = first_steps or k
    first_exit = int(u[1] * first) if first_steps else exit_step
    aligned = bool(k < longest and u[3] < alignment)
    draw = Draw(
        padded(k),
        np.int32(exit_step),
        padded(first),
        np.int32(first_exit),
        train[middle],
        train[end],
        padded(min(2 * k, longest)),
        np.int32(min(2 * k, longest) - 1),
    )
    return Choice(self_consistency and exists, aligned), draw


def as_reference(draw: Draw, first_steps: int) -> Draw:
    """The draw of the rollout that cache alignment looks up to: every chunk runs all its
    num_steps.
    """
    first_exit = np.int32(first_steps - 1) if first_steps else draw.reference_exit
    return draw._replace(
        levels=draw.reference_levels, exit_step=draw.reference_exit, first_exit=first_exit
    )


def place_in_sequence(
    seed: int, call: int, first_frames: int, more_frames: int, max_frames: int, switch: float
) -> Literal["new", "on", "switch"]:
    """Whether optimizer call number `call` starts a video, goes on with it, or goes on under
    another prompt.

    A video has `first_frames`, then `more_frames` at each call while `max_frames` allow. With
    probability `switch` it changes its prompt once, at a call drawn uniformly.
    """
    calls = 1 + (max_frames - first_frames) // more_frames
    sequence, position = divmod(call, calls)
    rng = np.random.default_rng(np.random.SeedSequence([seed, sequence, 1]))
    at = int(rng.integers(1, calls)) if rng.random() < switch and calls > 1 else 0
    return "new" if position == 0 else "switch" if position == at else "on"
