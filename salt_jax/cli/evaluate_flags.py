"""The flags of launch.evaluate, and which of them belong together.

No jax in here: an invalid value is refused at once.
"""

from typing import NamedTuple, cast, get_args

from absl import flags

from salt_jax.choices import Solver
from salt_jax.cli.app import name_files, refuse_flags
from salt_jax.cli.parsing import (
    read_cache_policy,
    read_prompt_list,
    read_workdir,
    refuse_not_finite,
)
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.models.cache_policy import CachePolicy, refuse_overflow

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of launch.train")
STEP = flags.DEFINE_integer(
    "step", None, "step of the checkpoint; default the newest", lower_bound=1
)
AVERAGE = flags.DEFINE_enum("average", "ema", ["ema", "none"], "averaged weights, or raw ones")
VBENCH = flags.DEFINE_string(
    "vbench_results", None, "a file or a folder of VBench's *_eval_results.json"
)
WEIGHTS = flags.DEFINE_string(
    "weights", None, "of Wan 2.1: a folder of launch.convert_wan; default config.weights"
)
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "of Wan 2.1: captions, one a line, UTF-8; a clip of each is measured"
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "type of all networks but the VAE (float32)"
)
COUNT = flags.DEFINE_integer("count", 96, "clips per number of steps", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0)
TEACHER_STEPS = flags.DEFINE_integer(
    "teacher_steps", 32, "guided Euler steps of the teacher, 0 leaves it out", lower_bound=0
)
GUIDANCE = flags.DEFINE_float("guidance", None, "scale of the teacher; default as in the config")
LONG = flags.DEFINE_integer(
    "long",
    None,
    "length of the long videos of a student that works chunk by chunk, in clips; 0 leaves them "
    "out; default 4, of Wan 2.1 0",
    lower_bound=0,
)
MEMORY = flags.DEFINE_list(
    "memory", [], "WINDOW:SINK:POSITIONS, cache policies of long videos; default as in the config"
)
SOLVERS = flags.DEFINE_list(
    "solvers", None, "solvers of the student; default both, of Wan 2.1 the config's"
)
name_files(WORKDIR, VBENCH, WEIGHTS, PROMPTS_FILE)
MODES = {
    "vbench": "results of VBench",
    "teacher": "the workdir of a teacher",
    "clips": "the workdir of a student of whole clips",
    "chunks": "the workdir of a student that works chunk by chunk",
    "wan clips": "the workdir of a student of whole clips of Wan 2.1",
    "wan chunks": "the workdir of a student of Wan 2.1 that works chunk by chunk",
}
SHAPES = ("teacher", "clips", "chunks")
WANS = ("wan clips", "wan chunks")
BELONGS = {
    "vbench_results": ["vbench"],
    **dict.fromkeys(("workdir", "step", "average", "seed"), (*SHAPES, *WANS)),
    **dict.fromkeys(("count", "teacher_steps", "guidance"), SHAPES),
    **dict.fromkeys(("weights", "prompts_file", "dtype"), WANS),
    "solvers": ["clips", "chunks", *WANS],
    "long": ["chunks", "wan chunks"],
    "memory": ["chunks", "wan chunks"],
}


class Wanted(NamedTuple):
    """What is measured of a workdir."""

    out: AnyPath
    recipe: Recipe
    solvers: list[Solver]
    long: int  # length of long videos, in clips
    policies: dict[str, CachePolicy]  # of long videos, by the words of --memory
    prompts: list[str]  # of Wan 2.1


def read_wanted() -> Wanted:
    """The flags as values that fit together and the workdir.

    Raises:
      UserError: they do not, or there is none.
    """
    out = as_path(WORKDIR.value or "")
    recipe = read_workdir(out, STEP.value)
    wan = recipe.data.kind == "latents"
    student = "wan " * wan + ("chunks" if recipe.causal else "clips")
    refuse_flags("teacher" if recipe.makes_teacher else student, MODES, BELONGS)
    refuse_not_finite("guidance", GUIDANCE.value)
    solvers = read_solvers(recipe) if not recipe.makes_teacher else []
    long = LONG.value if LONG.value is not None else 4 * (not wan)
    policies = read_policies(recipe, long) if recipe.causal and long else {}
    return Wanted(out, recipe, solvers, long, policies, read_wan_prompts(recipe) if wan else [])


def read_wan_prompts(recipe: Recipe) -> list[str]:
    """--prompts_file. Raises UserError where there is none, or the student needs pictures."""
    if recipe.wan.image_dim:
        raise UserError(
            f"--workdir={WORKDIR.value} makes videos of pictures, which is not measured here; "
            "sample it, and score the videos with VBench"
        )
    if not PROMPTS_FILE.value:
        raise UserError("what Wan 2.1 makes is measured by prompts; give --prompts_file=FILE")
    return read_prompt_list(PROMPTS_FILE.value)


def read_policies(recipe: Recipe, long: int) -> dict[str, CachePolicy]:
    """--memory, or the recipe's. Raises UserError where the long videos do not fit one."""
    m = recipe.memory
    found = {
        words: read_cache_policy(words, m)
        for words in MEMORY.value or [f"{m.window}:{m.sink}:{m.positions}"]
    }
    frames = long * recipe.clip_shape[0]
    for words, policy in found.items():
        try:
            policy.sizes(frames)
            refuse_overflow(policy, policy.capacity(frames), frames)
        except ValueError as error:
            raise UserError(f"--long={long} under --memory={words}: {error}") from error
    return found


def read_solvers(recipe: Recipe) -> list[Solver]:
    """--solvers. Raises UserError for one that does not exist, or for none."""
    if SOLVERS.value is None:
        wan = recipe.data.kind == "latents"
        return [recipe.sample.solver] if wan else list(get_args(Solver))
    if not SOLVERS.value:
        raise UserError(f"--solvers is empty; choose from {', '.join(get_args(Solver))}")
    for name in SOLVERS.value:
        if name not in get_args(Solver):
            raise UserError(f"--solvers names {name!r}; choose from {', '.join(get_args(Solver))}")
    return cast(list[Solver], SOLVERS.value)
