"""The loss of shortcut models, against the two updates it speaks of."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.flow.transition import euler
from salt_jax.losses.shortcut import shortcut_loss

SHAPE = (3, 2, 4, 2, 3)
# the last one has no level between
TRIPLE = tuple(jnp.array(level) for level in ([1.0, 0.9, 0.4], [0.9, 0.5, 0.4], [0.7, 0.0, 0.2]))


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def loss_at(v_s, v_m, v_teacher):
    return shortcut_loss(v_s, v_m, v_teacher, *TRIPLE)


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_target_is_where_two_updates_land(self):
        """In numpy and float64: move twice, and take the velocity that goes there at once."""
        v_s, v_m, v_teacher = normal(0), normal(1), normal(2)
        s, m, e = (np.asarray(level, np.float64).reshape(3, 1, 1, 1, 1)[:2] for level in TRIPLE)
        x = np.random.default_rng(3).normal(size=SHAPE)[:2]
        landed = x - (s - m) * np.float64(v_s[:2]) - (m - e) * np.float64(v_m[:2])
        wanted = [
            *((np.float64(v_s[:2]) - (x - landed) / (s - e)) ** 2).mean((1, 2, 3, 4)),
            ((np.float64(v_s[2]) - np.float64(v_teacher[2])) ** 2).mean(),
        ]
        np.testing.assert_allclose(self.variant(loss_at)(v_s, v_m, v_teacher), wanted, rtol=1e-5)


def test_only_the_large_update_gets_a_gradient():
    v = normal(0), normal(1), normal(2)
    grads = jax.grad(lambda *v: loss_at(*v).sum(), (0, 1, 2))(*v)
    assert jnp.abs(grads[0]).min(axis=(1, 2, 3, 4)).min() > 0
    assert not grads[1].any() and not grads[2].any()


def test_nothing_is_left_to_learn_of_the_implicit_midpoint_rule():
    """A teacher whose velocity is a x, and a student that knows it at the level between: the large
    update is then that of the midpoint rule, c = a / (1 + a (s - m)), and not the teacher's own.
    """
    x, a = normal(0), 1.5
    s, m, _ = TRIPLE

    def loss(slope):
        v_s = slope.reshape(-1, 1, 1, 1, 1) * x
        v_m = a * euler(x, v_s, s, m)
        return loss_at(v_s, v_m, v_s)

    np.testing.assert_allclose(loss(a / (1 + a * (s - m))), 0.0, atol=1e-12)
    assert (loss(jnp.full(3, a))[:2] > 0.01).all()
