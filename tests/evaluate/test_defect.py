"""The semigroup defect against fields whose defect is known, and against a slow loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.evaluate.defect import Path, causal_defect, defect_grid, semigroup_defect
from salt_jax.flow.prediction import expand, from_velocity
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.kv_cache import append, plan_next_chunk
from salt_jax.models.position_channels import POSITION_CHANNELS
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.rollout.causal import Steps, commit, generate_chunk
from salt_jax.rollout.parallel import noise_at, sample
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.types import Conditioning
from tests.helpers import Formula, randomised, shapes_of

SIGMAS, MIDPOINTS = defect_grid(4, 5.0)
COND = Conditioning(jnp.linspace(-1.0, 1.0, 3 * 2 * 4).reshape(3, 2, 4))
SHAPE = (2, 4, 4, 3)


def recorder(seen: list):
    """`curved`, writing down every state and noise level at which it is asked."""

    @Formula
    def recorded(params, x, sigma, cond):
        note = lambda x, sigma: seen.append((np.array(x, float), float(sigma[0])))
        jax.debug.callback(note, x, sigma, ordered=True)
        return curved.denoise(params, x, sigma, cond)

    return recorded


@Formula
def constant(params, x, sigma, cond):
    return from_velocity(x, jnp.full_like(x, 0.7), sigma)


@Formula
def linear(params, x, sigma, cond):
    return from_velocity(x, params * x, sigma)


@Formula
def curved(params, x, sigma, cond):
    """Depends on everything a denoiser sees and mixes neighbours."""
    prompt = cond.text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
    velocity = jnp.sin(params * x + prompt) + expand(sigma, x) * jnp.roll(x, 1, axis=3)
    return from_velocity(x, velocity, sigma)


def curved_velocity(params, x, sigma, text):
    """`curved` once more, in float64, for one clip."""
    return np.sin(params * x + text.mean()) + sigma * np.roll(x, 1, axis=2)


def slow_defect(params, x_s, text, s, m, e):
    """Eq. 14-16 as printed, for one clip: (defect, curvature)."""
    v_s = curved_velocity(params, x_s, s, text)
    direct = x_s - (s - e) * v_s
    x_m = x_s - (s - m) * v_s
    v_m = curved_velocity(params, x_m, m, text)
    composed = x_m - (m - e) * v_m
    square = lambda a: float(np.sum(a**2))
    return square(direct - composed) / (square(direct - x_s) + 1e-8), square(v_m - v_s) / square(
        v_s
    )


@pytest.mark.parametrize(
    ("shift", "prefactors"),
    [(5.0, [0.309, 0.327, 0.360, 0.444]), (12.0, [0.319, 0.345, 0.402, 0.623])],
)
def test_grid_splits_every_interval_of_the_inference_grid(shift, prefactors):
    sigmas, midpoints = defect_grid(4, shift)
    part = (midpoints - sigmas[1:]) / (sigmas[:-1] - sigmas[1:])
    np.testing.assert_allclose(part**2, prefactors, atol=6e-4)


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_straight_lines_have_no_defect(solver):
    path = Path(SIGMAS, MIDPOINTS, jax.random.split(jax.random.key(1), 3))
    defect = semigroup_defect(constant, None, COND, path, solver, SHAPE)
    assert defect.per_interval.shape == defect.curvature.shape == (4,)
    assert not np.any(defect.per_interval)
    assert not np.any(defect.curvature)
    assert defect.mean == 0


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_linear_field_has_the_defect_derived_by_hand(solver):
    """v = a x: v_m = a (1 - (s - m) a) x_s, so v_m - v_s = -(s - m) a v_s wherever the rollout
    stands.
    """
    a = 0.8
    s, m, e = SIGMAS[:-1].astype(float), MIDPOINTS.astype(float), SIGMAS[1:].astype(float)
    curvature = ((s - m) * a) ** 2
    per_interval = ((m - e) / (s - e)) ** 2 * curvature
    path = Path(SIGMAS, MIDPOINTS, jax.random.split(jax.random.key(1), 3))
    got = semigroup_defect(linear, a, COND, path, solver, SHAPE)
    np.testing.assert_allclose(got.curvature, curvature, rtol=1e-4)
    np.testing.assert_allclose(got.per_interval, per_interval, rtol=1e-4)
    np.testing.assert_allclose(got.mean, per_interval.mean(), rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "cm"])
def test_agrees_with_a_slow_loop_on_the_path_that_the_solver_takes(solver):
    """The states at which the denoiser was asked are recorded: they are the path, and the oracle's
    input.
    """
    seen, scale = [], 0.9
    keys = jax.random.split(
        jax.random.key(3, impl="rbg"), 3
    )  # programs with callbacks are not cached, and this one compiles fast
    given = Path(SIGMAS, MIDPOINTS, keys)
    got = semigroup_defect(recorder(seen), scale, COND, given, solver, SHAPE)
    jax.effects_barrier()
    assert [sigma for _, sigma in seen] == [
        float(s) for pair in zip(SIGMAS, MIDPOINTS, strict=False) for s in pair
    ]

    text, path = np.array(COND.text, float), [x for x, _ in seen[::2]]
    np.testing.assert_array_equal(
        path[0], noise_at(keys, jnp.float32(1.0), np.arange(SHAPE[0]), SHAPE[1:])
    )
    pairs = np.array(
        [
            [slow_defect(scale, x[b], text[b], *map(float, levels)) for b in range(3)]
            for x, *levels in zip(path, SIGMAS[:-1], MIDPOINTS, SIGMAS[1:], strict=True)
        ]
    )
    np.testing.assert_allclose(got.per_interval, pairs[..., 0].mean(1), rtol=1e-4)
    np.testing.assert_allclose(got.curvature, pairs[..., 1].mean(1), rtol=1e-4)
    np.testing.assert_allclose(got.mean, pairs[..., 0].mean(), rtol=1e-4)

    sampled = []
    sample(recorder(sampled), scale, COND, jnp.asarray(SIGMAS), solver, keys, SHAPE)
    jax.effects_barrier()
    for (expected, _), x in zip(sampled, path, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


CAUSAL = WanConfig(24, 2, 1, 48, 3 + POSITION_CHANNELS, 3, (1, 2, 2), 8, 6, 16, 0, 1e-6)
NETWORK = wan_denoiser(CAUSAL, Compute(), 7, 3)


@pytest.mark.parametrize(
    ("solver", "context"),
    [
        pytest.param("euler", "clean", marks=pytest.mark.slow),
        ("cm", "clean"),
        ("cm", "last_step"),
    ],
)
def test_chunk_by_chunk_the_chunks_before_are_finished(solver, context):
    """Eq. 14-16 as printed, on the path of `generate`: the cache is of the chunks it made, as later
    ones see them, and the states are those that its chunk passes through.
    """
    policy, picture = CachePolicy(3, 1, 6, 1, "relative", context=context), (4, 4, 3)
    params = randomised(shapes_of(CAUSAL), 1, 0.2)
    keys, cond = clip_keys(0, 2), Conditioning(COND.text[:2].repeat(2, axis=-1))
    sampler = Sampler(4, 5.0, solver, policy)
    video = list(generate(sampler, NETWORK, params, {0: Cue(cond)}, keys, (7, *picture)))
    cache, sums = NETWORK.empty_cache(2, policy.capacity(7), picture), np.zeros((4, 3, 2))
    square = lambda a: np.sum(np.square(np.asarray(a, float)), axis=(1, 2, 3, 4))
    for chunk in video:
        plan = plan_next_chunk(cache, policy, chunk.shape[1])
        for i, (s, m, e) in enumerate(zip(SIGMAS[:-1], MIDPOINTS, SIGMAS[1:], strict=True)):
            steps = Steps(jnp.asarray(SIGMAS), jnp.int32(i), solver)
            x_s, x0, _ = generate_chunk(NETWORK, params, plan, cond, steps, keys, picture)
            v_s = NETWORK.denoise(params, x_s, jnp.full(2, s), cond, plan).velocity
            x_m = x_s - (s - m) * v_s
            v_m = NETWORK.denoise(params, x_m, jnp.full(2, m), cond, plan).velocity
            direct, composed = x_s - (s - e) * v_s, x_m - (m - e) * v_m
            sums[i] += square(direct - composed), square(direct - x_s), square(v_s)
        np.testing.assert_allclose(x0, chunk, atol=1e-5)
        made = jnp.asarray(chunk)
        if context == "clean":
            cache = commit(NETWORK, params, cache, made, cond, policy)
        else:  # what the last evaluation read
            last = jnp.full(2, SIGMAS[3])
            _, kept = NETWORK.denoise_and_keep(params, x_s, last, cond, plan)
            cache = append(cache, kept, made, policy)
    path = Path(SIGMAS, MIDPOINTS, keys)
    got = causal_defect(NETWORK, params, cond, path, solver, (7, *picture), policy)
    want = (sums[:, 0] / sums[:, 1]).mean(1)
    np.testing.assert_allclose(got.per_interval, want, rtol=2e-3)
    np.testing.assert_allclose(got.mean, want.mean(), rtol=2e-3)
    part = (MIDPOINTS - SIGMAS[1:]) / (SIGMAS[:-1] - SIGMAS[1:])
    np.testing.assert_allclose(got.curvature, want / part**2, rtol=2e-3)


def test_one_chunk_is_a_whole_clip():
    """Nothing is before it, so both forms walk the same path."""
    params = randomised(shapes_of(CAUSAL), 1, 0.2)
    cond = Conditioning(COND.text[:2].repeat(2, axis=-1))
    path = Path(SIGMAS, MIDPOINTS, clip_keys(0, 2))
    shape, policy = (3, 4, 4, 3), CachePolicy(3)
    whole = semigroup_defect(NETWORK, params, cond, path, "cm", shape)
    chunk = causal_defect(NETWORK, params, cond, path, "cm", shape, policy)
    for one, other in zip(whole, chunk, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)


def test_all_noise_is_a_function_of_the_clips_key():
    keys = jax.random.split(jax.random.key(0), 6)
    path = lambda some: Path(SIGMAS, MIDPOINTS, some)
    run = lambda solver, some: (
        semigroup_defect(curved, 0.9, COND, path(some), solver, SHAPE).per_interval
    )
    for solver in ("euler", "cm"):
        np.testing.assert_array_equal(run(solver, keys[:3]), run(solver, keys[:3]))
        assert np.all(run(solver, keys[:3]) != run(solver, keys[3:]))


def test_midpoints_must_fit_the_grid():
    path = Path(SIGMAS, MIDPOINTS[:3], jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"5 noise levels have 4 intervals.*got 3"):
        semigroup_defect(constant, None, COND, path, "euler", SHAPE)
