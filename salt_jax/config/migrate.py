"""What may differ when a workdir goes on, what may not, and what did."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salt_jax.errors import UserError

if TYPE_CHECKING:
    from salt_jax.config.schema import Recipe

# Keys, or whole sections, that may differ: how long, how often, where and in which portions, and
# numbers of the optimizers that their moments do not depend on.
MAY_CHANGE = {
    "updates",
    "accumulate",
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "max_skipped",
    "sample",
    "mesh",
    "data.dir",
    "model.attention",
    "model.remat",
    "host_state",
}
MAY_CHANGE |= {"teacher.accept_student"}  # `train.roles` asks it of every start
MAY_CHANGE |= {
    f"{who}_optimizer.{key}"
    for who in ("student", "critic")
    for key in ("learning_rate", "weight_decay", "clip")
}
# may be moved: `train.roles` compares what is in them
FILES = {"init_from", "weights", "teacher.weights"}

# Keys that configs written earlier lack, with the value that says what those runs did.
SINCE = {
    "teacher.weights": "",
    "teacher.accept_student": False,
    "schedule.levels": (),
    "keep_every": 0,
    "accumulate": 1,
    "teacher.dtype": "stored",
    "model.residual": "float32",
    "host_state": False,
    "model.attention": "auto",
}


class Change(NamedTuple):
    """A value that is not what it was."""

    key: str
    before: Any
    now: Any


def as_of_today(told: dict[str, Any]) -> dict[str, Any]:
    """A config that was written to a workdir or file, with the keys that came since."""
    told = {name: dict(value) if isinstance(value, dict) else value for name, value in told.items()}
    for path, value in SINCE.items():
        section, _, key = path.rpartition(".")
        place = told.get(section) if section else told
        if isinstance(place, dict):
            place.setdefault(key, value)
    if isinstance(model := told.get("model"), dict) and isinstance(model.get("remat"), bool):
        model["remat"] = "all" if model["remat"] else "none"  # it was a switch
    return told


def changes(before: str, r: "Recipe") -> list[Change]:
    """Every key whose value in the config `before` (JSON) the recipe does not share; an absent
    value is None.
    """
    was, now = (
        flat(json.loads(json.dumps(config)))
        for config in (as_of_today(json.loads(before)), dataclasses.asdict(r))
    )
    return [Change(key, was.get(key), now[key]) for key in sorted(now) if was.get(key) != now[key]]


def refuse_another_run(before: str, r: "Recipe", files_may_move: bool = False) -> None:
    """Raises UserError for the first value that what is there, made with the config `before`, does
    not share.

    `files_may_move`: the caller compares what is in the files that the config names.
    """
    allowed = MAY_CHANGE | (FILES if files_may_move else set())
    if r.student_optimizer.decay or r.critic_optimizer.decay:
        allowed = allowed - {"updates"}  # a decay is over the whole run
    for key, was, now in changes(before, r):
        if not {key, key.partition(".")[0]} & allowed:
            raise UserError(
                f"this workdir was trained with config.{key} = {was}, not {now}; "
                "pass the config that made it, or a new --workdir"
            )


def record_changes(workdir: str | Path, before: str, r: "Recipe", step: int) -> None:
    """Prints what is not as in the config `before`, the last start's, and adds it to
    WORKDIR/changes.jsonl.

    `step`: the update after which it begins.
    """
    try:
        found = changes(before, r)
    except (ValueError, AttributeError):
        return  # nobody has kept what the last start was
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [
        {"step": step, "key": key, "from": was, "to": now, "time": time} for key, was, now in found
    ]
    for line in lines:
        print(
            f"changed after update {step}: config.{line['key']} was {line['from']}, is {line['to']}"
        )
    if lines:
        with open(Path(workdir) / "changes.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested dict by keys that are joined with dots."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found
