"""What a run keeps in its workdir beside checkpoints: its config, and who is who. Of several
processes one calls this.
"""

from salt_jax.config.migrate import record_changes
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.io.files import AnyPath, as_path, write_whole
from salt_jax.keys import Json
from salt_jax.stages.roles import (
    Role,
    going_on,
    refuse_changed,
    table,
    write_roles,
)


def keep_roles(
    was: list[Role], now: list[Role], recipe: Recipe, workdir: str | AnyPath, step: int
) -> None:
    """Prints the files of each role and records them for the next start; a resumed run must have
    the files it began with.

    Raises:
      UserError: a file that a run began with has changed.
    """
    begun = step or any((as_path(workdir) / "trajectories").glob("*.safetensors"))
    if begun:
        refuse_changed(was, now)
    print(table(going_on(now, recipe, workdir, step) if step else now), flush=True)
    if not (begun and was):
        write_roles(workdir, now)


def keep_config(
    workdir: str | AnyPath, recipe: Recipe, step: int, made_by: Json | None = None
) -> None:
    """Writes config.json; changes on resume are printed and added to changes.jsonl."""
    path = as_path(workdir) / "config.json"
    before = path.read_bytes().decode(errors="replace") if step and path.is_file() else ""
    record_changes(workdir, before, recipe, step)
    write_whole(path, to_json(recipe, made_by))
