"""The words that a config or a flag chooses from.

No jax in here: programs refuse a wrong word at once.
"""

from typing import Literal

Solver = Literal["euler", "cm"]
"""How a student goes from one noise level to the next: Euler keeps the path, CM re-noises the clean
estimate afresh.
"""

TeacherSolver = Literal["unipc", "dpmpp", "euler"]
"""Solvers of a teacher with many steps, see `flow.multistep`."""

Positions = Literal["absolute", "relative", "cyclic"]
"""Where in time a frame that is seen stands: at its number in the video, at its rank among those
that are seen, or at its number modulo a period.
"""

Context = Literal["clean", "last_step"]
"""What later chunks see of a finished one: its keys and values once it is clean, or those of its
last denoising step.
"""

StopGradient = Literal["none", "composed", "direct", "midpoint"]
"""Where Eq. 8 does not pass gradient: nowhere (the paper's formula as it stands), the composed
endpoint x^(2), the direct endpoint x^(1), or only the state x_m at which v_m is evaluated
(`rollout.parallel.midpoint` stops that one).
"""

LevelWeight = Literal["one", "one_minus_sigma"]
"""What Eq. 8 is multiplied by: nothing, or 1 - sigma_s, which is 0 at pure noise."""

ReferenceNoise = Literal["shared", "own", "euler_between"]
"""What the reference of cache alignment adds to its estimate at a noise level, after the first,
which it always shares with the student: the noise that the student has or would have at that level,
noise of its own, or the student's where the student visits the level and elsewhere none, by an
Euler step.
"""

ReferenceExit = Literal["last", "student"]
"""Where the reference of cache alignment stops: after its last step, or at the noise level at which
the student stops.
"""
