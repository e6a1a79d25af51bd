"""Cross-step consistency: does a student show the same video whatever the number of updates?

Salt Fig. 5 compares by eye; here the same is a number. All clips must start from the same noise.
With Euler nothing else is random; with the CM solver share the fresh noise on nested grids too, or
the number measures that noise.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np


def cross_step_distance(videos_by_updates: Mapping[int, np.ndarray]) -> dict[str, float]:
    """Mean squared distance between the clips of every two numbers of updates, e.g.
    {"2-4": 0.01, ...}.

    `videos_by_updates` maps K to clips [N, F, H, W, C] (latents, or pixels in one scale); clip i
    has the same noise and text under every K. The mean runs over clips and all their elements.
    Raises ValueError when there are fewer than two K, or clips of different shapes.
    """
    if len(videos_by_updates) < 2:
        raise ValueError(
            f"a distance needs two numbers of updates, got {sorted(videos_by_updates)}"
        )
    shapes = {updates: np.shape(videos) for updates, videos in videos_by_updates.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"clips of different numbers of updates must have one shape, got {shapes}")
    # float64 also keeps uint8 pixels from wrapping around.
    clips = {
        updates: np.asarray(videos, np.float64)
        for updates, videos in sorted(videos_by_updates.items())
    }
    return {
        f"{a}-{b}": float(np.mean(np.square(clips[a] - clips[b])))
        for a, b in combinations(clips, 2)
    }
