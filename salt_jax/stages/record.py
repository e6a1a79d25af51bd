"""What a network says about itself: the run that made it, or how it was taken in from a file of
others.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from salt_jax.checkpoint_files import newest_step
from salt_jax.config.reading import resolved
from salt_jax.config.schema import ANY_LEVEL, MAKES_TEACHER, works_causally
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.header import read_metadata
from salt_jax.io.model_folder import WAN, part_file
from salt_jax.io.tensor_files import digest
from salt_jax.keys import Json

# What students stand under in training checkpoints of the Self-Forcing family; "state_dict" and the
# like tell nothing.
STUDENT_KEY = r"generator|student|^model$"


class Record(NamedTuple):
    """Empty where nothing is recorded."""

    config: Json  # of the run that made it, in the keys of today
    step: int | None
    converted: str  # how launch.convert_wan took it in
    student: bool  # causal or of few steps: no teacher

    @property
    def sees(self) -> str:
        """Which frames a frame of its video sees."""
        if not self.config:
            return "causal" if self.student else "not recorded"
        stage, video = self.config["stage"], self.config.get("video", "noised")
        return "causal" if works_causally(stage, video) else "bidirectional"

    @property
    def made(self) -> str:
        """What it was trained on, in a few words."""
        if not self.config:
            return self.converted or "not recorded"
        stage, schedule = self.config["stage"], _dict(self.config.get("schedule"))
        made = f"{stage} on {_dict(self.config.get('data')).get('kind', 'moving_shapes')}"
        if noise := trained_at(self.config):
            count = "" if schedule.get("levels") else f"{schedule.get('train_levels')} levels of "
            made += f", {count}{noise}"
        if rank := _dict(self.config.get("lora")).get("rank"):
            made += f", LoRA of rank {rank}"
        return made + (f", from {self.config['init_from']}" if self.config.get("init_from") else "")


def trained_at(config: Json) -> str:
    """The noise levels of a few-step student, in words; "" of a network that denoises from any, and
    where nothing is recorded.
    """
    schedule = _dict(config.get("schedule"))
    if config.get("stage", ANY_LEVEL[0]) in ANY_LEVEL:
        return ""
    levels = [f"{level:g}" for level in schedule.get("levels", ()) if level]
    return f"levels {' '.join(levels)}" if levels else f"shift {schedule.get('shift')}"


def is_workdir(where: str) -> bool:
    """Whether it is what launch.train writes.

    A folder of weights in Diffusers' layout also has a config.json.
    """
    return (
        bool(where)
        and (as_path(where) / "config.json").is_file()
        and (as_path(where) / "checkpoints").is_dir()
    )


def read_record(where: str) -> Record:
    """Of a workdir, a file of launch.export, or a folder or file of launch.convert_wan.

    An unreadable file gives an empty record: the error comes from reading its arrays.
    """
    if is_workdir(where):
        config = _json((as_path(where) / "config.json").read_bytes())
        config = _today(config, as_path(where) / "config.json")
        return Record(config, newest_step(where), "", _student(config))
    try:
        metadata = read_metadata(part_file(WAN, where))
    except UserError:
        metadata = {}
    ours, source = _json(metadata.get("salt_jax")), _json(metadata.get("source"))
    configs = _json(metadata.get("config")), _json(ours.get("config"))
    config = next(filter(None, (_today(config, part_file(WAN, where)) for config in configs)), {})
    step, converted = ours.get("step"), str(source.get("told", ""))
    key = source.get("student")
    if key is None:  # earlier versions wrote it among the words alone
        key = next(iter(re.findall(r"(\w+) of the file", converted)), "")
    if source.get("lora"):
        converted += ", with a LoRA"
    student = _student(config) if config else bool(re.search(STUDENT_KEY, str(key)))
    return Record(
        config,
        step if isinstance(step, int) else None,
        converted and f"converted: {converted}",
        student,
    )


def starts(init_from: str) -> Iterator[str]:
    """`config.init_from`, and where that is the workdir of a LoRA what it adapts, and so on; "" is
    the weights.

    Raises:
      UserError: it leads back to itself.
    """
    seen = []
    while init_from:
        if init_from in seen:
            raise UserError(
                f"config.init_from={seen[0]} leads back to {init_from}; name another start"
            )
        seen.append(init_from)
        yield init_from
        config = read_record(init_from).config if is_workdir(init_from) else {}
        if not _dict(config.get("lora")).get("rank"):
            return
        init_from = config.get("init_from", "")
    yield init_from


def same_file(one: str, other: str) -> bool:
    """Whether two names of weights are of one file, or of two with the same bytes."""
    files = [part_file(WAN, where) for where in (one, other) if where]
    return one == other or (
        len(files) == 2
        and all(file.is_file() for file in files)
        and digest(files[0]) == digest(files[1])
    )


def _today(config: Json, where: AnyPath) -> Json:
    return resolved(config, where) if isinstance(config.get("stage"), str) else {}


def _student(config: Json) -> bool:
    return "stage" in config and config["stage"] not in MAKES_TEACHER


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _json(text: object) -> Json:
    """A JSON object, also one that is there already; {} for anything else."""
    try:
        return _dict(json.loads(text) if isinstance(text, str | bytes) else text)
    except (ValueError, RecursionError):
        return {}
