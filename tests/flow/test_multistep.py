"""Solvers against their theory: known solutions, orders of convergence, numbers of the official
grids, diffusers.
"""

import numpy as np
import pytest

from salt_jax.flow.multistep import dpmpp_grid, solver_steps, tabulate, unipc_grid
from salt_jax.flow.schedule import grid

SOLVERS = ("euler", "dpmpp", "unipc")
each_solver = pytest.mark.parametrize("solver", SOLVERS)
NOISE = np.linspace(-2, 2, 7)


def run(table, velocity, x):
    """Inputs of the network, corrected states and clean estimates by row; the result is the last
    input.
    """
    state, before, last = x, 0 * x, 0 * x
    inputs, states, estimates = [x], [], []
    for sigma, seen, correct, predict in zip(*table, strict=True):
        now = x - sigma * velocity(x, seen)
        state = np.tensordot(correct, [state, before, last, now], 1)
        x = np.tensordot(predict, [state, last, now], 1)
        before, last = last, now
        inputs, states, estimates = [*inputs, x], [*states, state], [*estimates, now]
    return inputs, states, estimates


def gaussian(mean, std):
    """State at sigma and velocity of the flow from NOISE to N(mean, std^2), in closed form."""

    def state(s):
        return (1 - s) * mean + np.hypot((1 - s) * std, s) * NOISE

    def velocity(x, s):
        gain = (1 - s) * std**2 / (((1 - s) * std) ** 2 + s**2)
        return (x - mean - gain * (x - (1 - s) * mean)) / s

    return state, velocity


@pytest.mark.parametrize("solver,order", [("euler", 1), ("dpmpp", 2), ("unipc", 3)])
@pytest.mark.parametrize("std", [0.7, 1.5])
def test_order_of_convergence(solver, order, std):
    """On levels even in lambda. UniPC of order p corrects to order p + 1 (its Theorem 3.1)."""
    state, velocity = gaussian(0.3, std)
    errors = []
    for n in (80, 160, 320):
        sigmas = 1 / (1 + np.exp(np.linspace(-3, 3, n + 1)))
        _, states, _ = run(tabulate(solver, sigmas, sigmas[:-1]), velocity, state(sigmas[0]))
        errors.append(np.abs(states[-1] - state(sigmas[-2])).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.1)


def test_second_order_is_far_better_on_the_grids_themselves():
    """50 updates at Wan's shift of 5, the network told the true level."""
    state, velocity = gaussian(0.3, 0.7)
    error = {}
    for solver in SOLVERS:
        table = solver_steps(solver, 50, 5.0)
        inputs, _, _ = run(table._replace(seen=table.sigma), velocity, state(table.sigma[0]))
        error[solver] = np.abs(inputs[-1] - state(0.0)).max()
    assert max(error["unipc"], error["dpmpp"]) < error["euler"] / 5


@each_solver
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9])
def test_a_constant_clean_estimate_is_reached_along_a_line(solver, num_steps):
    """Then x = x0 + sigma (noise - x0) at every level: exact for each solver, whatever the network
    is told.
    """
    table, x0 = solver_steps(solver, num_steps, 5.0), NOISE[::-1] ** 2
    levels = iter(table.sigma)
    start = x0 + table.sigma[0] * (NOISE - x0)
    inputs, states, _ = run(table, lambda x, seen: (x - x0) / next(levels), start)
    for got in (inputs[:-1], states):
        np.testing.assert_allclose(got, x0 + table.sigma[:, None] * (NOISE - x0), atol=1e-12)
    np.testing.assert_allclose(inputs[-1], x0, atol=1e-12)


@each_solver
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9])
def test_the_result_is_the_last_clean_estimate(solver, num_steps):
    inputs, _, estimates = run(
        solver_steps(solver, num_steps, 3.0), lambda x, seen: np.sin(3 * x + seen), NOISE
    )
    np.testing.assert_array_equal(inputs[-1], estimates[-1])


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_without_a_corrector_states_are_what_the_network_saw(solver):
    inputs, states, _ = run(
        solver_steps(solver, 6, 5.0), lambda x, seen: np.sin(3 * x + seen), NOISE
    )
    np.testing.assert_allclose(states, inputs[:-1], atol=1e-14)


def test_euler_moves_along_the_velocity():
    table, velocity = solver_steps("euler", 5, 5.0), lambda x, seen: np.sin(3 * x + seen)
    np.testing.assert_array_equal(table.seen, table.sigma)
    inputs, _, _ = run(table, velocity, NOISE)
    for x, after, s, e in zip(
        inputs, inputs[1:], table.sigma, [*table.sigma[1:], 0.0], strict=False
    ):
        np.testing.assert_allclose(after, x - (s - e) * velocity(x, s), atol=1e-14)


def test_grids_are_the_official_ones():
    """Numbers of Wan's samplers at 50 updates and shift 5."""
    sigmas, timesteps = unipc_grid(50, 5.0)
    np.testing.assert_allclose(sigmas[[0, 1, 2]], [0.9998, 0.995732, 0.99153], atol=5e-7)
    np.testing.assert_allclose(sigmas[[-3, -2, -1]], [0.172265, 0.092507, 0], atol=5e-7)
    np.testing.assert_array_equal(timesteps[:6], [999, 995, 991, 987, 982, 978])
    np.testing.assert_array_equal(timesteps[-4:], [302, 241, 172, 92])
    sigmas, timesteps = dpmpp_grid(50, 5.0)
    np.testing.assert_allclose(sigmas, grid(50, 5.0), atol=1e-7)
    # 1000 * 5 (49/50) / (1 + 4 (49/50)) = 995.93
    np.testing.assert_array_equal(timesteps[:2], [1000, 995])
    assert timesteps[-1] == 92  # 1000 * 5 / 50 / (1 + 4 / 50) = 92.59


def test_unipc_starts_from_a_number_stored_in_float32():
    """0.999 in float32 is above 0.999, so that the timesteps of 999 u do not fall below whole
    numbers.
    """
    np.testing.assert_array_equal(unipc_grid(3, 1.0)[1], [999, 666, 333])


@each_solver
def test_no_update_is_refused(solver):
    with pytest.raises(ValueError, match="num_steps=0"):
        solver_steps(solver, 0, 5.0)


def scheduler_of(solver, sigmas, timesteps):
    """That of diffusers, with Wan's settings, on our levels."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    scheduler = (
        diffusers.UniPCMultistepScheduler(
            solver_type="bh2", predict_x0=True, lower_order_final=True, **flow
        )
        if solver == "unipc"
        else diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True, **flow
        )
    )
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigmas), torch.tensor(timesteps)
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parity
# DPM++ of diffusers is float32
@pytest.mark.parametrize("solver,atol", [("unipc", 1e-12), ("dpmpp", 5e-7)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 50])
def test_every_step_is_that_of_diffusers(solver, atol, num_steps):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(num_steps)
    for shift in (1.0, 3.0, 5.0, 12.0):
        matrix, phase = rng.normal(size=(8, 8)) * 0.4, rng.normal(size=8)
        velocity = lambda x, seen, m=matrix, p=phase: (
            np.tanh(x @ m + np.sin(6 * seen) * p) + 0.5 * x
        )
        table = solver_steps(solver, num_steps, shift)
        sigmas, timesteps = (unipc_grid if solver == "unipc" else dpmpp_grid)(num_steps, shift)
        np.testing.assert_array_equal(table.seen, timesteps / 1000)
        inputs, _, _ = run(table, velocity, rng.normal(size=(3, 8)))
        scheduler = scheduler_of(solver, sigmas, timesteps)
        for x, after, t in zip(inputs, inputs[1:], timesteps, strict=False):
            v, x = torch.tensor(velocity(x, t / 1000)), torch.tensor(x)
            np.testing.assert_allclose(after, scheduler.step(v, t, x).prev_sample, atol=atol)


@pytest.mark.parity
@pytest.mark.parametrize("num_steps,shift", [(50, 5.0), (40, 3.0), (7, 12.0)])
def test_levels_are_those_of_diffusers_given_the_official_base(num_steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps, sigmas=np.linspace(0.999, 0, num_steps + 1)[:-1])
    sigmas, timesteps = unipc_grid(num_steps, shift)
    np.testing.assert_allclose(sigmas, scheduler.sigmas, atol=6e-8)
    np.testing.assert_array_equal(timesteps, scheduler.timesteps)
