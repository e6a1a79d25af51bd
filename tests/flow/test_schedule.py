"""Noise levels against the printed tables, and triples against Eq. 9 enumerated by noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.draws import draw_renoise_sigma, draw_triple
from salt_jax.flow.schedule import explicit, grid, shift, triples

# 1000 sigma of the eight levels u = 1, 7/8, ..., 1/8, as the peers' schedulers warp them.
SHIFTED = {
    1.0: [1000, 875, 750, 625, 500, 375, 250, 125],
    5.0: [1000, 972.22, 937.5, 892.86, 833.33, 750.0, 625.0, 416.67],
    8.0: [1000, 982.46, 960.0, 930.23, 888.89, 827.59, 727.27, 533.33],
    12.0: [1000, 988.24, 972.97, 952.38, 923.08, 878.05, 800.0, 631.58],
}


@pytest.mark.parametrize("amount", SHIFTED)
def test_shift_and_grid_give_the_printed_levels(amount):
    u = np.array(SHIFTED[1.0]) / 1000
    np.testing.assert_allclose(1000 * shift(u, amount), SHIFTED[amount], atol=0.005)
    assert [1000 * shift(x, amount) for x in u.tolist()] == pytest.approx(
        SHIFTED[amount], abs=0.005
    )
    np.testing.assert_allclose(1000 * grid(8, amount)[:-1], SHIFTED[amount], atol=0.005)


def test_four_updates_at_shift_5():
    np.testing.assert_allclose(1000 * grid(4, 5.0), [1000, 937.5, 833.33, 625, 0], atol=0.005)
    np.testing.assert_allclose(1000 * grid(2, 5.0), [1000, 833.33, 0], atol=0.005)


def test_shifts_multiply():
    """Shift by a, then by b, is shift by a b; ends stay where they are."""
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift(shift(u, 3.0), 4.0), shift(u, 12.0), rtol=1e-12)
    np.testing.assert_array_equal(shift(u, 1.0), u)
    assert (shift(0.0, 5.0), shift(1.0, 5.0)) == (0, 1)


@pytest.mark.parametrize("amount", SHIFTED)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 16])
def test_grid_falls_from_noise_to_clean(num_steps, amount):
    levels = grid(num_steps, amount)
    assert levels.shape == (num_steps + 1,) and levels.dtype == np.float32
    assert levels[0] == 1 and levels[-1] == 0
    assert np.all(np.diff(levels) < 0)


@pytest.mark.parametrize("amount", SHIFTED)
def test_grids_nest(amount):
    """Bit for bit, so that the noise of a level can be shared between schedules."""
    one, two, four, eight = (set(grid(k, amount).tolist()) for k in (1, 2, 4, 8))
    assert one < two < four < eight


def test_a_grid_without_updates_is_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        grid(0, 5.0)


@pytest.mark.parametrize(
    "timesteps", [(1000, 757, 522), (1000, 757, 522, 0), [1000.0, 757.0, 522.0, 0.0]]
)
def test_published_levels_are_a_thousandth_of_their_timesteps_and_end_clean(timesteps):
    """CausVid's list is of shift 8: steps 36 and 44 of 50 (its generate_ode_pairs.py)."""
    levels = explicit(timesteps)
    assert (
        levels.dtype == np.float32 and levels.tolist() == np.float32([1, 0.757, 0.522, 0]).tolist()
    )
    np.testing.assert_allclose(
        levels[1:3], [shift(1 - 36 / 50, 8.0), shift(1 - 44 / 50, 8.0)], atol=5e-4
    )


def test_a_list_may_have_one_level_or_the_levels_of_a_grid():
    assert explicit((999,)).tolist() == [np.float32(0.999), 0]
    np.testing.assert_allclose(explicit((1000, 937.5, 2500 / 3, 625)), grid(4, 5.0), rtol=1e-7)


@pytest.mark.parametrize(
    ("timesteps", "told"),
    [
        ((), "at least one"),
        ((0,), "at least one"),
        ((1000, 0, 0), "above 0"),
        ((1000, 522, 757), "falling"),
        ((1000, 757, 757), "no two the same"),
        ((1000, 999.99999999), "no two the same"),
        ((1001, 500), "up to 1000"),
        ((1000, -5), "above 0"),
        ((1000, float("nan")), "finite"),
        ((float("inf"), 500), "finite"),
        ((1000, "x"), "numbers"),
        ((1000, None), "finite|numbers"),
        (((1000, 500),), "a list of"),
        ((1.0, 0.757, 0.522), "1000 sigma and begin at 990 or above"),
        ((757, 522), "begin at 990 or above: a video starts from noise"),
    ],
)
def test_what_is_no_list_of_levels_is_refused_in_one_sentence(timesteps, told):
    with pytest.raises(ValueError, match=told) as error:
        explicit(timesteps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (
            5.0,
            [
                (1, 0.9722, 0.9375),
                (0.9375, 0.8929, 0.8333),
                (0.8333, 0.75, 0.625),
                (0.625, 0.4167, 0),
            ],
        ),
        (
            12.0,
            [
                (1, 0.9882, 0.9730),
                (0.9730, 0.9524, 0.9231),
                (0.9231, 0.8780, 0.8),
                (0.8, 0.6316, 0),
            ],
        ),
    ],
)
def test_the_only_midpoints_between_the_levels_of_t4_are_those_of_t8(amount, expected):
    """The triples of the semigroup defect; each is also a triple of Eq. 9."""
    levels, table = grid(8, amount), triples(8, 4)
    for start, triple in zip((0, 2, 4, 6), expected, strict=True):
        pairs = zip(table.middle[start], table.end[start], table.probability[start], strict=True)
        (found,) = [(m, e) for m, e, p in pairs if p and e == start + 2]
        np.testing.assert_allclose(levels[[start, *found]], triple, atol=6e-5)


@pytest.mark.parametrize(
    ("anchors", "counts"), [(4, [16, 12, 9, 6, 4, 2, 1, 0]), (8, [28, 21, 15, 10, 6, 3, 1, 0])]
)
def test_number_of_triples_that_start_at_each_level(anchors, counts):
    assert (triples(8, anchors).probability > 0).sum(1).tolist() == counts


def enumerated(train_levels, anchor_levels):
    """Eq. 9 as it is written, by noise level: {start: {(middle, end): probability}}."""
    train, anchors = grid(train_levels, 5.0).tolist(), grid(anchor_levels, 5.0).tolist()
    found = {}
    for s in train[:-1]:
        between = {e: [m for m in train if e < m < s] for e in anchors}
        valid = [e for e in anchors if between[e]]
        found[s] = {(m, e): 1 / len(valid) / len(between[e]) for e in valid for m in between[e]}
    return found


@pytest.mark.parametrize(
    ("train", "anchors"), [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (4, 4), (2, 1), (1, 1)]
)
def test_triples_are_those_of_equation_9(train, anchors):
    table, levels = triples(train, anchors), grid(train, 5.0).tolist()
    expected = enumerated(train, anchors)
    assert len(table.probability) == train
    for start, (middles, ends, probabilities) in enumerate(zip(*table, strict=True)):
        rows = [
            (levels[m], levels[e], p)
            for m, e, p in zip(middles, ends, probabilities, strict=True)
            if p
        ]
        assert len(rows) == len(expected[levels[start]])
        assert {(m, e): p for m, e, p in rows} == pytest.approx(expected[levels[start]])


def test_probabilities_by_hand():
    """From pure noise with anchors T(4): each end 1/4; seven middles share the last one."""
    table = triples(8, 4)
    of = {
        (m, e): p
        for m, e, p in zip(table.middle[0], table.end[0], table.probability[0], strict=True)
        if p
    }
    assert of[1, 2] == pytest.approx(1 / 4)
    assert of[7, 8] == of[1, 8] == pytest.approx(1 / 28)
    np.testing.assert_allclose(table.probability.sum(1), [1] * 7 + [0], atol=1e-6)


def test_anchors_outside_the_training_grid_are_refused():
    with pytest.raises(ValueError, match=r"anchor_levels=3 must divide train_levels=8"):
        triples(8, 3)


@pytest.mark.parametrize("anchors", [4, 8])
def test_triples_are_drawn_as_often_as_tabulated(anchors):
    table, draws = triples(8, anchors), 4000
    start = np.repeat(np.arange(8), draws)
    middle, end, exists = jax.jit(lambda key, start: draw_triple(key, start, table))(
        jax.random.key(0), start
    )
    middle, end, exists = (np.asarray(a).reshape(8, draws) for a in (middle, end, exists))
    assert exists[:7].all() and not exists[7].any()
    assert np.all(middle[7] == 7) and np.all(end[7] == 7)
    for row in range(7):
        column = table.probability[row] > 0
        expected = draws * table.probability[row][column]
        pairs = zip(table.middle[row][column], table.end[row][column], strict=True)
        seen = np.array([np.sum((middle[row] == m) & (end[row] == e)) for m, e in pairs])
        assert seen.sum() == draws  # nothing else was drawn
        chi2, freedom = np.sum((seen - expected) ** 2 / expected), len(seen) - 1
        assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 1e-9


def test_draws_of_neighbours_are_independent_and_follow_the_key():
    table, start = triples(8, 8), jnp.zeros(4000, jnp.int32)
    middle, end, _ = draw_triple(jax.random.key(1), start, table)
    again, _, _ = draw_triple(jax.random.key(1), start, table)
    other, _, _ = draw_triple(jax.random.key(2), start, table)
    np.testing.assert_array_equal(middle, again)
    assert np.mean(np.asarray(middle) == np.asarray(other)) < 0.5
    assert abs(np.corrcoef(end[:-1], end[1:])[0, 1]) < 0.06


def test_mean_of_the_clamped_thousand_levels():
    k = np.arange(1000) / 1000
    assert 1000 * np.clip(shift(k, 5.0), 0.02, 0.98).mean() == pytest.approx(745.7, abs=0.05)


@pytest.mark.parametrize(
    ("amount", "mean", "at_highest", "at_lowest"),
    [(5.0, 0.7457, 0.093, 0.004), (12.0, None, 0.197, None)],
)
def test_levels_at_which_teacher_and_critic_judge(amount, mean, at_highest, at_lowest):
    sigma = np.asarray(draw_renoise_sigma(jax.random.key(3), 200_000, amount, 0.02, 0.98))
    assert sigma.shape == (200_000,) and sigma.dtype == np.float32
    assert sigma.min() >= np.float32(0.02) and sigma.max() <= np.float32(0.98)
    assert np.mean(sigma == np.float32(0.98)) == pytest.approx(at_highest, abs=0.003)
    assert np.median(sigma) == pytest.approx(shift(0.5, amount), abs=0.003)
    if mean is not None:
        assert sigma.mean() == pytest.approx(mean, abs=0.002)
        assert np.mean(sigma == np.float32(0.02)) == pytest.approx(at_lowest, abs=0.001)
