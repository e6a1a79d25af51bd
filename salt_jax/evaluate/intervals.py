"""How sure a difference is that few seeds and few clips show."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean, and where 95 % of its bootstrap draws are."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 4000) -> Interval:
    """Of the mean over [S, N]: S runs that differ in their seed, N clips that are the same prompts
    and noise in every run.

    Runs and clips are drawn again with replacement, each on its own: both would be others in an
    experiment of the same kind. For a difference of two rows give the difference of their values,
    of runs of the same seed and of the same clip. Three runs are few: the interval is then rather
    too narrow than too wide.
    """
    rng, (runs, clips) = np.random.default_rng(seed), values.shape
    means = np.empty(draws)
    for i in range(draws):
        some = values[rng.integers(runs, size=runs)]
        means[i] = some[:, rng.integers(clips, size=clips)].mean()
    return Interval(float(values.mean()), *np.percentile(means, [2.5, 97.5]).tolist())


def verdict(difference: Interval) -> str:
    """What an interval says of "it is more"."""
    if difference.low > 0:
        return "holds"
    return "does not hold" if difference.high < 0 else "undecided"
