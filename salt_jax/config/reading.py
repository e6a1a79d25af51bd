"""Between a `Recipe` and what people write: a ConfigDict, and the config.json of a workdir."""

import dataclasses
import json

from ml_collections import ConfigDict

from salt_jax.config.build import build
from salt_jax.config.migrate import MADE_BY, as_of_today, flat, nested
from salt_jax.config.paths import PATHS, beside
from salt_jax.config.schema import Recipe
from salt_jax.config.validate import refuse_contradictions
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.keys import Config, Json
from salt_jax.models.presets import PRESETS, TEXT_PRESETS


def to_config_dict(recipe: Recipe) -> Config:
    """A recipe as the ConfigDict that a file in `configs/` edits."""
    return ConfigDict(dataclasses.asdict(recipe))


def read_recipe(config: ConfigDict) -> Recipe:
    """The inverse, checked.

    Raises:
      UserError: a key is missing or unknown, a value is not what it must be, or values contradict
        each other. What a stage asks beyond that is refused by `stages.make_stage`.
    """
    recipe = build(Recipe, config, "config")
    for name, value, known in (
        ("config.model.preset", recipe.model.preset, PRESETS),
        ("config.teacher.preset", recipe.teacher.preset or recipe.model.preset, PRESETS),
        ("config.text_encoder", recipe.text_encoder, TEXT_PRESETS),
    ):
        if value not in known:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    refuse_contradictions(recipe)
    return recipe


def to_json(recipe: Recipe, made_by: Json | None = None) -> str:
    """The config as it is written to a workdir; `made_by`: config file, commit, versions."""
    more = {MADE_BY: made_by} if made_by else {}
    return json.dumps(dataclasses.asdict(recipe) | more, indent=2)


def read_workdir(workdir: str | AnyPath) -> Recipe:
    """The recipe that a workdir was made with.

    Raises:
      UserError: its config.json is absent or damaged.
    """
    path = as_path(workdir) / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({error}); put the file of launch.train back"
        ) from error


def from_json(text: str, where: str | AnyPath = "config.json") -> Recipe:
    """Reads back what `to_json` of this or an earlier version wrote in the file `where`.

    Raises:
      UserError: it is no config, or one that `read_recipe` refuses.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}); put the file of launch.train back"
        ) from error
    if not isinstance(values, dict) or "stage" not in values:
        raise UserError(f"{where} is no config of a run; put the file of launch.train back")
    try:
        return read_recipe(ConfigDict(resolved(values, where)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def resolved(values: Json, where: str | AnyPath) -> Json:
    """The JSON values of a config in the file `where`, in the keys of today, paths absolute."""
    there = flat(as_of_today(values))
    return nested(there | {path: beside(there[path], where) for path in PATHS if path in there})
