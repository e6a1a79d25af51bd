"""The same work done by several, in turns: whether they agree, and the ratios of their times.

A machine's speed drifts by more than the differences that matter. So everyone has one turn in a
round, every second round in reverse, and what is told are ratios of turns of the same round.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from salt_jax.errors import UserError
from salt_jax.keys import Json

# Relative distance of two results, by the type of the products: float32 sums in another order, and
# bfloat16 has eight bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


class Side(NamedTuple):
    """One who does the work."""

    run: Callable[[], object]  # returns when the result is there
    # the result as arrays under names that all sides share
    read: Callable[[object], Mapping[str, np.ndarray]]


Part = dict[str, Side]
"""By name who does one piece of work: ours, the peer's, and variants of both."""


def distance(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The Euclidean distance of all numbers, in units of the norm of `wanted`; inf where names or
    shapes differ.
    """
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
        return float("inf")
    apart, size = (
        sum(np.square(x, dtype=np.float64).sum() for x in arrays)
        for arrays in ((found[k] - wanted[k] for k in wanted), wanted.values())
    )
    return float(np.sqrt(apart / size))


def compare(name: str, part: Part, to: str, dtype: str) -> dict[str, float]:
    """The distance of each side's result from that of side `to`. Everything compiles here.

    Raises:
      UserError: one is farther than `TOLERANCE`, or no number.
    """
    wanted = part[to].read(part[to].run())
    found = {
        who: distance(side.read(side.run()), wanted) for who, side in part.items() if who != to
    }
    for who, far in found.items():
        if not far <= TOLERANCE[dtype]:
            raise UserError(
                f"{name}: the result of {who} is {far:.2g} away from that of {to}, more than the "
                f"{TOLERANCE[dtype]:g} that {dtype} explains, so no time is compared; install the "
                "versions in requirements-dev.txt, or report it"
            )
    return found


def take_turns(part: Part, rounds: Iterable[int]) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    seconds: dict[str, list[float]] = {who: [] for who in part}
    for i in rounds:
        for who in list(part)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            part[who].run()
            seconds[who].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], peer: str) -> dict[str, dict[str, list[float]]]:
    """For each side that is ours, by each of the peer's: lower quartile, median and upper quartile
    of the ratios of their turns. Below 1 ours is faster.
    """
    theirs = [who for who in seconds if who.startswith(peer)]
    return {
        who: {
            to: np.percentile(np.divide(seconds[who], seconds[to]), [25, 50, 75]).tolist()
            for to in theirs
        }
        for who in seconds
        if who not in theirs
    }


def show(rows: list[Json]) -> str:
    """The table: medians of seconds, and the ratios with their quartiles."""
    lines = [f"{'part':20}{'who':34}{'median s':>10}  of the peer's time (quartiles)"]
    for row in rows:
        for who, taken in row["seconds"].items():
            told = ", ".join(
                f"{middle:.2f} ({low:.2f} to {high:.2f}) of {to}"
                for to, (low, middle, high) in row["ratios"].get(who, {}).items()
            )
            lines.append(f"{row['part']:20}{who:34}{np.median(taken):10.4g}  {told}".rstrip())
    return "\n".join(lines)
