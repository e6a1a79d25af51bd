"""The flags of launch.sample, and which of them belong together.

No jax in here: an invalid value is refused at once.
"""

from typing import get_args

from absl import flags

from salt_jax.choices import Solver, TeacherSolver
from salt_jax.cli.app import name_files, refuse_flags, refuse_pairs
from salt_jax.errors import UserError
from salt_jax.rollout.settings import RELEASED

# What makes the videos
WORKDIR = flags.DEFINE_string("workdir", None, "a workdir of launch.train")
STEP = flags.DEFINE_integer(
    "step", None, "step of the checkpoint; default the newest", lower_bound=1
)
AVERAGE = flags.DEFINE_enum("average", "ema", ["ema", "none"], "averaged weights, or raw ones")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "a folder of launch.convert_wan, instead of --workdir or with it"
)
MODEL = flags.DEFINE_string(
    "model", None, "the preset that the weights must be of, such as wan2.1-t2v-1.3b"
)
PRESET_SIZE = flags.DEFINE_enum(
    "preset_size",
    "full",
    ["full", "tiny"],
    "tiny: --model made small, with random weights and no --weights",
)
STUDENT = flags.DEFINE_string(
    "student", None, "a converted few-step model; --weights gives the other parts"
)
RECIPE = flags.DEFINE_enum(
    "recipe",
    None,
    sorted(RELEASED),
    "levels, chunk and cache policy of a released student",
)
# What it makes
OUT = flags.DEFINE_string("out", None, "where the videos go; default WORKDIR/samples")
PROMPT = flags.DEFINE_string("prompt", None, "one caption")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "captions, one a line, UTF-8")
COUNT = flags.DEFINE_integer("count", 8, "clips, where no prompts file says it", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "seed of the noise", lower_bound=0)
FRAMES = flags.DEFINE_integer(
    "frames",
    None,
    "length of the video; default as in training, for Wan 81 (4k + 1)",
    lower_bound=1,
)
SECONDS = flags.DEFINE_float(
    "seconds", None, "length of the video instead of --frames, up to whole chunks", lower_bound=0.0
)
SIZE = flags.DEFINE_string(
    "size", "832x480", "WIDTHxHEIGHT of Wan's videos; with --image their area"
)
PICTURE = flags.DEFINE_string("image", None, "the first frame")
PICTURE_FIT = flags.DEFINE_enum(
    "image_fit",
    "squash",
    ["squash", "crop"],
    "how CLIP sees it: as in Wan's code, or as in diffusers",
)
PREFIX = flags.DEFINE_string("prefix", None, "a clip that is continued, chunk by chunk")
VBENCH = flags.DEFINE_string(
    "vbench", None, "VBench's list of prompts: writes {prompt}-{index}.mp4 into --out"
)
EXTENDED = flags.DEFINE_string(
    "extended", None, "what to generate for the lines of --vbench instead"
)
# How it makes it
NUM_STEPS = flags.DEFINE_list(
    "num_steps",
    None,
    "network evaluations per clip; default as in the config (of --stream the middle number), for "
    "teachers of Wan 50 (40)",
)
LEVELS = flags.DEFINE_list(
    "levels",
    None,
    "noise levels of a student, 1000 sigma, as 1000,757,522; default an even grid, shifted",
)
SHIFT = flags.DEFINE_float(
    "shift",
    None,
    "timestep shift of the noise levels; default as in the config, or 5",
    lower_bound=0.0,
)
SOLVER = flags.DEFINE_enum(
    "solver",
    None,
    sorted({*get_args(Solver), *get_args(TeacherSolver)}),
    "default as in the config, for teachers of Wan unipc",
)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "scale w of u + w (c - u); default 5, for students 1 (no guidance)"
)
NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "prompt that guidance leads away from; default Wan's own"
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "type of all networks but the VAE (float32)"
)
TILE = flags.DEFINE_integer(
    "tile", 0, "decode in tiles of so many latent rows, to save memory; 0: whole", lower_bound=0
)
TINY_DECODER = flags.DEFINE_string(
    "tiny_decoder", None, "taew2_1.pth of TAEHV: decodes in place of the VAE, faster"
)
# Chunk by chunk
CHUNK = flags.DEFINE_integer(
    "chunk", 0, "latent frames that a converted student makes together; 0: all", lower_bound=0
)
MEMORY = flags.DEFINE_string(
    "memory",
    None,
    "cache policy WINDOW:SINK:POSITIONS[:PERIOD][:CONTEXT]; default as in the config",
)
FIRST_STEPS = flags.DEFINE_integer(
    "first_steps",
    None,
    "network evaluations of the first chunk, 0: as of the others; default as in the config",
    lower_bound=0,
)
SWITCH = flags.DEFINE_multi_string(
    "switch", [], "FRAME:PROMPT, another prompt from that frame on; may be repeated"
)
FLUSH = flags.DEFINE_bool(
    "flush", False, "at a switch drop all but the sink and two frames, compute nothing again"
)
CUT = flags.DEFINE_bool("cut", False, "a switch is a scene cut; needs relative positions")
STREAM = flags.DEFINE_bool(
    "stream", False, "write one video while it is made, and print how fast that was"
)
name_files(WORKDIR, WEIGHTS, STUDENT, OUT, PROMPTS_FILE, PICTURE, PREFIX, VBENCH, EXTENDED)
name_files(TINY_DECODER)

SHAPES, SHAPES_CHUNKS = "shapes", "shapes chunks"
WAN, WAN_CHUNKS = "wan", "wan chunks"
TEACHER, STUDENT_CLIPS, STUDENT_CHUNKS = "teacher", "student", "student chunks"
MODES = {
    SHAPES: "a workdir of Moving Shapes",
    SHAPES_CHUNKS: "a workdir of Moving Shapes that works chunk by chunk",
    WAN: "a workdir of Wan 2.1",
    WAN_CHUNKS: "a workdir of Wan 2.1 that works chunk by chunk",
    TEACHER: "a teacher of Wan 2.1 (--weights)",
    STUDENT_CLIPS: "a converted student of whole clips (--student)",
    STUDENT_CHUNKS: "a converted student that works chunk by chunk (--chunk)",
}
ALL = set(MODES)
WORKDIRS = {SHAPES, SHAPES_CHUNKS, WAN, WAN_CHUNKS}
CHUNKS = {SHAPES_CHUNKS, WAN_CHUNKS, STUDENT_CHUNKS}
CONVERTED = {TEACHER, STUDENT_CLIPS, STUDENT_CHUNKS}
WANS = ALL - {SHAPES, SHAPES_CHUNKS}
BELONGS = {
    **dict.fromkeys(("out", "prompt", "prompts_file", "count", "seed", "num_steps", "shift"), ALL),
    **dict.fromkeys(("solver", "guidance", "negative_prompt"), ALL),
    **dict.fromkeys(("workdir", "step", "average"), WORKDIRS),
    **dict.fromkeys(("model", "preset_size", "size"), CONVERTED),
    **dict.fromkeys(("student", "recipe", "chunk"), CONVERTED - {TEACHER}),
    **dict.fromkeys(("weights", "image", "image_fit", "dtype", "tile", "vbench", "extended"), WANS),
    "tiny_decoder": WANS,
    **dict.fromkeys(("memory", "first_steps", "switch", "flush", "cut", "prefix"), CHUNKS),
    **dict.fromkeys(("stream", "seconds"), CHUNKS),
    "frames": ALL - {SHAPES},
    "levels": ALL - {TEACHER},
}
NEEDS = {
    "extended": ["vbench"],
    "flush": ["switch"],
    "cut": ["switch"],
    "image_fit": ["image"],
}
EXCLUDES = {
    "prompt": ["prompts_file", "vbench"],
    "prompts_file": ["vbench", "count"],
    "vbench": ["count", "switch", "prefix"],
    "image": ["prefix"],
    "frames": ["seconds"],
    "tile": ["tiny_decoder"],
    "stream": ["prompts_file", "vbench", "count", "prefix", "image", "tile"],
    "levels": ["num_steps", "first_steps", "shift"],
}


def refuse(mode: str) -> None:
    """Raises UserError for flags that do not belong to the mode, or not together."""
    refuse_flags(mode, MODES, BELONGS)
    refuse_pairs(NEEDS, EXCLUDES)


def converted_mode() -> str:
    """The mode of what is asked without a workdir.

    Raises:
      UserError: nothing that makes videos is named, or two things are.
    """
    tiny = PRESET_SIZE.value == "tiny"
    if tiny == bool(WEIGHTS.value):
        raise UserError(
            "name what makes the videos: --workdir=DIR, --weights=DIR or --preset_size=tiny "
            "--model=NAME"
        )
    if tiny and not MODEL.value:
        raise UserError(
            "--preset_size=tiny makes a model small; name it, such as --model=wan2.1-t2v-1.3b"
        )
    if tiny and STUDENT.value:
        raise UserError(
            "--preset_size=tiny makes random weights, --student names a file; leave one of them out"
        )
    if CHUNK.value or (RECIPE.value and not flags.FLAGS["chunk"].present):
        return STUDENT_CHUNKS
    return STUDENT_CLIPS if STUDENT.value or RECIPE.value else TEACHER
