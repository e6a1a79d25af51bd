"""The flags of launch.evaluate, and which of them belong together.

No jax in here: an invalid value is refused at once.
"""

from typing import NamedTuple, cast, get_args

from absl import flags

from salt_jax.choices import Solver
from salt_jax.cli.app import name_files, refuse_flags
from salt_jax.cli.parsing import read_cache_policy, read_workdir, refuse_not_finite
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
COUNT = flags.DEFINE_integer("count", 96, "clips per number of steps", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0)
TEACHER_STEPS = flags.DEFINE_integer(
    "teacher_steps", 32, "guided Euler steps of the teacher, 0 leaves it out", lower_bound=0
)
GUIDANCE = flags.DEFINE_float("guidance", None, "scale of the teacher; default as in the config")
LONG = flags.DEFINE_integer(
    "long",
    4,
    "length of the long videos of a student that works chunk by chunk, in clips; 0 leaves them out",
    lower_bound=0,
)
MEMORY = flags.DEFINE_list(
    "memory", [], "WINDOW:SINK:POSITIONS, cache policies of long videos; default as in the config"
)
SOLVERS = flags.DEFINE_list("solvers", list(get_args(Solver)), "solvers of the student")
name_files(WORKDIR, VBENCH)
MODES = {
    "vbench": "results of VBench",
    "teacher": "the workdir of a teacher",
    "clips": "the workdir of a student of whole clips",
    "chunks": "the workdir of a student that works chunk by chunk",
}
WORKDIRS = ("teacher", "clips", "chunks")
BELONGS = {
    "vbench_results": ["vbench"],
    **dict.fromkeys(
        ("workdir", "step", "average", "count", "seed", "teacher_steps", "guidance"), WORKDIRS
    ),
    "solvers": ["clips", "chunks"],
    "long": ["chunks"],
    "memory": ["chunks"],
}


class Wanted(NamedTuple):
    """What is measured of a workdir."""

    out: AnyPath
    recipe: Recipe
    solvers: list[Solver]
    policies: dict[str, CachePolicy]  # of long videos, by the words of --memory


def read_wanted() -> Wanted:
    """The flags as values that fit together and the workdir.

    Raises:
      UserError: they do not, or there is none.
    """
    out = as_path(WORKDIR.value or "")
    recipe = read_workdir(out, STEP.value)
    if recipe.data.kind == "latents":
        raise UserError(
            f"{out} makes videos of Wan 2.1: sample with --vbench, and score the videos with VBench"
        )
    mode = "teacher" if recipe.makes_teacher else "chunks" if recipe.causal else "clips"
    refuse_flags(mode, MODES, BELONGS)
    refuse_not_finite("guidance", GUIDANCE.value)
    solvers = read_solvers() if not recipe.makes_teacher else []
    return Wanted(
        out, recipe, solvers, read_policies(recipe) if recipe.causal and LONG.value else {}
    )


def read_policies(recipe: Recipe) -> dict[str, CachePolicy]:
    """--memory, or the recipe's. Raises UserError where the long videos do not fit one."""
    m = recipe.memory
    found = {
        words: read_cache_policy(words, m)
        for words in MEMORY.value or [f"{m.window}:{m.sink}:{m.positions}"]
    }
    frames = LONG.value * recipe.clip_shape[0]
    for words, policy in found.items():
        try:
            policy.sizes(frames)
            refuse_overflow(policy, policy.capacity(frames), frames)
        except ValueError as error:
            raise UserError(f"--long={LONG.value} under --memory={words}: {error}") from error
    return found


def read_solvers() -> list[Solver]:
    """--solvers. Raises UserError for one that does not exist, or for none."""
    if not SOLVERS.value:
        raise UserError(f"--solvers is empty; choose from {', '.join(get_args(Solver))}")
    for name in SOLVERS.value:
        if name not in get_args(Solver):
            raise UserError(f"--solvers names {name!r}; choose from {', '.join(get_args(Solver))}")
    return cast(list[Solver], SOLVERS.value)
