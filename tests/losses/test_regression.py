"""The endpoint loss against numpy: its value, its minimiser, and what carries its gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.losses.regression import endpoint_loss

SHAPE = (3, 2, 4, 2, 3)


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def slow_loss(x0, target):
    return [
        np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
        for a, b in zip(x0, target, strict=True)
    ]


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value_is_one_number_per_example(self):
        loss = self.variant(endpoint_loss)(normal(0), normal(1))
        assert loss.shape == (3,) and loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, slow_loss(normal(0), normal(1)), rtol=1e-5)


def test_example_of_the_docstring():
    x0, target = jnp.zeros((1, 1, 1, 1, 2)), jnp.array([1.0, 3.0]).reshape(1, 1, 1, 1, 2)
    assert endpoint_loss(x0, target).tolist() == [5.0]


def test_gradient_is_the_distance_over_half_the_size_and_the_target_gets_none():
    x0, target = normal(2), normal(3)
    slope, none = jax.grad(lambda a, b: endpoint_loss(a, b).sum(), argnums=(0, 1))(x0, target)
    np.testing.assert_allclose(
        slope, 2 * (np.asarray(x0) - target) / np.prod(SHAPE[1:]), rtol=1e-5, atol=1e-7
    )
    assert not np.any(none)


def test_reaching_the_target_costs_nothing():
    loss, slope = jax.value_and_grad(lambda x0: endpoint_loss(x0, normal(4)).sum())(normal(4))
    assert loss == 0 and not np.any(slope)


def test_half_precision_is_computed_in_float32():
    x0, target = normal(5).astype(jnp.bfloat16), normal(6).astype(jnp.bfloat16)
    loss = endpoint_loss(x0, target)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(
        loss, slow_loss(x0.astype(jnp.float32), target.astype(jnp.float32)), rtol=1e-5
    )
