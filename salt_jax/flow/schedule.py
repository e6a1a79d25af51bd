"""Noise levels: the shift, the grids T(K), and the shortcut triples of Salt Eq. 9.

A grid of K steps has K + 1 levels. Level i is u_i = 1 - i / K, bent towards noise by the shift:

    sigma = s u / (1 + (s - 1) u)                                                      (1)

so sigma_0 = 1 (noise) and sigma_K = 0 (clean). Grids nest: T(2) is in T(4), T(4) in T(8). The time
that Wan's time embedding reads is 1000 sigma; that number exists only in `models.denoiser`, and in
`explicit`, because published students name it. No jax in here, as in `choices`; `draws` has what is
drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def shift(u, amount: float):
    """Bends u in [0, 1] towards noise, Eq. (1) above.

    `amount` 1 changes nothing; works on arrays and floats.
    """
    return amount * u / (1 + (amount - 1) * u)


def grid(num_steps: int, shift_amount: float) -> np.ndarray:
    """T(K): K + 1 noise levels from 1 down to 0, float32.

    >>> grid(2, 5.0)
    array([1.       , 0.8333333, 0.       ], dtype=float32)
    """
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got num_steps={num_steps}")
    u = 1.0 - np.arange(num_steps + 1) / num_steps
    return shift(u, shift_amount).astype(np.float32)


def explicit(timesteps: Sequence[object]) -> np.ndarray:
    """Listed noise levels, for a student that was trained at these: K + 1 levels that end at 0,
    float32.

    Args:
      timesteps: 1000 sigma, falling, from noise on; a 0 at the end says nothing and may be left
        out.

    Raises ValueError for what is no such list.

    >>> explicit((1000, 757, 522))
    array([1.   , 0.757, 0.522, 0.   ], dtype=float32)
    """
    must = f"levels {tuple(timesteps)} must be"
    try:
        listed = np.array(list(timesteps), np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{must} numbers") from error
    if listed.ndim != 1 or not np.isfinite(listed).all():
        raise ValueError(f"{must} a list of finite numbers")
    listed = listed[:-1] if listed.size and listed[-1] == 0 else listed
    if not listed.size or listed.min() <= 0 or listed.max() > 1000:
        raise ValueError(f"{must} timesteps above 0 and up to 1000, at least one")
    sigmas = np.append(listed / 1000, 0).astype(np.float32)
    if np.any(np.diff(sigmas) >= 0):
        raise ValueError(f"{must} falling, no two the same")
    if sigmas[0] < np.float32(0.99):
        raise ValueError(f"{must} 1000 sigma and begin at 990 or above: a video starts from noise")
    return sigmas


def student_levels(
    num_steps: int, shift_amount: float, listed: Sequence[object] = ()
) -> np.ndarray:
    """Levels of a student's steps, float32 [K + 1]: those that are listed, if they are K, else
    the grid.
    """
    if listed and len(levels := explicit(listed)) == num_steps + 1:
        return levels
    return grid(num_steps, shift_amount)


class Triples(NamedTuple):
    """All triples (sigma_s, sigma_m, sigma_e) of Eq. 9, as indices into the training grid.

    Row i lists the pairs that start at level i; `probability` is 0 in unused columns and in the
    whole row of a level that has no triple (the smallest non-zero level has none).
    """

    middle: np.ndarray  # [n, P] int
    end: np.ndarray  # [n, P] int
    probability: np.ndarray  # [n, P] float32, rows sum to 1 or 0


def triples(train_levels: int, anchor_levels: int, nearest_ends: int = 0) -> Triples:
    """Tabulates Salt Eq. 9: sigma_e uniform on the anchors T(K) below sigma_s, then sigma_m uniform
    on the training levels strictly between. Anchors that leave no room for sigma_m are not drawn.

    Args:
      nearest_ends: draw sigma_e from the highest so many of these anchors; 0 from all.

    Raises ValueError unless `anchor_levels` divides `train_levels` (else T(K) is not part of
    T_train).
    """
    n = train_levels
    if n % anchor_levels:
        raise ValueError(
            f"anchor_levels={anchor_levels} must divide train_levels={n}: Eq. 9 ends on a part "
            "of the grid"
        )
    anchors = [j * (n // anchor_levels) for j in range(anchor_levels + 1)]
    rows = []
    for start in range(n):
        ends = [e for e in anchors if e >= start + 2]
        ends = ends[:nearest_ends] if nearest_ends else ends
        rows.append(
            [(m, e, 1 / (len(ends) * (e - start - 1))) for e in ends for m in range(start + 1, e)]
        )
    width = max(1, max(map(len, rows)))
    table = np.array([row + [(0, 0, 0.0)] * (width - len(row)) for row in rows])
    return Triples(
        table[..., 0].astype(np.int32),
        table[..., 1].astype(np.int32),
        table[..., 2].astype(np.float32),
    )
