"""The forward passes of a distillation, for the planners: of one update, or the mean of a run."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from salt_jax.config.schema import Recipe
from salt_jax.models.visibility import chunk_pairs
from salt_jax.rollout.draws import Draw, aligned_steps, as_reference
from salt_jax.stages import teachers
from salt_jax.stages.stage import Gradient, Memory, Pass, Update


class Mix(NamedTuple):
    """How much of everything an update has: of one draw, or the mean over a run's."""

    first: float = 0.0  # evaluations of a rollout's first chunk, the clean pass among them
    rest: float = 0.0  # of each other chunk
    reference_first: float = 0.0  # the same of the reference of cache alignment
    reference_rest: float = 0.0
    self_consistency: float = 0.0  # 1 or 0, or the share of the updates that have it
    alignment: float = 0.0
    on: float = 0.0  # continuing a video under way
    switch: float = 0.0  # reading its cache again under another prompt


def mix_of(recipe: Recipe, update: Update, draw: Draw | None) -> Mix:
    """Of one update."""
    terms, on = update.terms, update.terms.sequence != "new"
    mix = Mix(
        self_consistency=float(terms.self_consistency),
        alignment=float(terms.alignment),
        on=float(on),
    )
    if draw is None:
        return mix
    reference, more = as_reference(draw, recipe), 1.0 + recipe.memory.clean_pass
    return mix._replace(
        first=int(draw.first_exit) + more,
        rest=int(draw.exit_step) + more,
        reference_first=mix.alignment * (int(reference.first_exit) + more),
        reference_rest=mix.alignment * (int(reference.exit_step) + more),
        switch=float(on and bool(draw.switch)),
    )


def mean_mix(recipe: Recipe) -> Mix:
    """The mean over a run's draws, once cache alignment has begun: see
    `rollout.draws.draw_rollout`.
    """
    on = float(recipe.loss.self_consistency > 0)
    if recipe.video != "rollout":
        return Mix(self_consistency=on)
    r, m, a, longest = recipe.rollout, recipe.stream, recipe.align, max(recipe.rollout.num_steps)
    drawn = list(zip(r.num_steps, r.probabilities, strict=True))
    clean = recipe.memory.clean_pass
    rest = sum(p * (k + 1) / 2 for k, p in drawn) + clean
    aligned = [  # each K and exit step that has it: evaluations of the reference, the share
        (2 * k if a.reference_exit == "last" else 2 * e + 1, p * a.probability / k)
        for k, p in drawn
        for e in range(a.lowest_exit, k)
        if a.weight and k in aligned_steps(recipe)
    ]
    first = r.first_steps if a.reference_exit == "last" else (r.first_steps + 1) / 2
    exists = (recipe.triples.probability.sum(1) > 0).mean()
    at_longest = sum(p for k, p in drawn if k == longest)
    new = recipe.clip_shape[0] - m.overlap
    calls = 1 + (m.max_frames - recipe.clip_shape[0]) // new if m.max_frames else 1
    return Mix(
        first=(r.first_steps + 1) / 2 + clean if r.first_steps else rest,
        rest=rest,
        reference_first=sum(
            (p * ((first if r.first_steps else n) + clean) for n, p in aligned), 0.0
        ),
        reference_rest=sum((p * (n + clean) for n, p in aligned), 0.0),
        self_consistency=float(on * at_longest * exists),
        alignment=sum((p for _, p in aligned), 0.0),
        on=1 - 1 / calls,
        switch=m.switch / calls if calls > 1 else 0.0,
    )


def passes(recipe: Recipe, moves: str, mix: Mix) -> list[Pass]:
    """Those of an update of the student or the critic."""
    wan, frames, layers = recipe.wan, recipe.clip_shape[0], recipe.align.layers
    judge = recipe.features_wan
    whole = ((frames, frames),)
    made = list(rollout_passes(recipe, "student: rollout", mix.first, mix.rest, mix))
    if moves == "critic":
        if recipe.video != "rollout":
            made += video_passes(recipe, "student: one step", 1.0, mix)
        return [*_there(made), Pass("critic", wan, whole, 1.0, "weights")]
    seen = mix.alignment
    made += video_passes(recipe, "student: replay", 1.0, mix, "weights")
    composed = recipe.loss.stop_gradient == "composed"
    second = "none" if composed else "weights"
    made += video_passes(recipe, "student: self-consistency", mix.self_consistency, mix, second)
    made += rollout_passes(
        recipe, "student: reference rollout", mix.reference_first, mix.reference_rest, mix
    )
    made += [
        Pass("critic: score", wan, whole, 1.0),
        *teachers.passes(recipe),
        Pass("features", judge, whole, seen, "activations", layers),
        Pass("features: forward", judge, whole, seen, "none", layers),
    ]
    return _there(made)


def _there(made: Iterable[Pass]) -> list[Pass]:
    """Those that the update has: a clip of one chunk has none after the first."""
    return [p for p in made if p.pairs and (p.times or p.reads)]


def memory(recipe: Recipe, update: Update) -> Memory:
    """Cache alignment has features with gradient, and a reference, whose rolling window writes a
    new cache at each commit. It is never with self-consistency: that is at the longest K.
    """
    rolls = recipe.video == "rollout"
    going = recipe.memory.capacity(0) - recipe.stream.overlap if recipe.stream.max_frames else 0
    terms = update.terms
    judge = recipe.features_wan
    share = recipe.align.layers * judge.dim / (recipe.wan.num_layers * recipe.wan.dim)
    second = terms.self_consistency and recipe.loss.stop_gradient != "composed"
    return Memory(
        caches=rolls * (1 + (terms.alignment and recipe.memory.window > 0)),
        slots=recipe.clip_shape[0] + max(going, 0),
        forwards=1.0 + second + share * terms.alignment,
    )


def student_pairs(recipe: Recipe) -> list[tuple[tuple[int, int], ...]]:
    """The frames that each chunk of the differentiated forward sees, of a new video and of a
    continued one.
    """
    frames = recipe.clip_shape[0]
    if not recipe.causal:
        return [((frames, frames),)]
    pairs = [tuple(chunk_pairs(recipe.memory, frames))]
    if recipe.stream.max_frames:
        slots = recipe.memory.capacity(0)
        pairs.append(tuple(chunk_pairs(recipe.memory, frames - recipe.stream.overlap, slots)))
    return pairs


def video_passes(
    recipe: Recipe, name: str, times: float, mix: Mix, gradient: Gradient = "none"
) -> Iterator[Pass]:
    """The student forward that gets gradient: all chunks at their exit step, or the whole clip."""
    new, *going = student_pairs(recipe)
    yield Pass(name, recipe.wan, new, times * (1 - mix.on), gradient)
    for pairs in going:
        yield Pass(name, recipe.wan, pairs, times * mix.on, gradient)


def rollout_passes(
    recipe: Recipe, name: str, first: float, rest: float, mix: Mix
) -> Iterator[Pass]:
    """A clip's chunks, each `rest` times, or `first` times the first one of a video, under one
    reading of the prompt.
    """
    if recipe.video != "rollout" or not first + rest:
        return
    new, *going = student_pairs(recipe)
    yield Pass(name, recipe.wan, new[:1], (1 - mix.on) * first, reads=1.0)
    yield Pass(name, recipe.wan, new[1:], (1 - mix.on) * rest, reads=0.0)
    for pairs in going:
        yield Pass(name, recipe.wan, pairs, mix.on * rest, reads=0.0)
    if mix.switch:
        policy, slots = recipe.memory, recipe.memory.capacity(0)
        everything = replace(policy, window=0, sink=0, first=policy.chunk)
        again = tuple(chunk_pairs(everything, slots - slots % policy.chunk))
        yield Pass(name, recipe.wan, again, mix.switch)
