"""How videos change: from frame to frame, and from their first chunk to the later ones."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

EPS = 1e-8  # of a variance; a channel that does not vary has no scale


def motion(videos: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, over all elements of [N, F, H, W, C].

    In the unit of the values: of latents, or of pixels. A still video has 0. Few-step students lose
    motion first, and no distance between videos shows it.

    Raises ValueError where there are no two frames.
    """
    if videos.shape[1] < 2:
        raise ValueError(f"motion needs two frames, got {videos.shape[1]}")
    frames = [np.asarray(frame, np.float32) for frame in np.moveaxis(videos, 1, 0)]
    return float(np.mean([np.abs(b - a).mean() for a, b in pairwise(frames)]))


def drift(latents: np.ndarray, sizes: Sequence[int]) -> list[float]:
    """How far the statistics of each chunk are from those of the first one, relative to its spread:

        mean over clips and channels of ((m_c - m_1)^2 + (s_c - s_1)^2) / s_1^2

    with m, s the mean and standard deviation over frames and picture of a channel of a clip. The
    numerator is the squared Frechet distance of two normal distributions (that of FID,
    arXiv:1706.08500, with a diagonal covariance and without a network). The first against the last
    chunk is the start-end contrast by which FramePack (arXiv:2504.12626) measures drift. Content
    that moves changes it too: compare students on the same prompts.

    Wan's first latent frame stands for one frame of the video, the others for four, and has
    statistics of its own; it does not count where its chunk has others.

    Args:
      latents: [N, F, H, W, C].
      sizes: frames of each chunk.

    Raises ValueError where they are not the frames of the clips.
    """
    if sum(sizes) != latents.shape[1]:
        raise ValueError(f"chunks of {sizes} frames are not the {latents.shape[1]} of the clips")
    chunks = np.split(np.asarray(latents, np.float64), np.cumsum(sizes)[:-1], axis=1)
    chunks[0] = chunks[0][:, 1:] if sizes[0] > 1 else chunks[0]
    means, stds = ([f(x, axis=(1, 2, 3)) for x in chunks] for f in (np.mean, np.std))
    scale = np.square(stds[0]) + EPS
    return [
        float(np.mean((np.square(m - means[0]) + np.square(s - stds[0])) / scale))
        for m, s in zip(means, stds, strict=True)
    ]
