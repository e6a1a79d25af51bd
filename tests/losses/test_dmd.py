"""The DMD gradient against numpy in float64, and against the scores of Gaussians, from which Eq. 4
follows.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.losses.dmd import dmd_loss

SHAPE = (3, 2, 4, 2, 3)
SIZE = 2 * 4 * 2 * 3  # of one clip


def normal(seed, shape=SHAPE, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, shape), jnp.float32)


def gradient(x0, x0_critic, x0_teacher):
    """Of the sum over examples, so that every example has its own."""
    return jax.grad(lambda x: dmd_loss(x, x0_critic, x0_teacher).sum())(x0)


def slow_direction(x0, x0_critic, x0_teacher):
    """Clip by clip, in float64."""
    clips = []
    for x, critic, teacher in zip(
        *(np.asarray(a, float) for a in (x0, x0_critic, x0_teacher)), strict=True
    ):
        clips.append((critic - teacher) / np.mean(np.abs(x - teacher)))
    return np.stack(clips)


class Value(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_and_value_are_those_of_the_formula(self):
        """Clips of different scale, so that a normaliser over the batch would show."""
        scale = jnp.array([0.1, 1.0, 30.0]).reshape(3, 1, 1, 1, 1)
        x0, critic, teacher = (scale * normal(seed) for seed in range(3))
        direction = slow_direction(x0, critic, teacher)
        np.testing.assert_allclose(
            self.variant(gradient)(x0, critic, teacher), direction / SIZE, rtol=1e-4, atol=1e-7
        )
        value = self.variant(dmd_loss)(x0, critic, teacher)
        assert value.shape == (3,)
        np.testing.assert_allclose(value, 0.5 * (direction**2).mean((1, 2, 3, 4)), rtol=1e-4)


def test_example_of_the_docstring():
    x0 = jnp.zeros((1, 1, 1, 1, 2))
    np.testing.assert_allclose(gradient(x0, x0 + 3.0, x0 + 2.0).ravel(), [0.25, 0.25])


def test_nothing_to_learn_where_the_critic_is_the_teacher():
    x0, same = normal(0), normal(1)
    assert not np.any(gradient(x0, same, same))
    assert not np.any(dmd_loss(x0, same, same))


def test_only_the_students_video_gets_gradient():
    loss = lambda x, critic, teacher: dmd_loss(x, critic, teacher).sum()
    to_video, *others = jax.grad(loss, argnums=(0, 1, 2))(normal(0), normal(1), normal(2))
    assert np.all(to_video != 0)
    assert not np.any(others)


def test_examples_do_not_mix():
    """Neither in value nor in gradient, even when a neighbour is not finite."""
    x0, critic, teacher = (normal(seed) for seed in range(3))
    alone = jnp.concatenate(
        [dmd_loss(x0[b : b + 1], critic[b : b + 1], teacher[b : b + 1]) for b in range(3)]
    )
    np.testing.assert_allclose(dmd_loss(x0, critic, teacher), alone, rtol=1e-6)
    for b in range(3):
        of_one = jax.grad(lambda x, b=b: dmd_loss(x, critic, teacher)[b])(x0)
        assert [bool(np.any(of_one[i])) for i in range(3)] == [i == b for i in range(3)]
    broken = gradient(x0, critic.at[1].set(jnp.nan), teacher)
    assert [bool(np.isfinite(broken[i]).all()) for i in range(3)] == [True, False, True]


def test_a_teacher_that_returns_the_video_itself_is_reported_not_patched():
    x0, critic = normal(0), normal(1)
    teacher = normal(2).at[1].set(x0[1])
    assert np.isfinite(dmd_loss(x0, critic, teacher)).tolist() == [True, False, True]
    assert not np.isfinite(gradient(x0, critic, teacher)[1]).any()


def test_scale_of_the_clips_does_not_matter_to_the_gradient():
    x0, critic, teacher = (normal(seed) for seed in range(3))
    np.testing.assert_allclose(
        gradient(8 * x0, 8 * critic, 8 * teacher),
        gradient(x0, critic, teacher),
        rtol=1e-5,
        atol=1e-8,
    )


def test_descent_moves_the_video_to_the_teacher_and_away_from_the_critic():
    x0, teacher, critic = normal(0), normal(1), normal(2)
    distance = lambda a, b: np.square(a - b).sum((1, 2, 3, 4))
    step = x0 - 0.1 * SIZE * gradient(x0, x0, teacher)  # a critic that knows the video
    assert np.all(distance(step, teacher) < distance(x0, teacher))
    step = x0 - 0.1 * SIZE * gradient(x0, critic, x0 + 1e-3)  # a teacher that is content with it
    assert np.all(distance(step, critic) > distance(x0, critic))


class Gaussian:
    """N(mean, std^2) for every number: all that is known about its noisy copies, from the
    textbook.
    """

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def variance(self, sigma):
        return ((1 - sigma) * self.std) ** 2 + sigma**2

    def score(self, x, sigma):
        return -(x - (1 - sigma) * self.mean) / self.variance(sigma)

    def denoise(self, x, sigma):
        """E[x0 | x] of a linear measurement: prior mean plus gain times surprise."""
        gain = (1 - sigma) * self.std**2 / self.variance(sigma)
        return self.mean + gain * (x - (1 - sigma) * self.mean)


STUDENT, TEACHER = Gaussian(-0.5, 0.8), Gaussian(1.0, 0.5)


def kl(student, teacher, sigma):
    """KL(student || teacher) of the noisy copies."""
    a, b = student.variance(sigma), teacher.variance(sigma)
    return 0.5 * (np.log(b / a) + (a + ((1 - sigma) * (student.mean - teacher.mean)) ** 2) / b - 1)


@pytest.mark.parametrize("sigma", [0.98, 0.7, 0.3, 0.02])
def test_direction_is_the_score_difference_of_equation_4(sigma):
    """Gradient times its positive normalisers is the difference of the scores, student - teacher,
    times sigma^2 / (1 - sigma).

    Its mean over the student's videos is the slope of the KL divergence in the student's mean.
    """
    shape = (1, 5, 100, 100, 3)
    x0 = normal(0, shape, STUDENT.mean, STUDENT.std)
    x = (1 - sigma) * x0 + sigma * normal(1, shape)
    teacher = TEACHER.denoise(x, sigma)
    normaliser = np.abs(np.asarray(x0, float) - teacher).mean()
    got = np.asarray(gradient(x0, STUDENT.denoise(x, sigma), teacher), float) * x0.size * normaliser

    x = np.asarray(x, float)
    difference = STUDENT.score(x, sigma) - TEACHER.score(x, sigma)
    np.testing.assert_allclose(got, sigma**2 / (1 - sigma) * difference, rtol=2e-3, atol=2e-5)

    h = 1e-4
    near = [kl(Gaussian(STUDENT.mean + d, STUDENT.std), TEACHER, sigma) for d in (-h, h)]
    # = E[score difference d x / d mean], d x / d mean = 1 - sigma
    slope = (near[1] - near[0]) / (2 * h)
    assert got.mean() * (1 - sigma) ** 2 / sigma**2 == pytest.approx(slope, rel=0.02)


def test_half_precision_is_computed_in_float32():
    x0, critic, teacher = (normal(seed).astype(jnp.bfloat16) for seed in range(3))
    value = dmd_loss(x0, critic, teacher)
    assert value.dtype == jnp.float32
    direction = slow_direction(x0, critic, teacher)
    np.testing.assert_allclose(value, 0.5 * (direction**2).mean((1, 2, 3, 4)), rtol=1e-4)
