"""Sampling against loops in float64, with denoisers whose answer is known: lines, Gaussians, a
handful of clips.
"""

from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.flow.multistep import dpmpp_grid, solver_steps, unipc_grid
from salt_jax.flow.prediction import expand, from_velocity, from_x0
from salt_jax.flow.schedule import grid
from salt_jax.moving_shapes.exact import ClosedForm, closed_form_params
from salt_jax.rollout.parallel import (
    advance,
    midpoint,
    multistep_start,
    multistep_step,
    noise_at,
    sample,
)
from salt_jax.types import Conditioning
from tests.helpers import Formula

SHAPE = (2, 2, 3, 1)
FRAMES = np.arange(SHAPE[0])
each_solver = pytest.mark.parametrize("solver", ["euler", "cm"])


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def quick_keys(count):
    """Of a generator that compiles fast: programs with callbacks are not kept between runs."""
    return jax.random.split(jax.random.key(0, impl="rbg"), count)


def clip_noise(keys, sigma, shape=SHAPE):
    """The noise of a whole clip at one level."""
    return noise_at(keys, jnp.float32(sigma), np.arange(shape[0]), shape[1:])


def texts(count):
    """One text [3, 2] per clip, all different."""
    return jnp.asarray(np.random.default_rng(7).normal(size=(count, 3, 2)), jnp.float32)


def prompts(count):
    return Conditioning(texts(count))


@Formula
def gaussian(params, x, sigma, cond):
    """E[x0 | x] for N(mean, std^2); the text shifts the mean, so that it must reach its clip."""
    mean, std = params
    mean = mean + cond.text[:, 0, 0].reshape(-1, 1, 1, 1, 1)
    s = expand(sigma, x)
    gain = (1 - s) * std**2 / (((1 - s) * std) ** 2 + s**2)
    return from_x0(x, mean + gain * (x - (1 - s) * mean), sigma)


def slow_gaussian(params, x, s, text):
    """x0 of the above in float64, for one clip."""
    mean, std = params[0] + float(text[0, 0]), params[1]
    return mean + (1 - s) * std**2 / (((1 - s) * std) ** 2 + s**2) * (x - (1 - s) * mean)


def watched(denoiser, seen):
    """A denoiser that writes down what it is asked while the compiled program runs."""

    @Formula
    def watcher(params, x, sigma, cond):
        jax.debug.callback(lambda *a: seen.append([np.array(b) for b in a]), x, sigma, ordered=True)
        return denoiser.denoise(params, x, sigma, cond)

    return watcher


@each_solver
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_samples_are_those_of_a_slow_loop(solver, num_steps):
    params, sigmas, text = (0.7, 0.4), grid(num_steps, 5.0), texts(2)
    got = sample(gaussian, params, Conditioning(text), jnp.asarray(sigmas), solver, keys(2), SHAPE)
    noise = {s: np.asarray(clip_noise(keys(2), s), float) for s in sigmas}
    for b in range(2):
        x = noise[sigmas[0]][b]
        for now, after in pairwise(sigmas):
            s, e = float(now), float(after)
            x0 = slow_gaussian(params, x, s, text[b])
            x = (
                x - (s - e) * (x - x0) / s
                if solver == "euler"
                else (1 - e) * x0 + e * noise[after][b]
            )
        np.testing.assert_allclose(got[b], x, atol=2e-5)


@each_solver
@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_network_evaluation_per_update(solver, num_steps):
    """Counted while it runs, not while it is traced; every clip is at the level of the schedule."""
    seen, sigmas = [], grid(num_steps, 5.0)
    given = (0.0, 1.0), prompts(2), jnp.asarray(sigmas), solver, quick_keys(2), SHAPE
    sample(watched(gaussian, seen), *given)
    jax.effects_barrier()
    np.testing.assert_array_equal(
        [sigma for _, sigma in seen], np.repeat(sigmas[:-1, None], 2, axis=1)
    )


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_euler_is_exact_on_a_straight_path(num_steps):
    velocity = jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), jnp.float32)
    denoiser = Formula(lambda params, x, sigma, cond: from_velocity(x, params, sigma))
    sigmas = jnp.asarray(grid(num_steps, 5.0))
    got = sample(denoiser, velocity, prompts(2), sigmas, "euler", keys(2), SHAPE)
    np.testing.assert_allclose(got, clip_noise(keys(2), 1.0) - velocity, atol=2e-6)


def test_the_start_is_gaussian_noise_at_level_one():
    # stay where you are
    denoiser = Formula(lambda params, x, sigma, cond: from_velocity(x, jnp.zeros_like(x), sigma))
    got = sample(denoiser, None, prompts(2), jnp.asarray(grid(2, 5.0)), "euler", keys(2), SHAPE)
    np.testing.assert_array_equal(got, clip_noise(keys(2), 1.0))


def test_noise_is_standard_and_independent_across_clips_and_levels():
    shape = (4, 16, 16, 4)
    drawn = np.stack([clip_noise(keys(3), s, shape) for s in (1.0, 0.9375, 0.5)]).reshape(9, -1)
    assert np.abs(drawn.mean(1)).max() < 0.06
    assert np.abs(drawn.std(1) - 1).max() < 0.05
    assert np.abs(np.corrcoef(drawn) - np.eye(9)).max() < 0.07


def test_noise_of_a_level_is_shared_by_all_schedules_and_batches():
    two, eight = grid(2, 5.0), grid(8, 5.0)
    noise = clip_noise(keys(3), two[1])
    np.testing.assert_array_equal(noise, clip_noise(keys(3), eight[4]))
    np.testing.assert_array_equal(noise[1:2], clip_noise(keys(3)[1:2], two[1]))


def test_noise_of_a_frame_is_the_same_however_the_clip_is_cut():
    """A chunk of the frames 3, 4 and 5 gets what the whole clip has there; frames are
    independent.
    """
    whole = clip_noise(keys(2), 0.5, (9, 16, 16, 1))
    part = jax.jit(lambda frames: noise_at(keys(2), jnp.float32(0.5), frames, (16, 16, 1)))(
        jnp.arange(3, 6)
    )
    np.testing.assert_array_equal(part, whole[:, 3:6])
    drawn = np.asarray(whole).reshape(18, -1)
    # five standard deviations of 256 values
    assert np.abs(np.corrcoef(drawn) - np.eye(18)).max() < 0.3


def test_cm_re_noises_every_frame_with_its_own_number():
    """The last two frames of a clip, moved on alone, land where they land within the clip."""
    shape = (4, *SHAPE[1:])
    x = clip_noise(keys(2), 1.0, shape)
    move = lambda x, frames: advance(
        x,
        gaussian.denoise((0.7, 0.4), x, jnp.ones(2), prompts(2)),
        jnp.ones(2),
        jnp.float32(0.8),
        "cm",
        keys(2),
        frames,
    )
    np.testing.assert_array_equal(move(x[:, 2:], np.array([2, 3])), move(x, np.arange(4))[:, 2:])
    assert np.all(move(x[:, 2:], np.array([0, 1])) != move(x, np.arange(4))[:, 2:])


def test_cm_forgets_its_state_and_draws_around_the_clean_estimate():
    """Undoes the re-noising of the recorded states: what remains is fresh noise, another at every
    level.
    """
    seen, sigmas, shape, params = [], grid(4, 5.0), (4, 16, 16, 4), (0.7, 0.4)
    given = params, prompts(1), jnp.asarray(sigmas), "cm", quick_keys(1), shape
    sample(watched(gaussian, seen), *given)
    jax.effects_barrier()
    noises = [seen[0][0]]
    for (x, sigma), (after, level) in pairwise(seen):
        x0 = slow_gaussian(params, x.astype(float), float(sigma[0]), texts(1)[0])
        noises.append((after - (1 - level[0]) * x0) / level[0])
    noises = np.stack(noises).reshape(4, -1)
    assert np.abs(noises.std(1) - 1).max() < 0.05
    assert np.abs(np.corrcoef(noises) - np.eye(4)).max() < 0.07


def test_euler_draws_once_and_cm_at_every_level():
    """Two sets of keys whose first noise is made equal differ only by what is drawn later."""
    state = clip_noise(keys(2), 1.0)
    sigma = jnp.ones(2)
    prediction = gaussian.denoise((0.7, 0.4), state, sigma, prompts(2))
    run = lambda solver, seed: advance(
        state, prediction, sigma, jnp.float32(0.8), solver, keys(2, seed), FRAMES
    )
    np.testing.assert_array_equal(run("euler", 0), run("euler", 1))
    np.testing.assert_array_equal(run("cm", 0), run("cm", 0))
    assert np.all(run("cm", 0) != run("cm", 1))


@each_solver
def test_a_clip_does_not_depend_on_its_batch(solver):
    run = lambda part: sample(
        gaussian,
        (0.7, 0.4),
        Conditioning(texts(3)[part]),
        jnp.asarray(grid(4, 5.0)),
        solver,
        keys(3)[part],
        SHAPE,
    )
    np.testing.assert_allclose(run(slice(1, 2)), run(slice(None))[1:2], atol=1e-6)


@each_solver
@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_world_of_one_clip_per_caption_is_sampled_exactly(solver, num_steps):
    """Even in one update: the denoiser knows the answer at sigma = 1."""
    captions = np.asarray(texts(3))
    clips = np.random.default_rng(2).uniform(-1, 1, (3, 1, *SHAPE)).astype(np.float32)
    params, order = closed_form_params({"clips": clips}, captions), [2, 0, 1, 1]
    sigmas, cond = jnp.asarray(grid(num_steps, 5.0)), Conditioning(jnp.asarray(captions[order]))
    got = sample(ClosedForm(), params, cond, sigmas, solver, keys(4), SHAPE)
    np.testing.assert_allclose(got, clips[order, 0], atol=1e-6)


@each_solver
def test_many_updates_land_on_the_clips_equally_often(solver):
    """Transport by the optimal denoiser turns noise into the data: five clips, a fifth of the
    samples each.
    """
    count, num = 800, 5
    clips = np.random.default_rng(3).choice([-1.0, 1.0], (1, num, 1, 2, 4, 1)).astype(np.float32)
    assert len(np.unique(clips.reshape(num, -1), axis=0)) == num
    params = closed_form_params({"clips": clips}, np.zeros((1, 1, 1), np.float32))
    cond, sigmas = Conditioning(jnp.zeros((count, 1, 1))), jnp.asarray(grid(64, 1.0))
    sample_all = jax.jit(
        lambda keys: sample(ClosedForm(), params, cond, sigmas, solver, keys, (1, 2, 4, 1))
    )
    got = np.asarray(sample_all(keys(count)))
    distance = np.abs(got[:, None] - clips).max((2, 3, 4, 5))
    assert distance.min(1).max() < 0.02
    share = np.bincount(distance.argmin(1), minlength=num) / count
    np.testing.assert_allclose(share, np.full(num, 1 / num), atol=4 * np.sqrt(0.2 * 0.8 / count))


def test_midpoint_is_an_euler_update_and_may_stop_the_gradient():
    x, v = (
        jnp.asarray(np.random.default_rng(i).normal(size=(2, *SHAPE)), jnp.float32) for i in (4, 5)
    )
    s, m = jnp.array([1.0, 0.9]), jnp.array([0.75, 0.3])
    gap = np.array([0.25, 0.6]).reshape(2, 1, 1, 1, 1)
    for stop in (False, True):
        np.testing.assert_allclose(midpoint(x, v, s, m, stop), np.asarray(x) - gap * v, atol=1e-6)
    slope = lambda stop: jax.grad(lambda x, v: midpoint(x, v, s, m, stop).sum(), argnums=(0, 1))(
        x, v
    )
    np.testing.assert_array_equal(slope(False)[0], np.ones(x.shape))
    np.testing.assert_allclose(slope(False)[1], np.broadcast_to(-gap, x.shape), atol=1e-6)
    assert not np.any(slope(True))


each_teacher_solver = pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])


@Formula
def told_otherwise(params, x, sigma, cond):
    """A velocity bent in x, in the level it is told and in the text."""
    s = expand(sigma, x)
    velocity = (
        jnp.tanh(x * params + jnp.sin(6 * s)) + 0.5 * x + cond.text[:, 0, 0].reshape(-1, 1, 1, 1, 1)
    )
    return from_velocity(x, velocity, sigma)


def sample_multistep(denoiser, params, cond, noise, table):
    """All updates of a solver's table in one program."""
    update = lambda history, step: (multistep_step(denoiser, params, cond, history, step), None)
    return jax.lax.scan(update, multistep_start(noise), jax.tree.map(jnp.asarray, table))[0].x


@each_teacher_solver
@pytest.mark.parametrize("num_steps", [1, 5])
def test_teachers_are_told_truncated_levels_once_per_update(solver, num_steps):
    """And reach a known clip exactly: x0 comes from the true level."""
    seen, table = [], solver_steps(solver, num_steps, 5.0)
    velocity = jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), jnp.float32)
    straight = Formula(lambda params, x, sigma, cond: from_velocity(x, params, sigma))
    noise = clip_noise(keys(2), 1.0)
    got = sample_multistep(watched(straight, seen), velocity, prompts(2), noise, table)
    jax.effects_barrier()
    whole = table.seen * 1000
    assert solver == "euler" or np.all(whole == np.round(whole))
    np.testing.assert_allclose(
        [s for _, s in seen], np.repeat(table.seen[:, None], 2, axis=1), rtol=1e-7
    )
    levels = [table.sigma[0], *table.sigma]  # before the first input, and of every input
    for (x, _), level in zip(seen, levels[1:], strict=True):
        np.testing.assert_allclose(x, noise - (levels[0] - level) * velocity, atol=2e-6)
    np.testing.assert_allclose(got, noise - levels[0] * velocity, atol=2e-6)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_teachers_euler_is_the_students(num_steps):
    noise, table = clip_noise(keys(2), 1.0), solver_steps("euler", num_steps, 5.0)
    teacher = sample_multistep(told_otherwise, 0.7, prompts(2), noise, table)
    sigmas = jnp.asarray(grid(num_steps, 5.0))
    student = sample(told_otherwise, 0.7, prompts(2), sigmas, "euler", keys(2), SHAPE)
    np.testing.assert_allclose(teacher, student, atol=1e-6)


def test_one_program_serves_all_solvers_and_shifts_of_a_number_of_updates():
    run = jax.jit(chex.assert_max_traces(sample_multistep, n=1), static_argnums=0)
    tables = [
        solver_steps(solver, 5, shift)
        for solver in ("unipc", "dpmpp", "euler")
        for shift in (3.0, 5.0)
    ]
    got = np.stack(
        [run(told_otherwise, 0.7, prompts(2), clip_noise(keys(2), 1.0), table) for table in tables]
    )
    distance = np.abs(got[:, None] - got).max((2, 3, 4, 5, 6))
    assert np.all(distance[~np.eye(6, dtype=bool)] > 1e-3)


@pytest.mark.parity
@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
@pytest.mark.parametrize("num_steps,shift", [(50, 5.0), (8, 12.0)])
def test_teachers_visit_the_states_of_diffusers(solver, num_steps, shift):
    """All inputs of the network, the sampler in float32 as diffusers is, on diffusers' own rounding
    of the levels.
    """
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    sigmas, timesteps = (unipc_grid if solver == "unipc" else dpmpp_grid)(num_steps, shift)
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    kind = (
        diffusers.UniPCMultistepScheduler
        if solver == "unipc"
        else diffusers.DPMSolverMultistepScheduler
    )
    scheduler = kind(**flow)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(timesteps)
    scheduler.set_begin_index(0)

    seen, noise = [], clip_noise(quick_keys(2), 1.0)
    table = solver_steps(solver, num_steps, shift)
    got = sample_multistep(watched(told_otherwise, seen), 0.7, prompts(2), noise, table)
    jax.effects_barrier()
    x = torch.tensor(np.array(noise))
    velocity = jax.jit(lambda x, s: told_otherwise.denoise(0.7, x, s, prompts(2)).velocity)
    for (visited, _), t in zip(seen, timesteps, strict=True):
        np.testing.assert_allclose(visited, x, rtol=1e-6, atol=1e-6)
        v = velocity(jnp.asarray(x.numpy()), jnp.full(2, t / 1000, jnp.float32))
        x = scheduler.step(torch.tensor(np.array(v)), t, x).prev_sample
    np.testing.assert_allclose(got, x, rtol=1e-6, atol=1e-6)
