"""Old configs in the keys of today, which keys may change when a workdir resumes, and a record of
those that did.
"""

import dataclasses
import datetime
import json
import re
from typing import NamedTuple

from salt_jax.config.build import all_keys
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, append, as_path
from salt_jax.keys import Json

MADE_BY = "made_by"  # beside the keys in config.json: what wrote it
# What 0.1 called a key or section.
RENAMED = {
    "updates": "iterations",
    "critic_updates": "critic_ratio",
    "view": "renoise",
    "schedule.train_updates": "schedule.train_levels",
    "schedule.anchor_updates": "schedule.anchor_levels",
    "rollout.updates": "rollout.num_steps",
    "rollout.first_updates": "rollout.first_steps",
    "ode.updates": "ode.num_steps",
    "sample.num_updates": "sample.num_steps",
}
# Where 0.1 had what is shipped, beside the folder that a command was run in.
ASSETS = re.compile(r"assets/(\w+)\.safetensors")


class Change(NamedTuple):
    """A value that is not what it was."""

    key: str
    before: object
    now: object


def as_of_today(values: Json) -> Json:
    """A config that was written to a workdir or file, in the keys of today.

    Keys added since have their defaults, which are what old runs did.
    """
    there = flat({name: value for name, value in values.items() if name != MADE_BY})
    for old, new in RENAMED.items():
        for key in [key for key in there if f"{key}.".startswith(f"{old}.")]:
            there.setdefault(new + key.removeprefix(old), there.pop(key))
    if isinstance(remat := there.get("model.remat"), bool):  # it was a switch
        there["model.remat"] = "all" if remat else "none"
    for path, value in there.items():
        if isinstance(value, str) and (shipped := ASSETS.fullmatch(value)):
            there[path] = shipped[1]
    defaults = flat(dataclasses.asdict(Recipe()))
    missing = {
        key: value
        for key, value in defaults.items()
        # a section that is no section is for `build` to refuse
        if key not in there and key.partition(".")[0] not in there
    }
    return nested(there | missing)


def changes(before: str, r: Recipe) -> list[Change]:
    """Every key whose value differs between the config `before` (JSON) and the recipe; an absent
    value is None.
    """
    was, now = (
        flat(json.loads(json.dumps(config)))
        for config in (as_of_today(json.loads(before)), dataclasses.asdict(r))
    )
    return [Change(key, was.get(key), now[key]) for key in sorted(now) if was.get(key) != now[key]]


def refuse_another_run(before: str, r: Recipe, files_may_move: bool = False) -> None:
    """Raises UserError for the first key that differs from the config `before` and may not change
    on resume.

    `files_may_move`: the caller compares what is in the files that the config names.
    """
    kinds = {"free", "file"} if files_may_move else {"free"}
    allowed = {path for path, field in all_keys(Recipe) if field.metadata["resume"] in kinds}
    if r.student_optimizer.decay or r.critic_optimizer.decay:
        allowed = allowed - {"iterations"}  # a decay is over the whole run
    for key, was, now in changes(before, r):
        if key not in allowed:
            raise UserError(
                f"this workdir was trained with config.{key} = {was}, not {now}; "
                "pass the config that made it, or a new --workdir"
            )


def record_changes(workdir: str | AnyPath, before: str, r: Recipe, step: int) -> None:
    """Prints each change since the config `before`, the last start's, and appends it to
    WORKDIR/changes.jsonl.

    `step`: the update after which it begins.
    """
    try:
        found = changes(before, r)
    except (ValueError, AttributeError):
        return  # the last start left no readable config
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [
        {"step": step, "key": key, "from": was, "to": now, "time": time} for key, was, now in found
    ]
    for line in lines:
        print(
            f"changed after update {step}: config.{line['key']} was {line['from']}, is {line['to']}"
        )
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        append(as_path(workdir) / "changes.jsonl", text.encode())


def flat(tree: Json, prefix: str = "") -> Json:
    """Values of a nested dict by keys that are joined with dots."""
    found: Json = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def nested(values: Json) -> Json:
    """The inverse of `flat`."""
    found: Json = {}
    for path, value in values.items():
        *sections, key = path.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return found
