"""What is drawn follows Eq. 9 and nothing but the key, or the seed and the number of the call."""

import functools
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from salt_jax.config.method import Align, Loss, Rollout, Schedule, Stream
from salt_jax.config.schema import Recipe
from salt_jax.config.sections import Data
from salt_jax.flow.schedule import explicit, grid, triples
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.rollout.draws import (
    as_reference,
    draw_chunk_triples,
    draw_rollout,
    draw_triples,
    place_in_sequence,
)

BATCH = 20_000


def drawn(seed, anchors=4):
    return jax.tree.map(
        np.asarray, draw_triples(jax.random.key(seed), BATCH, grid(8, 5.0), triples(8, anchors))
    )


@pytest.mark.parametrize("anchors", [2, 4, 8])
def test_levels_fall_and_lie_on_their_grids(anchors):
    triple = drawn(0, anchors)
    assert set(triple.sigma_s.tolist()) == set(grid(8, 5.0)[:-1].tolist())
    some = triple.exists
    assert np.all((triple.sigma_s > triple.sigma_m)[some]) and np.all(
        (triple.sigma_m > triple.sigma_e)[some]
    )
    assert set(triple.sigma_m[some].tolist()) <= set(grid(8, 5.0).tolist())
    room = grid(8, 5.0)[1]  # a middle above the end needs a level between it and pure noise
    assert set(triple.sigma_e[some].tolist()) == {
        e for e in grid(anchors, 5.0).tolist() if e < room
    }


def test_the_smallest_level_has_no_triple_and_three_equal_levels():
    triple = drawn(1)
    none = ~triple.exists
    np.testing.assert_array_equal(none, triple.sigma_s == grid(8, 5.0)[7])
    np.testing.assert_array_equal(triple.sigma_m[none], triple.sigma_s[none])
    np.testing.assert_array_equal(triple.sigma_e[none], triple.sigma_s[none])


def test_starts_are_uniform_and_the_rest_is_eq_9_given_the_start():
    triple, table, levels = drawn(2), triples(8, 4), grid(8, 5.0)
    for start in range(8):
        here = triple.sigma_s == levels[start]
        assert here.mean() == pytest.approx(1 / 8, abs=0.01)
        for m, e, p in zip(
            table.middle[start], table.end[start], table.probability[start], strict=True
        ):
            if p:
                share = np.mean(
                    (triple.sigma_m[here] == levels[m]) & (triple.sigma_e[here] == levels[e])
                )
                assert share == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / here.sum()) + 1e-6)


def test_the_key_decides_everything():
    once, again, other = drawn(3), drawn(3), drawn(4)
    chex.assert_trees_all_equal(once, again)
    assert np.mean(once.sigma_s == other.sigma_s) == pytest.approx(1 / 8, abs=0.02)


def test_the_same_inside_a_compiled_step():
    compiled = jax.jit(lambda key: draw_triples(key, 64, grid(8, 5.0), triples(8, 4)))(
        jax.random.key(5)
    )
    chex.assert_trees_all_equal(
        compiled, draw_triples(jax.random.key(5), 64, grid(8, 5.0), triples(8, 4))
    )


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        draw_triples(jax.random.key(6), 4, grid(8, 5.0), triples(8, 4))


def test_listed_levels_take_the_place_of_the_grid():
    """Eq. 9 works on indices: with three levels the triples are (0, 1, 2), (0, 1 or 2, 3) and
    (1, 2, 3).
    """
    levels = explicit((1000, 757, 522))
    triple = jax.tree.map(
        np.asarray, draw_triples(jax.random.key(0), 2000, levels, triples(len(levels) - 1, 3))
    )
    assert set(triple.sigma_s.tolist()) == set(levels[:3].tolist())
    found = {
        tuple(levels.tolist().index(x) for x in row[:3])
        for row in zip(*triple, strict=True)
        if row[3]
    }
    assert found == {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)}
    recipe = Recipe(
        rollout=Rollout((3,), (1.0,)),
        schedule=Schedule(3, 3, shift=5.0, levels=(1000.0, 757.0, 522.0)),
    )
    _, draw = draw_rollout(recipe, iteration=0, call=3)
    np.testing.assert_array_equal(draw.levels, levels)


# Chunks: a level for each.

SIZES = (1, 3, 3)


@functools.cache
def drawn_chunks(seed, batch=4000):
    """Levels of one frame of each chunk, [batch, 3]."""
    draw = jax.jit(lambda key: draw_chunk_triples(key, batch, SIZES, grid(8, 5.0), triples(8, 4)))
    triple = jax.tree.map(np.asarray, draw(jax.random.key(seed)))
    for value in triple:
        assert value.shape == (batch, 7)
        np.testing.assert_array_equal(value[:, 1:4], value[:, [1, 1, 1]])
        np.testing.assert_array_equal(value[:, 4:], value[:, [4, 4, 4]])
    return triple._replace(
        **{name: value[:, [0, 1, 4]] for name, value in triple._asdict().items()}
    )


def test_chunks_have_levels_of_their_own_and_each_may_be_clean():
    """A chunk is clean as often as it is at any of the levels; chunks know nothing of each
    other.
    """
    triple, levels = drawn_chunks(0), grid(8, 5.0)
    for chunk in range(3):
        for level in levels:
            assert np.mean(triple.sigma_s[:, chunk] == level) == pytest.approx(1 / 9, abs=0.025)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = np.mean(triple.sigma_s[:, one] == triple.sigma_s[:, other])
        assert same == pytest.approx(1 / 9, abs=0.025)


def test_chunks_have_triples_of_eq_9_or_three_equal_levels():
    triple, table, levels = drawn_chunks(1), triples(8, 4), grid(8, 5.0)
    clean, last = triple.sigma_s == 0, triple.sigma_s == levels[7]
    np.testing.assert_array_equal(triple.exists, ~(clean | last))
    np.testing.assert_array_equal(triple.sigma_m[~triple.exists], triple.sigma_s[~triple.exists])
    np.testing.assert_array_equal(triple.sigma_e[~triple.exists], triple.sigma_s[~triple.exists])
    for start in range(7):
        here = triple.sigma_s == levels[start]
        for m, e, p in zip(
            table.middle[start], table.end[start], table.probability[start], strict=True
        ):
            if p:
                share = np.mean(
                    (triple.sigma_m[here] == levels[m]) & (triple.sigma_e[here] == levels[e])
                )
                assert share == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / here.sum()) + 1e-6)


# Rollouts: one draw for each optimizer call, on the host.

UPDATES, PROBABILITIES, CALLS = (2, 4, 8), (0.2, 0.3, 0.5), 2000


def recipe_of(
    seed=0,
    first_steps=0,
    self_consistency=1.0,
    alignment=1.0,
    start=0,
    coin=0.5,
    nearest_ends=0,
    **align,
):
    """A run with these weights of the terms."""
    return Recipe(
        seed=seed,
        rollout=Rollout(UPDATES, PROBABILITIES, first_steps),
        schedule=Schedule(8, 4, shift=5.0, nearest_ends=nearest_ends),
        loss=Loss(self_consistency),
        align=Align(alignment, start, coin, **align),
    )


@functools.cache
def rollouts(calls=CALLS, **changes):
    """Call by call."""
    recipe = recipe_of(**changes)
    return [draw_rollout(recipe, iteration=call, call=call) for call in range(calls)]


def number(levels):
    """K of levels that are padded with zeros."""
    return int(np.argmax(levels == 0))


def by_updates(pairs):
    found = {k: [] for k in UPDATES}
    for terms, draw in pairs:
        found[number(draw.levels)].append((terms, draw))
    return found


def near_share(found, count, share):
    """Within five standard deviations of a coin."""
    share = float(share)
    assert found / count == pytest.approx(
        share, abs=5 * np.sqrt(share * (1 - share) / count) + 1e-9
    )


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_rollouts_have_their_numbers_of_updates_as_often_as_told_and_exit_anywhere():
    found = by_updates(rollouts())
    for k, share in zip(UPDATES, PROBABILITIES, strict=True):
        near_share(len(found[k]), CALLS, share)
        exits = [int(draw.exit_step) for _, draw in found[k]]
        for exit_step in range(k):
            near_share(exits.count(exit_step), len(exits), 1 / k)


def test_levels_of_a_rollout_are_those_of_its_grid():
    for _, draw in rollouts():
        k = number(draw.levels)
        np.testing.assert_array_equal(draw.levels, np.pad(grid(k, 5.0), (0, 8 - k)))
        assert draw.levels.dtype == np.float32 and draw.exit_step.dtype == np.int32
        assert draw.levels[draw.exit_step] > 0


def test_triples_start_where_the_longest_rollout_exits_and_are_those_of_eq_9():
    levels, table, found = grid(8, 5.0), triples(8, 4), by_updates(rollouts())
    pairs = {start: [] for start in range(8)}
    for terms, draw in found[8]:
        start = int(draw.exit_step)
        assert terms.self_consistency == (start != 7), "only the smallest level has no triple"
        if terms.self_consistency:
            assert draw.levels[start] > draw.sigma_m > draw.sigma_e
        else:
            assert draw.sigma_m == draw.sigma_e == draw.levels[start]
        pairs[start].append((float(draw.sigma_m), float(draw.sigma_e)))
    for start in range(7):
        for m, e, p in zip(
            table.middle[start], table.end[start], table.probability[start], strict=True
        ):
            if p:
                near_share(
                    pairs[start].count((float(levels[m]), float(levels[e]))), len(pairs[start]), p
                )


def test_shorter_rollouts_have_no_triple_and_three_equal_levels():
    for k in (2, 4):
        for terms, draw in by_updates(rollouts())[k]:
            assert not terms.self_consistency
            assert draw.sigma_m == draw.sigma_e == draw.levels[draw.exit_step]


def test_alignment_is_a_coin_at_shorter_rollouts_only():
    for coin in (0.0, 0.25, 1.0):
        found = by_updates(rollouts(coin=coin, calls=600))
        assert not any(terms.alignment for terms, _ in found[8])
        for k in (2, 4):
            near_share(sum(terms.alignment for terms, _ in found[k]), len(found[k]), coin)


def test_alignment_begins_at_its_iteration():
    pairs = rollouts(start=300, coin=1.0, calls=600)
    assert not any(terms.alignment for terms, _ in pairs[:300])
    assert all(terms.alignment == (number(draw.levels) < 8) for terms, draw in pairs[300:])


def test_the_reference_takes_twice_as_many_updates_and_all_of_them():
    for _, draw in rollouts(calls=200):
        k = number(draw.levels)
        twice = min(2 * k, 8)
        np.testing.assert_array_equal(
            draw.reference_levels, np.pad(grid(twice, 5.0), (0, 8 - twice))
        )
        assert draw.reference_exit == twice - 1


def test_the_release_ends_shortcuts_at_the_two_nearest_of_four():
    """Boundaries are levels 0, 2, 4, 6 of T(8) and 0; those below the next level of T(8) count; of
    these one of the two nearest, then a middle uniform between.
    """
    wanted = {
        0: {(1, 2): 1 / 2} | {(m, 4): 1 / 6 for m in (1, 2, 3)},
        1: {(m, 4): 1 / 4 for m in (2, 3)} | {(m, 6): 1 / 8 for m in (2, 3, 4, 5)},
        2: {(3, 4): 1 / 2} | {(m, 6): 1 / 6 for m in (3, 4, 5)},
        3: {(m, 6): 1 / 4 for m in (4, 5)} | {(m, 8): 1 / 8 for m in (4, 5, 6, 7)},
        4: {(5, 6): 1 / 2} | {(m, 8): 1 / 6 for m in (5, 6, 7)},
        5: {(m, 8): 1 / 2 for m in (6, 7)},
        6: {(7, 8): 1.0},
        7: {},
    }
    table = triples(8, 4, nearest_ends=2)
    for start, pairs in wanted.items():
        rows = zip(*(x[start].tolist() for x in table), strict=True)
        assert {(m, e): p for m, e, p in rows if p} == pytest.approx(pairs)
    level = {float(value): i for i, value in enumerate(grid(8, 5.0))}
    for terms, draw in by_updates(rollouts(nearest_ends=2))[8]:
        pair = level[float(draw.sigma_m)], level[float(draw.sigma_e)]
        assert not terms.self_consistency or pair in wanted[int(draw.exit_step)]


def test_the_release_aligns_two_steps_that_do_not_stop_at_pure_noise():
    told = {"num_steps": (2,), "lowest_exit": 1, "coin": 1.0, "calls": 400}
    for terms, draw in rollouts(**told):
        assert terms.alignment == (number(draw.levels) == 2 and draw.exit_step == 1)


def test_a_reference_that_stops_with_the_student_stops_at_its_level():
    for _, draw in rollouts(reference_exit="student", calls=400):
        reference = as_reference(draw, recipe_of(reference_exit="student"))
        if number(draw.levels) < 8:
            assert reference.levels[reference.exit_step] == draw.levels[draw.exit_step]
            assert number(reference.levels) == 2 * number(draw.levels)


@pytest.mark.parametrize("first", [0, 4])
def test_every_chunk_of_the_reference_runs_all_its_updates(first):
    """As a draw it has the reference's levels; a first chunk with a schedule of its own keeps
    it.
    """
    for _, draw in rollouts(first_steps=first, calls=200 if not first else 600):
        reference = as_reference(draw, recipe_of(first_steps=first))
        np.testing.assert_array_equal(reference.levels, draw.reference_levels)
        assert (
            reference.levels[reference.exit_step] > 0 == reference.levels[reference.exit_step + 1]
        )
        levels = reference.first_levels if first else reference.levels
        assert levels[reference.first_exit] > 0 == levels[reference.first_exit + 1]
        np.testing.assert_array_equal(reference.first_levels, draw.first_levels)


def test_a_rollout_is_a_function_of_the_seed_and_the_call():
    again = rollouts.__wrapped__(calls=200)
    for one, other in zip(rollouts()[:200], again, strict=True):
        assert one[0] == other[0] and same(one[1], other[1])
    ks = lambda pairs: [number(draw.levels) for _, draw in pairs]
    agree = np.mean(np.array(ks(rollouts(seed=1, calls=600))) == np.array(ks(rollouts()))[:600])
    assert agree == pytest.approx(0.2**2 + 0.3**2 + 0.5**2, abs=0.1), (
        "seeds know nothing of each other"
    )


def test_a_video_with_cyclic_positions_begins_at_any_chunk_of_a_period():
    """Each equally often, by (seed, call); the other draws are what they are without."""
    recipe = Recipe(seed=5)
    turned = replace(recipe, memory=CachePolicy(3, positions="cyclic", period=9))
    pairs = [[draw_rollout(r, 0, call) for call in range(600)] for r in (recipe, turned)]
    for (terms, plain), (same_terms, draw) in zip(*pairs, strict=True):
        assert terms == same_terms and plain.start == 0
        assert same(plain, draw._replace(start=plain.start))
        assert as_reference(draw, recipe).start == draw.start
    starts, counts = np.unique([draw.start for _, draw in pairs[1]], return_counts=True)
    assert starts.tolist() == [0, 3, 6] and counts.min() > 160
    assert same(draw_rollout(turned, 0, 7)[1], pairs[1][7][1])


def test_a_term_that_is_off_changes_no_draw():
    for off in ("self_consistency", "alignment"):
        for (terms, draw), (without, other) in zip(
            rollouts(), rollouts(calls=500, **{off: 0.0}), strict=False
        ):
            assert same(draw, other)
            assert without == terms._replace(**{off: False})


def test_the_first_chunk_may_have_updates_of_its_own_and_exits_anywhere_in_them():
    for first in (4, 12):
        pairs, exits = rollouts(first_steps=first, calls=600), []
        for (_, draw), (_, other) in zip(pairs, rollouts(), strict=False):
            size = max(8, first) + 1
            np.testing.assert_array_equal(
                draw.first_levels, np.pad(grid(first, 5.0), (0, size - first - 1))
            )
            assert len(draw.levels) == len(draw.reference_levels) == size
            assert number(draw.levels) == number(other.levels) and draw.exit_step == other.exit_step
            exits.append(int(draw.first_exit))
        for exit_step in range(first):
            near_share(exits.count(exit_step), len(exits), 1 / first)
    for _, draw in rollouts(calls=100):  # as the others
        np.testing.assert_array_equal(draw.first_levels, draw.levels)
        assert draw.first_exit == draw.exit_step


def test_all_draws_have_one_form_so_that_one_program_serves_them():
    forms = {tuple((np.shape(z), np.result_type(z)) for z in draw) for _, draw in rollouts()}
    assert len(forms) == 1


# Streams: a video goes on over many calls.


def sequences(calls, seed=0, first=9, more=6, most=40, switch=0.5):
    """Places of consecutive calls, cut before each new video."""
    found, data = [], Data("latents", clip=(first, 4, 4))
    recipe = Recipe(seed=seed, data=data, stream=Stream(most, first - more, switch))
    for call in range(calls):
        place = place_in_sequence(recipe, call)
        found += [[]] if place == "new" else []
        found[-1].append(place)
    return found[:-1]  # the last one may not be over


@pytest.mark.parametrize(
    ("first", "more", "most"), [(9, 6, 40), (9, 6, 15), (21, 18, 240), (9, 9, 90), (9, 6, 9)]
)
def test_videos_are_as_long_as_allowed_and_no_longer(first, more, most):
    for video in sequences(400, first=first, more=more, most=most):
        frames = first + more * (len(video) - 1)
        assert frames <= most < frames + more


@pytest.mark.parametrize("switch", [0.0, 0.5, 1.0])
def test_a_video_changes_its_prompt_at_most_once_at_any_call_but_its_first(switch):
    """40 frames are six calls of 9 and 6."""
    videos = sequences(6000, switch=switch)
    at = [video.index("switch") for video in videos if "switch" in video]
    assert all(
        video[0] == "new" and video.count("new") == 1 and video.count("switch") <= 1
        for video in videos
    )
    near_share(len(at), len(videos), switch)
    for position in range(1, 6) if at else ():
        near_share(at.count(position), len(at), 1 / 5)


def test_the_place_of_a_call_is_a_function_of_the_seed_and_the_call():
    assert sequences(600) == sequences(600) != sequences(600, seed=1)
