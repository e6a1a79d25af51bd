"""The flags of launch.convert_wan, and which of them belong together.

No jax in here: an invalid value is refused at once.
"""

from typing import NamedTuple

from absl import flags

from salt_jax.cli.app import name_files, refuse_flags, refuse_pairs
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, real

SRC = flags.DEFINE_string(
    "src", None, "a folder or file with weights; with --to also a workdir", required=True
)
DST = flags.DEFINE_string("dst", None, "the folder to write to", required=True)
KEY = flags.DEFINE_string(
    "key",
    "",
    "which network of a file with several, such as generator; default: the averaged student",
)
LORA = flags.DEFINE_multi_string(
    "lora", [], "a LoRA to merge into the transformer; several with commas"
)
STRENGTH = flags.DEFINE_string(
    "lora_strength", "1", "what each LoRA is multiplied by; several with commas"
)
KEEP = flags.DEFINE_bool(
    "keep_lora",
    False,
    "write the LoRA to lora.safetensors instead of merging it; with --to: the adapter alone",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "how to store; default: as it is stored there, fp8 as it is exact",
)
TO = flags.DEFINE_enum(
    "to", None, ["official", "diffusers", "comfyui", "pt"], "write the layout of others"
)
STEP = flags.DEFINE_integer(
    "step", None, "step of a workdir's checkpoint; default the newest", lower_bound=1
)
AVERAGE = flags.DEFINE_enum(
    "average", "ema", ["ema", "none"], "averaged weights of a workdir, or raw ones"
)
name_files(SRC, DST, LORA)

MODES = {
    "in": "taking files in",
    "out": "writing with --to",
    "workdir": "writing a workdir with --to",
}
BELONGS = {
    **dict.fromkeys(("key", "lora", "lora_strength"), ("in",)),
    **dict.fromkeys(("step", "average"), ("workdir",)),
    **dict.fromkeys(("src", "dst", "dtype", "to", "keep_lora"), tuple(MODES)),
}


class Wanted(NamedTuple):
    """What is to be written where."""

    src: AnyPath
    dst: AnyPath
    workdir: bool  # whether `src` is one


def read_wanted() -> Wanted:
    """Raises UserError where flags do not go together, or there is nothing to read."""
    src, dst = as_path(SRC.value or ""), as_path(DST.value or "")
    workdir = (src / "config.json").is_file() and (src / "checkpoints").is_dir()
    refuse_flags("in" if not TO.value else "workdir" if workdir else "out", MODES, BELONGS)
    if not TO.value:
        refuse_pairs({"keep_lora": ["lora"], "lora_strength": ["lora"]}, {})
    if TO.value == "pt":
        for flag in (AVERAGE, KEEP):
            if flag.present:
                raise UserError(
                    f"--to=pt writes whole networks, averaged and not; leave out --{flag.name}"
                )
    check_apart(src, dst)
    if not src.exists():
        raise UserError(f"there is no {src}; check the name")
    return Wanted(src, dst, workdir)


def check_apart(src: AnyPath, dst: AnyPath) -> None:
    """Raises UserError where --dst and --src overlap."""
    one, other = real(src), real(dst)
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            f"--dst={dst} and --src={src} lie in each other; name a folder apart from what is read"
        )
