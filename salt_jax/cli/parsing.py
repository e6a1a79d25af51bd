"""Values of flags that are more than a number or a word.

No jax in here: an invalid value is refused at once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

from salt_jax.choices import Context, Positions
from salt_jax.config import reading
from salt_jax.config.schema import Recipe
from salt_jax.data.text_lists import read_prompts
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.latent_size import SPACE, TIME, TOKEN


def read_workdir(workdir: AnyPath, step: int | None = None) -> Recipe:
    """The config of a workdir, which has a checkpoint of `step` where one is named.

    Raises:
      UserError: it has none, or none that can be read.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; train with --workdir={workdir} first, or name another workdir"
        )
    recipe = reading.read_workdir(workdir)
    there = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    if step is not None and step not in there:
        steps = ", ".join(map(str, there)) or "none"
        raise UserError(f"--step={step} is not in {workdir}/checkpoints; there are: {steps}")
    return recipe


def read_cache_policy(text: str, policy: CachePolicy) -> CachePolicy:
    """ "WINDOW:SINK:POSITIONS[:PERIOD][:CONTEXT]", as --memory has it -> `policy` with these. The
    period, of cyclic positions, and the context are otherwise its own.

    Raises:
      UserError: it is not of that form, or the numbers do not fit the chunks.
    """
    try:
        window, sink, positions, *more = text.split(":")
        period = int(more.pop(0)) if more and more[0].isdecimal() else policy.period
        context = more.pop(0) if more else policy.context
        for name, word, words in (
            ("positions", positions, get_args(Positions)),
            ("context", context, get_args(Context)),
        ):
            if word not in words:
                raise ValueError(f"{name} is {word!r}, not one of {', '.join(words)}")
        if more:
            raise ValueError(f"nothing stands behind {context}")
        changes = {"window": int(window), "sink": int(sink), "positions": positions}
        changes |= {"period": period if positions == "cyclic" else 0, "context": context}
        return dataclasses.replace(policy, **changes)
    except ValueError as error:
        raise UserError(
            f"--memory {text}: {error}; write WINDOW:SINK:POSITIONS, such as 6:1:relative or "
            "12:3:cyclic:21"
        ) from error


def read_prompt_list(file: str) -> list[str]:
    """The captions of --prompts_file, one a line.

    Raises:
      UserError: it cannot be read, or has a line that is no caption.
    """
    rows = read_prompts(file)
    if wrong := [row.problem for row in rows if row.problem]:
        raise UserError(f"--prompts_file={file}: {wrong[0]}; mend it, or leave it out")
    return [row.text for row in rows]


def read_size(text: str) -> tuple[int, int]:
    """Width and height of "WIDTHxHEIGHT", in pixels of Wan 2.1.

    Raises:
      UserError: they have no latent.
    """
    width, _, height = text.partition("x")
    step = SPACE * TOKEN
    sides = [int(side) for side in (width, height) if side.isascii() and side.isdigit()]
    if len(sides) != 2 or any(not side or side % step for side in sides):
        raise UserError(
            f"--size={text} is not WIDTHxHEIGHT, both multiples of {step}, such as 832x480"
        )
    return sides[0], sides[1]


def refuse_frames(frames: int) -> None:
    """Raises UserError where Wan 2.1 has no latent for a video of so many frames, naming the
    nearest that has.
    """
    if frames < 1 or frames % TIME != 1:
        below = max(frames - 1, 0) // TIME * TIME + 1
        raise UserError(f"--frames={frames} must be {TIME}k + 1, such as {below} or {below + TIME}")


def read_num_steps(words: Sequence[str]) -> list[int]:
    """Numbers of steps, each once. Raises UserError for what are no numbers from 1 up."""
    if not words or not all(k.isascii() and k.isdigit() and int(k) for k in words):
        raise UserError(
            f"--num_steps={','.join(words)} must be whole numbers from 1 up, with commas"
        )
    return list(dict.fromkeys(int(k) for k in words))


def read_levels(words: Sequence[str]) -> tuple[float, ...]:
    """Timesteps, see `flow.schedule.explicit`. Raises UserError for what are no numbers."""
    try:
        return tuple(float(level) for level in words)
    except ValueError as error:
        raise UserError(
            f"--levels={','.join(words)} must be numbers with commas, such as 1000,757,522"
        ) from error


def refuse_not_finite(flag: str, value: float | None) -> None:
    """Raises UserError for nan and inf, which absl takes for numbers."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"--{flag}={value} must be a finite number")
