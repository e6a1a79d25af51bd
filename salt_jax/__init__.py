"""Salt in JAX: distil video diffusion transformers into students of 2-8 network evaluations.

    model = salt_jax.load("runs/mine")
    video = model.generate("A red circle moves left.", num_steps=4)  # uint8 [F, H, W, 3]
    salt_jax.write_video("circle.mp4", video, fps=model.fps)

One update is read along five files: `train.loop`, `train.step`, `stages.distil`, `rollout.causal`,
`models.denoiser`. README.md says which equation is where, docs/algorithm.md derives them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salt_jax.io.video import write_video
    from salt_jax.models.cache_policy import CachePolicy
    from salt_jax.pipeline import load
    from salt_jax.pipeline.model import Model

__version__ = "0.2.0"
__all__ = ["CachePolicy", "Model", "load", "write_video"]

_HOMES = {
    "CachePolicy": "salt_jax.models.cache_policy",
    "Model": "salt_jax.pipeline.model",
    "load": "salt_jax.pipeline",
    "write_video": "salt_jax.io.video",
}


def __getattr__(name: str) -> object:
    """Imports a public name on first use, so that `--help` needs no jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'salt_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
