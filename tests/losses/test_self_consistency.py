"""Eq. 8 as printed, through the endpoints, in float64, against the loss that never forms them.

What a stop-gradient means is said here without automatic differentiation: parameters that move
(`live`) and parameters that do not (`held`), and finite differences.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from salt_jax.flow.schedule import grid
from salt_jax.flow.transition import composed_endpoint, direct_endpoint, euler
from salt_jax.losses.self_consistency import self_consistency_loss
from salt_jax.rollout.parallel import midpoint

SHAPE = (3, 2, 4, 2, 3)
SIZE = 2 * 4 * 2 * 3
S, M, E = ([1.0, 0.9375, 0.8333], [0.9722, 0.75, 0.4167], [0.9375, 0.625, 0.0])
THETA = np.array([0.7, -0.4, 0.9])
CHOICES = ["none", "composed", "direct", "midpoint"]
each_choice = pytest.mark.parametrize("stop", CHOICES)


def normal(seed):
    return np.random.default_rng(seed).normal(size=SHAPE)


def levels():
    return tuple(jnp.array(level) for level in (S, M, E))


def wide(level, xp=np):
    return xp.array(level).reshape(3, 1, 1, 1, 1)


def field(theta, x, sigma, xp):
    """A small velocity field that bends with x, sigma and its three parameters."""
    return (
        theta[0] * x + theta[1] * xp.tanh(2 * x) * sigma + theta[2] * xp.sin(theta[0] + 3 * sigma)
    )


def printed_loss(live, held, x_s, stop, weight="one"):
    """Eq. 6-8. `held` takes the place of `live` where no gradient passes; mean instead of sum.
    `weight`: what multiplies the square of each clip.
    """
    s, m, e = wide(S), wide(M), wide(E)

    def direct(theta):
        return x_s - (s - e) * field(theta, x_s, s, np)

    def composed(theta, theta_of_state):
        x_m = x_s - (s - m) * field(theta, x_s, s, np)
        state = x_s - (s - m) * field(theta_of_state, x_s, s, np)
        return x_m - (m - e) * field(theta, state, m, np)

    ends = {
        "none": lambda: (direct(live), composed(live, live)),
        "composed": lambda: (direct(live), composed(held, held)),
        "direct": lambda: (direct(held), composed(live, live)),
        "midpoint": lambda: (direct(live), composed(live, held)),
    }
    x1, x2 = ends[stop]()
    return np.mean({"one": 1.0, "one_minus_sigma": 1.0 - s}[weight] * (x1 - x2) ** 2)


def our_loss(theta, x_s, stop, weight="one"):
    """As the training step calls it."""
    s, m, e = levels()
    v_s = field(theta, x_s, wide(S, jnp), jnp)
    x_m = midpoint(x_s, v_s, s, m, stop == "midpoint")
    v_m = field(theta, x_m, wide(M, jnp), jnp)
    return self_consistency_loss(v_s, v_m, s, m, e, stop, weight).mean()


def printed_gradient(x_s, stop, weight="one", h=1e-5):
    steps = h * np.eye(3)
    loss = lambda theta: printed_loss(theta, THETA, x_s, stop, weight)
    return np.array([(loss(THETA + d) - loss(THETA - d)) / (2 * h) for d in steps])


@pytest.mark.parametrize("weight", ["one", "one_minus_sigma"])
@each_choice
def test_value_and_gradient_are_those_of_the_endpoint_form(stop, weight):
    x_s = normal(0)
    value, gradient = jax.value_and_grad(our_loss)(jnp.array(THETA), jnp.array(x_s), stop, weight)
    np.testing.assert_allclose(value, printed_loss(THETA, THETA, x_s, "none", weight), rtol=1e-5)
    np.testing.assert_allclose(gradient, printed_gradient(x_s, stop, weight), rtol=1e-4, atol=1e-6)


def test_the_four_choices_are_four_gradients():
    """Else the test above could not tell them apart."""
    gradients = [printed_gradient(normal(0), stop) for stop in CHOICES]
    for i, a in enumerate(gradients):
        assert all(np.abs(a - b).max() > 0.05 * np.abs(a).max() for b in gradients[:i])


@each_choice
def test_agrees_with_explicit_stop_gradients_on_our_endpoints(stop):
    """The same through `flow.transition` and `jax.lax.stop_gradient`."""
    x_s, (s, m, e), hold = jnp.array(normal(1)), levels(), jax.lax.stop_gradient

    def through_endpoints(theta):
        v_s = field(theta, x_s, wide(S, jnp), jnp)
        x_m = euler(x_s, v_s, s, m)
        v_m = field(theta, hold(x_m) if stop == "midpoint" else x_m, wide(M, jnp), jnp)
        x1, x2 = direct_endpoint(x_s, v_s, s, e), composed_endpoint(x_s, v_s, v_m, s, m, e)
        x1, x2 = hold(x1) if stop == "direct" else x1, hold(x2) if stop == "composed" else x2
        return ((x1 - x2) ** 2).mean()

    expected = jax.value_and_grad(through_endpoints)(jnp.array(THETA))
    got = jax.value_and_grad(our_loss)(jnp.array(THETA), x_s, stop)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stop", "to_v_s", "to_v_m"),
    [
        ("none", lambda s, m, e: -(m - e), lambda s, m, e: m - e),
        ("midpoint", lambda s, m, e: -(m - e), lambda s, m, e: m - e),
        ("composed", lambda s, m, e: -(s - e), lambda s, m, e: 0 * m),
        ("direct", lambda s, m, e: s - m, lambda s, m, e: m - e),
    ],
)
def test_pull_on_the_two_velocities_by_hand(stop, to_v_s, to_v_m):
    """d loss = 2 (m - e) (v_m - v_s) d(x^(1) - x^(2)) / size; composed: v_s is pulled to v_m, no
    more.
    """
    v_s, v_m = normal(0), normal(1)
    loss = lambda v_s, v_m: self_consistency_loss(v_s, v_m, *levels(), stop, "one").sum()
    got = jax.grad(loss, argnums=(0, 1))(jnp.array(v_s), jnp.array(v_m))
    s, m, e = wide(S), wide(M), wide(E)
    common = 2 * (m - e) * (v_m - v_s) / SIZE
    np.testing.assert_allclose(got[0], common * to_v_s(s, m, e), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got[1], common * to_v_m(s, m, e), rtol=1e-4, atol=1e-7)


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*CHOICES)
    def test_value_is_one_number_per_example(self, stop):
        v_s, v_m = normal(0), normal(1)
        loss = self.variant(self_consistency_loss, static_argnums=(5, 6))
        got = loss(jnp.array(v_s), jnp.array(v_m), *levels(), stop, "one")
        assert got.shape == (3,) and got.dtype == jnp.float32
        expected = [np.mean(((M[b] - E[b]) * (v_m[b] - v_s[b])) ** 2) for b in range(3)]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_choice
def test_nothing_is_asked_where_no_triple_exists(stop):
    """Three equal levels: neither value nor gradient, however much the velocities differ."""
    level = jnp.array([0.4167, 0.4167, 1.0])
    loss = lambda v_s, v_m: self_consistency_loss(v_s, v_m, level, level, level, stop, "one").sum()
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.array(normal(0)), jnp.array(normal(1))
    )
    assert value == 0
    assert not np.any(gradients)


@each_choice
def test_straight_paths_are_content(stop):
    v = jnp.array(normal(0))
    value, gradients = jax.value_and_grad(
        lambda v_s, v_m: self_consistency_loss(v_s, v_m, *levels(), stop, "one").sum(),
        argnums=(0, 1),
    )(v, v)
    assert value == 0
    assert not np.any(gradients)


def test_example_of_the_docstring():
    v, level = jnp.zeros((1, 1, 1, 1, 1)), lambda s: jnp.array([s])
    assert self_consistency_loss(
        v, v + 2.0, level(1.0), level(0.75), level(0.25), "none", "one"
    ).tolist() == [1.0]


@pytest.mark.parametrize(
    ("triple", "weight"), [((0, 1, 2), 1.2e-3), ((6, 7, 8), 0.17), ((0, 1, 8), 0.95)], ids=str
)
def test_long_triples_that_end_clean_carry_the_loss(triple, weight):
    """(sigma_m - sigma_e)^2 on the grid of 8 updates at shift 5."""
    levels = (jnp.array([grid(8, 5.0)[i]]) for i in triple)
    v = jnp.zeros((1, 2, 4, 2, 3))
    assert float(self_consistency_loss(v, v + 1.0, *levels, "none", "one")[0]) == pytest.approx(
        weight, rel=0.03
    )


def test_half_precision_keeps_what_the_endpoints_lose():
    """Velocities that differ by 3 %: the difference of endpoints in bfloat16 is mostly rounding,
    ours is exact.
    """
    half = lambda x: jnp.array(x, jnp.bfloat16)
    x_s, v_s = half(3 * normal(0)), half(normal(1))
    v_m = half(np.asarray(v_s, float) * 1.03)
    s, m, e = (jnp.full(3, level) for level in (1.0, 0.96875, 0.9375))  # exact in bfloat16
    truth = ((0.03125 * (np.asarray(v_m, float) - np.asarray(v_s, float))) ** 2).mean((1, 2, 3, 4))
    np.testing.assert_allclose(
        self_consistency_loss(v_s, v_m, s, m, e, "none", "one"), truth, rtol=1e-4
    )

    s, m, e = (half(level) for level in (s, m, e))
    lossy = direct_endpoint(x_s, v_s, s, e) - composed_endpoint(x_s, v_s, v_m, s, m, e)
    lossy = (np.asarray(lossy, float) ** 2).mean((1, 2, 3, 4))
    assert np.all(np.abs(lossy / truth - 1) > 0.5)
