"""Multistep solvers for teachers: UniPC and DPM-Solver++ on the grids of Wan's official sampler.

Along the probability flow the clean estimate x0(sigma) determines the state. With
q = sigma_e / sigma_s,

    x_e = q x_s + (1 - q) m                                                            (1)

is exact when m is the mean of x0 between the two levels, weighted by e^lambda,
lambda = log((1 - sigma) / sigma). Solvers differ in how they guess m from the estimates at hand,
and all guess it linearly:

    Euler                   x0_s
    DPM-Solver++ 2M         x0_s + w (x0_s - x0_before), w = h / (2 h_before),                (2)
                            h the step in lambda
    UniPC, order 2, B2(h)   predicts as (2); when x0_e is known, steps again from x_s         (3)
                            through x0_e too

So a run is a table of numbers, one row per network evaluation; `rollout.parallel.multistep_step`
reads it.
Sources: DPM-Solver++ (arXiv 2211.01095, midpoint), UniPC (arXiv 2302.04867, the 2x2 system of its
corrector).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from salt_jax.choices import TeacherSolver
from salt_jax.flow.schedule import shift

TRAIN_TIMESTEPS = 1000  # Wan's time is 1000 sigma; its official sampler hands over whole numbers
# sigma of the first of 1000 training timesteps, stored in float32
UNIPC_HIGHEST = float(np.float32(0.999))


class SolverStep(NamedTuple):
    """One row per network evaluation.

    An evaluation gives the clean estimate `now`; `last` and `before` are those of the two rows
    above, zero in the first rows, where their weights are zero too. `correct` mixes the corrected
    state of the row above, before, last and now into the corrected state here; `predict` mixes
    that, last and now into the input of the row below.
    """

    sigma: Float[Array | np.ndarray, "n"]  # of the state
    seen: Float[Array | np.ndarray, "n"]  # what the network takes it for
    correct: Float[Array | np.ndarray, "n 4"]
    predict: Float[Array | np.ndarray, "n 3"]


def unipc_grid(num_steps: int, shift_amount: float) -> tuple[np.ndarray, np.ndarray]:
    """Levels float64 [N + 1], ending in 0, and the whole timesteps int64 [N] that Wan's UniPC shows
    the network.

    >>> unipc_grid(50, 5.0)[1][[0, 1, 2, -2, -1]]
    array([999, 995, 991, 172,  92])
    """
    return _shifted(UNIPC_HIGHEST, num_steps, shift_amount)


def dpmpp_grid(num_steps: int, shift_amount: float) -> tuple[np.ndarray, np.ndarray]:
    """The same for Wan's DPM-Solver++: `schedule.grid`, from pure noise at timestep 1000."""
    return _shifted(1.0, num_steps, shift_amount)


def _shifted(highest: float, num_steps: int, shift_amount: float) -> tuple[np.ndarray, np.ndarray]:
    if num_steps < 1:
        raise ValueError(f"a solver needs at least one step, got num_steps={num_steps}")
    sigmas = shift(np.linspace(highest, 0.0, num_steps + 1), shift_amount)
    return sigmas, (sigmas[:-1] * TRAIN_TIMESTEPS).astype(np.int64)


def solver_steps(solver: TeacherSolver, num_steps: int, shift_amount: float) -> SolverStep:
    """The run of a solver. Euler's network sees sigma itself, as `rollout.parallel.sample` has it.

    Raises:
      ValueError: num_steps is below 1.
    """
    sigmas, timesteps = (unipc_grid if solver == "unipc" else dpmpp_grid)(num_steps, shift_amount)
    return tabulate(
        solver, sigmas, sigmas[:-1] if solver == "euler" else timesteps / TRAIN_TIMESTEPS
    )


def tabulate(solver: TeacherSolver, sigmas: np.ndarray, seen: np.ndarray) -> SolverStep:
    """A solver on any falling levels [N + 1], in float64.

    UniPC's must be below 1, where lambda is infinite.
    """
    with np.errstate(divide="ignore"):  # lambda is -inf at sigma = 1, inf at 0
        lambdas = np.log1p(-sigmas) - np.log(sigmas)
    predict = np.array(
        [_predictor(sigmas, lambdas, i, solver != "euler") for i in range(len(seen))]
    )
    if solver == "unipc":
        correct = np.array([_corrector(sigmas, lambdas, i) for i in range(len(seen))])
    else:  # the corrected state is the predicted one: the row above predicts it again
        state, last, now = np.vstack([[1.0, 0.0, 0.0], predict[:-1]]).T
        correct = np.stack([state, last, now, np.zeros(len(seen))], -1)
    return SolverStep(sigmas[:-1], seen, correct, predict)


def _predictor(
    sigmas: np.ndarray, lambdas: np.ndarray, i: int, second_order: bool
) -> tuple[float, ...]:
    """Weights of state, last, now for the step from level i to i + 1, Eq. (2); the ends of a run
    are Euler's.
    """
    q = sigmas[i + 1] / sigmas[i]
    extrapolates = second_order and 0 < i < len(sigmas) - 2
    w = 0.5 * (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) if extrapolates else 0.0
    return q, -(1 - q) * w, (1 - q) * (1 + w)


def _corrector(sigmas: np.ndarray, lambdas: np.ndarray, i: int) -> tuple[float, ...]:
    """Weights of state, before, last, now for the step from level i - 1 to i once more, Eq. (3)."""
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0
    q = sigmas[i] / sigmas[i - 1]
    if i == 1:
        return q, 0.0, (1 - q) / 2, (1 - q) / 2
    h, r = (
        lambdas[i] - lambdas[i - 1],
        (lambdas[i - 2] - lambdas[i - 1]) / (lambdas[i] - lambdas[i - 1]),
    )
    e = np.expm1(-h)
    first = -e / h - 1
    right = [first / e, 2 * (-first / h - 0.5) / e]
    earlier, new = np.linalg.solve([[1.0, 1.0], [r, 1.0]], right)
    mean = np.array([earlier / r, 1 - earlier / r - new, new])
    return q, *((1 - q) * mean)
