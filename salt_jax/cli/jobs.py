"""Which videos launch.sample makes, and where they go.

No jax in here.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from salt_jax.cli import sample_flags as f
from salt_jax.cli.parsing import read_prompt_list
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.evaluate import vbench
from salt_jax.io.files import AnyPath, as_path, real
from salt_jax.moving_shapes import shapes


class Job(NamedTuple):
    """One video: its noise is a function of `seed` and `number`."""

    name: str  # of its file
    prompt: str
    seed: int
    number: int
    num_steps: int


def read_out() -> AnyPath:
    """The folder for the videos. Raises UserError where none is named, or it is a file."""
    if not (f.OUT.value or f.WORKDIR.value):
        raise UserError("name a folder for the videos: --out=DIR")
    out = as_path(f.OUT.value or f"{f.WORKDIR.value}/samples")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with --out=DIR")
    return out


def refuse_own_input(out: AnyPath, jobs: Sequence[Job]) -> None:
    """Raises UserError where what is read would be written over."""
    names = {job.name for job in jobs}
    for flag in (f.PREFIX, f.PICTURE):
        file = real(as_path(flag.value or ""))
        if flag.value and file.parent == real(out) and file.name in names:
            raise UserError(f"--{flag.name}={flag.value} would be written over; name another --out")


def read_jobs(recipe: Recipe | None, num_steps: Sequence[int]) -> Iterator[Job]:
    """Every video to make.

    Raises:
      UserError: no prompt is given where the world has none of its own, or a list of them cannot be
        read.
    """
    if f.VBENCH.value:
        if len(num_steps) > 1:
            raise UserError(
                "--vbench makes one video under each name; give one number with --num_steps"
            )
        extended = as_path(f.EXTENDED.value) if f.EXTENDED.value else None
        for job in vbench.jobs(
            vbench.read_prompts(as_path(f.VBENCH.value), extended), f.SEED.value
        ):
            yield Job(job.name, job.generate, job.seed, 0, num_steps[0])
        return
    count = 1 if f.STREAM.value else f.COUNT.value
    if f.PROMPT.value is not None:
        prompts = (f.PROMPT.value,) * count
    elif f.PROMPTS_FILE.value:
        prompts = tuple(read_prompt_list(f.PROMPTS_FILE.value))
    elif recipe and recipe.data.kind == "moving_shapes":
        scenes = shapes.scenes(recipe.world)
        prompts = tuple(shapes.caption(scenes[i]) for i in shapes.spread(recipe.world, count))
    else:
        raise UserError("give --prompt=... or --prompts_file=FILE")
    for k in num_steps:
        for i, prompt in enumerate(prompts):
            yield Job(f"{k}_{i:03d}.mp4", prompt, f.SEED.value, i, k)
