"""The flags of launch.compile. No jax in here: an invalid value is refused at once."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from salt_jax.cli.app import name_files
from salt_jax.compile.target import Target, read_target
from salt_jax.errors import UserError
from salt_jax.io.files import in_bucket

PARTS = ("student", "critic", "teacher", "stream", "vae", "text")
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "which run; see configs/", lock_config=True
)
TARGET = flags.DEFINE_string(
    "target",
    "here",
    "tpu:v5p:2x2x4, gpu:h100:8, gpu:h100:2x8 (hosts x devices); here: the devices found",
)
WHAT = flags.DEFINE_list("what", ["all"], f"of {', '.join(PARTS)}, or all")
JSON = flags.DEFINE_string("json", None, "a file to write all figures to")
name_files(JSON)


def read_flags() -> tuple[Target, list[str]]:
    """The target, and the parts of a run to compile.

    Raises:
      UserError: there is no such machine or part, or no folder for the file.
    """
    what = WHAT.value
    if not what or set(what) - {*PARTS, "all"}:
        raise UserError(f"--what={','.join(what)} must name some of {', '.join(PARTS)}, or all")
    if JSON.value and not in_bucket(JSON.value) and not Path(JSON.value).absolute().parent.is_dir():
        raise UserError(
            f"--json={JSON.value}: there is no folder {Path(JSON.value).parent}; make it"
        )
    target = read_target(TARGET.value)
    return target, [part for part in PARTS if part in what or "all" in what]
