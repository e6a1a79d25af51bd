"""What is drawn follows Eq. 9 and nothing but the key."""

import jax
import numpy as np
import pytest

from salt_jax.flow.schedule import grid, triples
from salt_jax.rollout.plan import draw_plan

BATCH = 20_000


def drawn(seed, anchors=4):
    return jax.tree.map(np.asarray, draw_plan(jax.random.key(seed), BATCH, 8, anchors, 5.0))


@pytest.mark.parametrize("anchors", [2, 4, 8])
def test_levels_fall_and_lie_on_their_grids(anchors):
    plan = drawn(0, anchors)
    assert set(plan.sigma_s.tolist()) == set(grid(8, 5.0)[:-1].tolist())
    some = plan.exists
    assert np.all((plan.sigma_s > plan.sigma_m)[some]) and np.all((plan.sigma_m > plan.sigma_e)[some])
    assert set(plan.sigma_m[some].tolist()) <= set(grid(8, 5.0).tolist())
    room = grid(8, 5.0)[1]  # a middle above the end needs a level between it and pure noise
    assert set(plan.sigma_e[some].tolist()) == {e for e in grid(anchors, 5.0).tolist() if e < room}


def test_the_smallest_level_has_no_triple_and_three_equal_levels():
    plan = drawn(1)
    none = ~plan.exists
    np.testing.assert_array_equal(none, plan.sigma_s == grid(8, 5.0)[7])
    np.testing.assert_array_equal(plan.sigma_m[none], plan.sigma_s[none])
    np.testing.assert_array_equal(plan.sigma_e[none], plan.sigma_s[none])


def test_starts_are_uniform_and_the_rest_is_eq_9_given_the_start():
    plan, table, levels = drawn(2), triples(8, 4), grid(8, 5.0)
    for start in range(8):
        here = plan.sigma_s == levels[start]
        assert here.mean() == pytest.approx(1 / 8, abs=0.01)
        for m, e, p in zip(table.middle[start], table.end[start], table.probability[start], strict=True):
            if p:
                share = np.mean((plan.sigma_m[here] == levels[m]) & (plan.sigma_e[here] == levels[e]))
                assert share == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / here.sum()) + 1e-6)


def test_the_key_decides_everything():
    once, again, other = drawn(3), drawn(3), drawn(4)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.mean(once.sigma_s == other.sigma_s) == pytest.approx(1 / 8, abs=0.02)


def test_the_same_inside_a_compiled_step():
    compiled = jax.jit(lambda key: draw_plan(key, 64, 8, 4, 5.0))(jax.random.key(5))
    for a, b in zip(compiled, draw_plan(jax.random.key(5), 64, 8, 4, 5.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        draw_plan(jax.random.key(6), 4, 8, 4, 5.0)
