"""How clips are made, as a value, and what the released few-step students of others were trained
at. No jax in here, as in `choices`.
"""

from typing import NamedTuple

import numpy as np

from salt_jax.choices import Solver, TeacherSolver
from salt_jax.flow.schedule import student_levels
from salt_jax.models.cache_policy import CachePolicy


class Sampler(NamedTuple):
    """How clips are made: see `rollout.sampler.generate`."""

    num_steps: int  # network evaluations of a clip, or of a chunk
    shift: float  # of the noise levels
    solver: Solver | TeacherSolver = "cm"
    memory: CachePolicy | None = None  # chunk by chunk; None: whole clips
    first_steps: int = 0  # of the first chunk; 0: as the others
    # listed, as timesteps (1000 sigma, falling, without the 0 at the end), instead of the grid
    levels: tuple[float, ...] = ()
    # a call of one program for each step of whole clips, with a report: for teachers, whose steps
    # are many and whose solver may look back
    stepwise: bool = False

    def grid(self, first: bool = False) -> np.ndarray:
        """float32 [K + 1], noise levels falling from 1 to 0, of the first chunk or the others."""
        steps = self.first_steps if first and self.first_steps else self.num_steps
        return student_levels(steps, self.shift, self.levels)


class Switch(NamedTuple):
    """Another prompt from a frame on."""

    prompt: str
    flush: bool = False  # see `rollout.sampler.Cue`
    cut: bool = False


TEACHER_STEPS = {False: 50, True: 40}  # by whether the model reads pictures: Wan 2.1's own
# Read off configs and code of each: Self-Forcing @33593df, Causal-Forcing @1fc7bbc, LongLive v1.0
# @e52d9ef, CausVid @ca21150, Salt @5fbb513 (salt_cf.pt on Causal Forcing, salt_ll.pt on LongLive).
# Lists that those "warp" (1000, 750, 500, 250) are the grid of 4 steps at their shift; CausVid's is
# not.
RELEASED = {
    "self_forcing": Sampler(4, 5.0, memory=CachePolicy(chunk=3)),
    "causal_forcing": Sampler(4, 5.0, memory=CachePolicy(chunk=3)),
    "causal_forcing_framewise": Sampler(4, 5.0, memory=CachePolicy(chunk=1)),
    "longlive": Sampler(4, 5.0, memory=CachePolicy(chunk=3, window=12, sink=3)),
    "causvid": Sampler(3, 8.0, memory=CachePolicy(chunk=3), levels=(1000.0, 757.0, 522.0)),
    "salt_cf": Sampler(4, 5.0, memory=CachePolicy(chunk=3)),
    "salt_ll": Sampler(4, 5.0, memory=CachePolicy(chunk=3, window=12, sink=3)),
}
# Of checkpoints with several networks the one that its authors sample with.
RELEASED_KEYS = {"salt_cf": "generator_ema", "salt_ll": "generator"}
