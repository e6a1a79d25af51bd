"""What is drawn at each step: pure functions of a key or of (seed, index), so every host draws the
same without a broadcast. What decides which program runs is drawn with numpy, before anything runs
on a device.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from salt_jax.config.schema import Recipe
from salt_jax.flow.draws import draw_triple
from salt_jax.flow.schedule import Triples
from salt_jax.types import PRNGKey, Sigma


class LevelTriple(NamedTuple):
    """One triple of Salt Eq. 9 per example, or per frame; where there is none the levels are equal,
    `exists` False.
    """

    sigma_s: Sigma
    sigma_m: Sigma
    sigma_e: Sigma
    exists: Bool[Array, "b"] | Bool[Array, "b f"]


def draw_triples(key: PRNGKey, batch: int, levels: np.ndarray, table: Triples) -> LevelTriple:
    """sigma_s uniform on the non-zero `levels` of T_train, then (sigma_m, sigma_e) as
    `flow.schedule.triples` says.
    """
    k_start, k_triple = jax.random.split(key)
    train_levels, sigmas = len(levels) - 1, jnp.asarray(levels)
    start = jax.random.randint(k_start, (batch,), 0, train_levels)
    middle, end, exists = draw_triple(k_triple, start, table)
    return LevelTriple(sigmas[start], sigmas[middle], sigmas[end], exists)


def draw_chunk_triples(
    key: PRNGKey, batch: int, sizes: Sequence[int], levels: np.ndarray, table: Triples
) -> LevelTriple:
    """As `draw_triples` with a draw for each chunk, [B, F]; a chunk may also be clean already, with
    sigma 0 (CausVid).
    """
    triple = draw_triples(key, batch * len(sizes), levels, table)
    clean = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 / len(levels), (batch * len(sizes),))

    def spread(value):
        chunks, frames = value.reshape(batch, -1), sum(sizes)
        return jnp.repeat(chunks, np.array(sizes), axis=1, total_repeat_length=frames)

    s, m, e = (spread(jnp.where(clean, 0.0, level)) for level in triple[:3])
    return LevelTriple(s, m, e, spread(triple.exists & ~clean))


class Terms(NamedTuple):
    """The static part of an update: each value is a program of its own."""

    self_consistency: bool = False
    alignment: bool = False
    sequence: Literal["new", "on"] = "new"  # start a video, or continue the one under way


class Draw(NamedTuple):
    """What is drawn for one rollout, shared by all clips and chunks.

    Levels are padded with zeros to one length.
    """

    levels: Float[np.ndarray | Array, "n"]  # T(K)
    exit_step: np.int32 | Int[Array, ""]
    first_levels: Float[np.ndarray | Array, "n"]  # of the first chunk
    first_exit: np.int32 | Int[Array, ""]
    # of the triple that starts at the exit step; that level where none is
    sigma_m: np.float32 | Float[Array, ""]
    sigma_e: np.float32 | Float[Array, ""]
    reference_levels: Float[np.ndarray | Array, "n"]  # T(2K) of the reference
    reference_exit: np.int32 | Int[Array, ""]
    # whether a continued video changes its prompt
    switch: np.bool_ | Bool[Array, ""] = np.False_
    # number of a new video's first frame: of cyclic positions the start of any chunk of a period
    start: np.int32 | Int[Array, ""] = np.int32(0)


def draw_rollout(r: Recipe, iteration: int, call: int) -> tuple[Terms, Draw]:
    """K, then the exit step uniform on its K, then a triple of Eq. 9, then the coin of the
    alignment, and in streaming long tuning the place in its sequence, and of cyclic positions where
    a new video begins.

    Self-consistency is trained at the longest K only (Salt 3.3), where T_train is T(K); alignment
    at the others, whose reference takes twice as many steps. Every call draws the same amount, so a
    term that is off changes no draw.

    Args:
      call: number of the optimizer call in the run.
    """
    rng = np.random.default_rng(np.random.SeedSequence([r.seed, call]))
    o, longest, u = r.rollout, max(r.rollout.num_steps), rng.random(5)
    index = np.searchsorted(np.cumsum(o.probabilities), u[0], side="right")
    k = int(o.num_steps[min(index, len(o.num_steps) - 1)])
    exit_step = int(u[1] * k)
    train = r.levels(longest)

    def padded(k: int) -> np.ndarray:
        return np.pad(r.levels(k), (0, max(longest, o.first_steps) - k))

    table, start = r.triples, exit_step
    middle = end = start * (longest // k)
    exists = k == longest and table.probability[start].sum() > 0
    if exists:
        known = np.cumsum(table.probability[start][table.probability[start] > 0])
        column = min(np.searchsorted(known, u[2], side="right"), len(known) - 1)
        middle, end = int(table.middle[start, column]), int(table.end[start, column])
    first = o.first_steps or k
    first_exit = int(u[1] * first) if o.first_steps else exit_step
    begun = r.align.weight and iteration >= r.align.start
    can = k in aligned_steps(r) and exit_step >= r.align.lowest_exit
    coin = r.align.probability if begun and can else 0.0
    better = min(2 * k, longest)
    at_student = k < longest and r.align.reference_exit == "student"
    place = place_in_sequence(r, call)
    draw = Draw(
        levels=padded(k),
        exit_step=np.int32(exit_step),
        first_levels=padded(first),
        first_exit=np.int32(first_exit),
        sigma_m=train[middle],
        sigma_e=train[end],
        reference_levels=padded(better),
        reference_exit=np.int32(2 * exit_step if at_student else better - 1),
        switch=np.bool_(place == "switch"),
        start=np.int32(r.memory.chunk * int(u[4] * (r.memory.period // r.memory.chunk))),
    )
    self_consistency = bool(exists and r.loss.self_consistency > 0)
    sequence = "new" if place == "new" else "on"
    return Terms(self_consistency, bool(u[3] < coin), sequence), draw


def shorter_steps(r: Recipe) -> tuple[int, ...]:
    """K of a rollout below the largest, so that T(2K) exists."""
    return tuple(k for k in r.rollout.num_steps if k < max(r.rollout.num_steps))


def aligned_steps(r: Recipe) -> tuple[int, ...]:
    """K of the updates that can have cache alignment."""
    return r.align.num_steps or shorter_steps(r)


def as_reference(draw: Draw, r: Recipe) -> Draw:
    """The draw of cache alignment's reference rollout: T(2K), of which level 2i is level i of the
    student's T(K). Where the first chunk has steps of its own, those are the same.
    """
    first_exit = draw.reference_exit
    if r.rollout.first_steps:
        last = np.int32(r.rollout.first_steps - 1)
        first_exit = last if r.align.reference_exit == "last" else draw.first_exit
    return draw._replace(
        levels=draw.reference_levels, exit_step=draw.reference_exit, first_exit=first_exit
    )


def place_in_sequence(r: Recipe, call: int) -> Literal["new", "on", "switch"]:
    """Whether optimizer call number `call` starts a video, continues it, or continues it under
    another prompt.

    In streaming long tuning a video has the frames of a clip, then at each call those behind the
    overlap while `max_frames` allow. With probability `switch` it changes its prompt once, at a
    call drawn uniformly.
    """
    if not r.stream.max_frames:
        return "new"
    first, more = r.clip_shape[0], r.clip_shape[0] - r.stream.overlap
    calls = 1 + (r.stream.max_frames - first) // more
    sequence, position = divmod(call, calls)
    rng = np.random.default_rng(np.random.SeedSequence([r.seed, sequence, 1]))
    at = int(rng.integers(1, calls)) if rng.random() < r.stream.switch and calls > 1 else 0
    return "new" if position == 0 else "switch" if position == at else "on"
