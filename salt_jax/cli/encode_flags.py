"""The flags of launch.encode, and which of them belong together.

No jax in here: an invalid value is refused at once.
"""

import math
from pathlib import Path
from typing import NamedTuple, get_args

from absl import flags

from salt_jax.choices import TeacherSolver
from salt_jax.cli.app import name_files, refuse_flags
from salt_jax.cli.parsing import read_size, refuse_frames
from salt_jax.data.prompt_pairs import read_pairs
from salt_jax.data.video_folder import Video, find_videos
from salt_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", "", "a folder of launch.convert_wan")
PRESET_SIZE = flags.DEFINE_enum(
    "preset_size", "full", ["full", "tiny"], "tiny: small random weights, no --weights"
)
VIDEOS = flags.DEFINE_string("videos", None, "a folder of videos")
CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "a table with columns file and caption; default: a.txt is the caption of a.mp4",
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "prompts, one a line, or a .csv, .tsv, .jsonl or .json with a column of them"
)
SWITCHES = flags.DEFINE_string(
    "switch_prompts",
    "",
    "prompts to which the videos of --prompts change under way, in the same places; default: a "
    "column switch_prompt of its table",
)
TEACHER = flags.DEFINE_bool("teacher", False, "make a clip of each prompt")
PICTURE = flags.DEFINE_bool("image", False, "for image-to-video: encode the first frame too")
DST = flags.DEFINE_string("dst", None, "the data set; the directory is made", required=True)
SIZE = flags.DEFINE_string("size", "832x480", "WIDTHxHEIGHT of the clips, pixels")
FRAMES = flags.DEFINE_integer(
    "frames",
    81,
    "frames of a clip, 4k + 1, at 16 a second; shorter videos are left out",
    lower_bound=1,
)
BATCH = flags.DEFINE_integer(
    "batch", None, "how many are encoded together; default 1 clip or 16 prompts", lower_bound=1
)
PER_PART = flags.DEFINE_integer(
    "per_part", 64, "sources in a file; a killed run loses one file at most", lower_bound=1
)
NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "prompt that guidance leads away from; default Wan's own"
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "type of all networks but the VAE, which is float32 as in Wan's code",
)
NUM_STEPS = flags.DEFINE_integer("num_steps", 50, "denoising steps of the teacher", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance", 5.0, "classifier-free guidance scale of the teacher, w of u + w (c - u)"
)
SHIFT = flags.DEFINE_float(
    "shift", 5.0, "timestep shift of the teacher's noise levels", lower_bound=0.0
)
SOLVER = flags.DEFINE_enum("solver", "unipc", get_args(TeacherSolver), "solver of the teacher")
SEED = flags.DEFINE_integer("seed", 0, "seed of the teacher's noise")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "index of this process; default JAX's")
PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "processes that share the work; default JAX's"
)
name_files(WEIGHTS, VIDEOS, CAPTIONS, PROMPTS, SWITCHES, DST)

MODES = {
    "videos": "videos (--videos)",
    "prompts": "prompts alone (--prompts)",
    "teacher": "clips of a teacher (--teacher)",
}
BELONGS = {
    **dict.fromkeys(("videos", "captions", "image"), ("videos",)),
    **dict.fromkeys(("prompts", "switch_prompts"), ("prompts", "teacher")),
    **dict.fromkeys(("size", "frames"), ("videos", "teacher")),
    **dict.fromkeys(("teacher", "num_steps", "guidance", "shift", "solver", "seed"), ("teacher",)),
}


def read_share(index: int, count: int) -> tuple[int, int]:
    """This process's number and how many there are, by the flags or, of several that have joined,
    as given.

    Raises:
      UserError: both say it.
    """
    told = PROCESS_INDEX.value, PROCESS_COUNT.value
    if count == 1:
        return told[0] or 0, told[1] or 1
    if told != (None, None):
        raise UserError(
            "--process_index and --process_count are for processes that cannot reach each other, "
            "and these do; leave both out"
        )
    return index, count


class Wanted(NamedTuple):
    """What is to be encoded, found and not decoded yet."""

    videos: list[Video]  # or prompts, which are videos without a file
    height: int
    width: int


def read_wanted() -> Wanted:
    """The sources and the size of clips.

    Raises:
      UserError: flags do not go together, or what they name cannot be used.
    """
    tiny = PRESET_SIZE.value == "tiny"
    index, count = (
        PROCESS_INDEX.value or 0,
        1 if PROCESS_COUNT.value is None else PROCESS_COUNT.value,
    )
    for wrong, message in (
        (
            PROCESS_COUNT.value == 0 or not 0 <= index < count,
            f"--process_index={index} must be below --process_count={count}",
        ),
        (
            tiny == bool(WEIGHTS.value),
            "name the weights: --weights=DIR of launch.convert_wan, or --preset_size=tiny",
        ),
        (bool(VIDEOS.value) == bool(PROMPTS.value), "give either --videos=DIR or --prompts=FILE"),
        (
            TEACHER.value and not PROMPTS.value,
            "--teacher makes clips of prompts; give --prompts=FILE",
        ),
        (
            not math.isfinite(GUIDANCE.value),
            f"--guidance={GUIDANCE.value} must be a number, such as 5",
        ),
        (not 0 < SHIFT.value < math.inf, f"--shift={SHIFT.value} must be more than 0, such as 5"),
    ):
        if wrong:
            raise UserError(message)
    refuse_flags(
        "teacher" if TEACHER.value else "videos" if VIDEOS.value else "prompts", MODES, BELONGS
    )
    refuse_frames(FRAMES.value)
    width, height = read_size(SIZE.value)
    if VIDEOS.value:
        return Wanted(find_videos(VIDEOS.value, CAPTIONS.value), height, width)
    prompts = read_pairs(PROMPTS.value or "", SWITCHES.value)
    sources = [Video(p.name, Path(), p.text, p.problem, p.switch) for p in prompts]
    return Wanted(sources, height, width)
