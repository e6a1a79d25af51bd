"""The flags of launch.sample as values that fit together, or one sentence of what does not, before
weights are read.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast, get_args

import numpy as np
from absl import flags

from salt_jax import samples
from salt_jax.choices import Solver, TeacherSolver
from salt_jax.cli import sample_flags as f
from salt_jax.cli.jobs import Job, read_jobs, read_out, refuse_own_input
from salt_jax.cli.lengths import read_lengths, read_switches
from salt_jax.cli.parsing import (
    read_cache_policy,
    read_levels,
    read_num_steps,
    read_size,
    read_workdir,
    refuse_not_finite,
)
from salt_jax.config.schema import Recipe
from salt_jax.data.pictures import read_picture
from salt_jax.errors import UserError
from salt_jax.flow.schedule import explicit
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.header import refuse_other_student, stored_sizes
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.latent_size import SPACE, fit_size
from salt_jax.models.presets import PRESETS, WanConfig, tiny_preset
from salt_jax.rollout.settings import RELEASED, RELEASED_KEYS, TEACHER_STEPS, Sampler, Switch


class Request(NamedTuple):
    """What is asked for.

    Nothing is read yet but a config, a picture, a clip and lists of prompts.
    """

    mode: str
    recipe: Recipe | None  # of the workdir
    config: WanConfig
    shape: tuple[int, int, int, int]  # F, H, W, C of a latent clip
    sampler: Sampler  # but for the number of steps, which a job says
    guidance: float
    negative: str | None  # None: the usual one
    jobs: list[Job]
    switches: dict[int, Switch]  # by latent frame
    picture: np.ndarray | None  # uint8 [H, W, 3]
    prefix: np.ndarray | None  # uint8 [T, H, W, 3]: whole chunks of the size of the video
    out: AnyPath
    index: AnyPath  # of records

    @property
    def policy(self) -> CachePolicy | None:
        return self.sampler.memory

    def grids(self) -> dict[int, np.ndarray]:
        """Of a student: noise levels [K + 1] by number of steps."""
        if self.sampler.stepwise:
            return {}
        steps = dict.fromkeys(job.num_steps for job in self.jobs)
        return {k: self.sampler._replace(num_steps=k).grid() for k in steps}

    @property
    def world(self) -> str:
        return "shapes" if self.mode in (f.SHAPES, f.SHAPES_CHUNKS) else "wan"


def read_request() -> Request:
    """The request on the command line.

    Raises:
      UserError: flags do not go together, or with what they name.
    """
    recipe = read_workdir(as_path(f.WORKDIR.value), f.STEP.value) if f.WORKDIR.value else None
    mode = workdir_mode(recipe) if recipe else f.converted_mode()
    f.refuse(mode)
    for flag in (f.GUIDANCE, f.SHIFT):
        refuse_not_finite(flag.name, flag.value)
    if f.SHIFT.value == 0:
        raise UserError("--shift=0 makes every noise level 0; give a number above it")
    config = recipe.wan if recipe else converted_config()
    if f.STUDENT.value and (name := f.RECIPE.value):
        key = RELEASED_KEYS.get(name, "")
        refuse_other_student(transformer_file(f.STUDENT.value), key, f"--recipe={name}")
    picture = read_picture(f.PICTURE.value) if f.PICTURE.value else None
    policy = read_policy(mode, recipe, picture is not None)
    refuse_picture(mode, config, policy, picture is not None)
    place = read_place(recipe, config, picture)
    wan = mode in f.WANS
    frames, prefix = read_lengths(wan, recipe.clip_shape[0] if recipe else None, policy, place[:2])
    guidance = (5.0 if mode == f.TEACHER else 1.0) if f.GUIDANCE.value is None else f.GUIDANCE.value
    if f.NEGATIVE.value is not None and guidance == 1:
        raise UserError(
            "--negative_prompt has no meaning at guidance 1, which is none; give --guidance too"
        )
    num_steps, sampler = read_sampler(mode, recipe, config, policy)
    out, jobs = read_out(), list(read_jobs(recipe, num_steps))
    refuse_own_input(out, jobs)
    index = out.with_name(f"{out.name}.{samples.NAME}") if f.VBENCH.value else out / samples.NAME
    return Request(
        mode=mode,
        recipe=recipe,
        config=config,
        shape=(frames, *place),
        sampler=sampler,
        guidance=guidance,
        negative=f.NEGATIVE.value,
        jobs=jobs,
        switches=read_switches(wan, policy, frames),
        picture=picture,
        prefix=prefix,
        out=out,
        index=index,
    )


def workdir_mode(recipe: Recipe) -> str:
    if recipe.data.kind == "latents":
        return f.WAN_CHUNKS if recipe.causal else f.WAN
    return f.SHAPES_CHUNKS if recipe.causal else f.SHAPES


def converted_config() -> WanConfig:
    """The sizes of what --weights or --model names.

    Raises:
      UserError: it is absent, or not what --model says.
    """
    model = f.MODEL.value
    if f.PRESET_SIZE.value == "tiny":
        return PRESETS[tiny_preset(model or "")]
    config = stored_sizes(transformer_file(f.WEIGHTS.value or ""), WanConfig)
    if model and PRESETS.get(model) != config:
        raise UserError(
            f"--weights={f.WEIGHTS.value} is not --model={model} but {config}; name its own, or "
            "none"
        )
    return config


def transformer_file(name: str) -> AnyPath:
    """Of a converted folder or file."""
    where = as_path(name)
    return where / "wan.safetensors" if where.is_dir() else where


def read_policy(mode: str, recipe: Recipe | None, pictured: bool) -> CachePolicy | None:
    """What a chunk sees; None: whole clips.

    A converted student that is given a picture makes it its first chunk.
    """
    if mode not in f.CHUNKS:
        return None
    if recipe:
        policy = recipe.memory
    else:
        released = f.RECIPE.value and RELEASED[f.RECIPE.value].memory
        released = released or CachePolicy(chunk=1)
        chunk = f.CHUNK.value or released.chunk
        try:
            policy = dataclasses.replace(released, chunk=chunk, first=1 if pictured else chunk)
        except ValueError as error:
            raise UserError(
                f"--chunk={chunk} with --recipe={f.RECIPE.value}: {error}; leave it out"
            ) from error
    policy = read_cache_policy(f.MEMORY.value, policy) if f.MEMORY.value else policy
    if f.CUT.value and policy.positions != "relative":
        raise UserError("--cut moves relative positions; give a --memory with relative ones")
    return policy


def refuse_picture(
    mode: str, config: WanConfig, policy: CachePolicy | None, pictured: bool
) -> None:
    """Raises UserError where --image is asked for and not given, or given to a model that cannot
    use it.
    """
    if config.image_dim and policy:
        raise UserError("image-to-video models make whole clips; leave --chunk and --recipe out")
    if config.image_dim and not pictured:
        raise UserError("this model needs --image=FILE")
    if pictured and policy and policy.first != 1:
        raise UserError(
            "--image is for students whose first chunk is one frame, and this one's has "
            f"{policy.first}"
            " (config.memory.first); leave it out"
        )
    if pictured and not policy and not config.image_dim:
        raise UserError("--image is for models that read it; leave it out")
    if flags.FLAGS["image_fit"].present and not config.image_dim:
        raise UserError("--image_fit is for models with an image encoder; leave it out")


def read_place(
    recipe: Recipe | None, config: WanConfig, picture: np.ndarray | None
) -> tuple[int, int, int]:
    """(H, W, C) of a latent frame: the workdir's, or of --size, which is an area where a picture
    tells the ratio.
    """
    if recipe:
        _, rows, columns, channels = recipe.clip_shape
        return rows, columns, channels
    width, height = read_size(f.SIZE.value)
    if picture is not None:
        try:
            rows, columns, _ = picture.shape
            height, width = fit_size(rows, columns, width * height)
        except ValueError as error:
            raise UserError(f"{error} (--image, --size)") from error
    return height // SPACE, width // SPACE, config.out_channels


def read_sampler(
    mode: str, recipe: Recipe | None, config: WanConfig, policy: CachePolicy | None
) -> tuple[list[int], Sampler]:
    """Numbers of steps, and how each is done.

    Raises:
      UserError: they are no levels, or the student was trained at others.
    """
    released = RELEASED[f.RECIPE.value] if f.RECIPE.value else None
    usual = recipe.schedule.shift if recipe else released.shift if released else 5.0
    shift = usual if f.SHIFT.value is None else f.SHIFT.value
    wanted = f.NUM_STEPS.value
    sampler = Sampler(0, shift, read_solver(recipe, mode != f.TEACHER), policy)
    if mode == f.TEACHER:
        steps = read_num_steps(wanted or [str(TEACHER_STEPS[bool(config.image_dim)])])
        return steps, sampler._replace(stepwise=True)
    if policy and (recipe or f.FIRST_STEPS.value is not None):
        usual = recipe.rollout.first_steps if recipe else 0
        first = usual if f.FIRST_STEPS.value is None else f.FIRST_STEPS.value
        sampler = sampler._replace(first_steps=first)
    if f.LEVELS.value is not None:
        levels = check_levels(read_levels(f.LEVELS.value))
        return [len(levels)], sampler._replace(levels=levels)
    own = recipe.schedule.levels if recipe else released.levels if released else ()
    if recipe:
        usual = (recipe.sample.one,) if f.STREAM.value else recipe.sample.num_steps
    else:
        usual = (released.num_steps if released else 4,)
    steps = read_num_steps(wanted or [str(k) for k in usual])
    if own:
        if steps != [len(own)] or f.SHIFT.value is not None or f.FIRST_STEPS.value:
            raise UserError(
                "this student was trained at the levels "
                f"{', '.join(f'{level:g}' for level in own)}; leave --num_steps, --first_steps "
                "and --shift out, or say others with --levels"
            )
        return steps, sampler._replace(levels=check_levels(own))
    return steps, sampler


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    try:
        explicit(levels)
        return tuple(level for level in levels if level)  # the 0 at the end may be there too
    except ValueError as error:
        raise UserError(f"--levels: {error}") from error


def read_solver(recipe: Recipe | None, student: bool) -> Solver | TeacherSolver:
    solvers = get_args(Solver) if student else get_args(TeacherSolver)
    solver = f.SOLVER.value or (recipe.sample.solver if recipe else "cm" if student else "unipc")
    if solver not in solvers:
        whose = "students" if student else "teachers"
        raise UserError(f"--solver={solver} is not for {whose}; choose from {', '.join(solvers)}")
    return cast(Solver | TeacherSolver, solver)
