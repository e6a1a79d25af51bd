"""Cache alignment against Salt Eq. 11-12 as printed, in a triple loop over places; what it ignores;
its gradient.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from salt_jax.losses.cache_alignment import cache_alignment_loss

SHAPE = (2, 3, 5, 4)  # B F S D
MARGIN = 0.1


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slow_loss(features, reference, margin):
    """Eq. 11-12 for every pair of places of every frame: (loss, share of pairs outside the
    margin), [B] each.
    """
    z, r = (np.asarray(a, np.float64) for a in (features, reference))
    b, f, s, _ = z.shape
    cosine = lambda u, v: u @ v / np.sqrt((u @ u) * (v @ v))
    off = np.zeros((b, f, s, s))
    for clip in range(b):
        for frame in range(f):
            for i in range(s):
                for j in range(s):
                    low = cosine(z[clip, frame, i], z[clip, frame, j])
                    high = cosine(r[clip, frame, i], r[clip, frame, j])
                    off[clip, frame, i, j] = abs(low - high) - margin
    return np.maximum(off, 0).mean((1, 2, 3)), (off > 0).mean((1, 2, 3))


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.0, 0.1, 0.7)
    def test_value_and_share_are_those_of_the_equations(self, margin):
        loss_of = self.variant(cache_alignment_loss, static_argnums=2)
        loss, active = loss_of(normal(0), normal(1), margin)
        assert loss.shape == active.shape == (2,) and loss.dtype == active.dtype == jnp.float32
        wanted_loss, wanted_active = slow_loss(normal(0), normal(1), margin)
        np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
        # Without a margin the diagonal, where both are 1, is on one side or the other by rounding
        # alone.
        np.testing.assert_allclose(active, wanted_active, atol=0.21 if margin == 0 else 1e-6)
        assert wanted_loss.min() > 0.01


def test_example_of_the_docstring():
    z = jnp.eye(2)[None, None]
    loss, active = cache_alignment_loss(z, jnp.ones_like(z), MARGIN)
    np.testing.assert_allclose((loss, active), ([0.45], [0.5]), rtol=1e-6)


def near(features, angle):
    """The same features with the first place of each frame turned a little, in the plane of two
    coordinates.
    """
    z = np.array(features)
    z[:, :, 0, :2] = z[:, :, 0, :2] @ np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )
    return jnp.asarray(z)


@pytest.mark.parametrize("angle", [0.0, 0.05])
def test_equal_features_and_those_inside_the_margin_cost_nothing_and_have_no_gradient(angle):
    """A turn by 0.05 changes no cosine by more than 0.05."""
    reference = normal(2)
    features = near(reference, angle)
    value = lambda z: cache_alignment_loss(z, reference, MARGIN)[0].sum()
    loss, slope = jax.value_and_grad(value)(features)
    assert loss == 0 and not np.any(slope)
    assert not np.any(cache_alignment_loss(features, reference, MARGIN)[1])
    outside = near(reference, 1.0)
    assert value(outside) > 0 and np.any(jax.grad(value)(outside))


def test_only_directions_matter_and_only_up_to_a_rotation_of_the_whole_feature_space():
    rng = np.random.default_rng(3)
    lengths = jnp.asarray(rng.uniform(0.1, 10.0, (*SHAPE[:3], 1)), jnp.float32)
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0], jnp.float32)
    z, r = normal(4), normal(5)
    wanted = cache_alignment_loss(z, r, MARGIN)
    for features, reference in ((z * lengths, r), (z, r * lengths), (z @ turn, r), (z, r @ turn)):
        np.testing.assert_allclose(
            cache_alignment_loss(features, reference, MARGIN), wanted, rtol=1e-5
        )
    assert not np.allclose(
        cache_alignment_loss(z.at[:, :, 0].multiply(-1), r, MARGIN)[0], wanted[0], rtol=1e-2
    )


def test_frames_and_clips_are_not_compared_with_each_other():
    """A loss of one frame of one clip is that frame's share of the whole."""
    z, r = normal(6), normal(7)
    parts = [
        [
            cache_alignment_loss(z[b : b + 1, f : f + 1], r[b : b + 1, f : f + 1], MARGIN)[0][0]
            for f in range(3)
        ]
        for b in range(2)
    ]
    np.testing.assert_allclose(
        cache_alignment_loss(z, r, MARGIN)[0], np.mean(parts, axis=1), rtol=1e-5
    )


def test_gradient_is_that_of_finite_differences_and_reaches_the_first_argument_only():
    z, r = normal(8), normal(9)
    value = lambda z, r: cache_alignment_loss(z, r, MARGIN)[0].sum()
    slope, none = jax.grad(value, argnums=(0, 1))(z, r)
    assert not np.any(none)
    step, wanted = 1e-6, np.zeros(SHAPE)
    for index in np.ndindex(SHAPE):
        change = np.zeros(SHAPE)
        change[index] = step
        up, down = (
            slow_loss(np.asarray(z, float) + sign * change, r, MARGIN)[0].sum() for sign in (1, -1)
        )
        wanted[index] = (up - down) / (2 * step)
    np.testing.assert_allclose(slope, wanted, atol=1e-4 * np.abs(wanted).max())
    # A feature's length is free, so its gradient stands at a right angle to it.
    np.testing.assert_allclose((slope * z).sum(-1), np.zeros(SHAPE[:3]), atol=1e-6)


def test_a_feature_of_zeros_is_at_a_right_angle_to_all_and_has_a_finite_gradient():
    z, r = normal(10).at[0, 0, 0].set(0.0), normal(11)
    loss, slope = jax.value_and_grad(lambda z: cache_alignment_loss(z, r, MARGIN)[0].sum())(z)
    chex.assert_tree_all_finite((loss, slope))


def test_half_precision_is_computed_in_float32():
    z, r = normal(12).astype(jnp.bfloat16), normal(13).astype(jnp.bfloat16)
    loss, active = cache_alignment_loss(z, r, MARGIN)
    assert loss.dtype == active.dtype == jnp.float32
    np.testing.assert_allclose(
        loss, slow_loss(z.astype(jnp.float32), r.astype(jnp.float32), MARGIN)[0], rtol=1e-5
    )


def sizes(jaxpr):
    """Elements of every array that a program makes, those inside its loops included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars if hasattr(var.aval, "size"))
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_matrices_of_all_frames_are_never_there_at_once_forwards_or_backwards():
    """B S^2 is one frame's of a batch; F of them would not fit beside the networks at full size."""
    b, f, s, d = 2, 7, 64, 4
    z = normal(14, (b, f, s, d))
    run = jax.make_jaxpr(
        jax.value_and_grad(lambda z: cache_alignment_loss(z, z[:, ::-1], MARGIN)[0].sum())
    )
    largest = max(sizes(run(z).jaxpr))
    assert largest == b * s * s, "the matrix of one frame should be the largest array"
