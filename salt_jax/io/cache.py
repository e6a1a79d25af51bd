"""Where what may be lost is kept: compiled programs, copies, and what compilers need."""

import os
from pathlib import Path


def cache_home() -> Path:
    """XDG_CACHE_HOME, or ~/.cache, with our name."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "salt_jax"
