"""Who is who in a run: which file or workdir is the student, critic, teacher and text encoder, and
what made it.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from salt_jax.checkpoint_files import checkpoint_digest
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, write_whole
from salt_jax.io.model_folder import CRITIC, TEXT, VAE, WAN, part_file
from salt_jax.io.model_folder import Part as FilePart
from salt_jax.io.tensor_files import Report, digest, no_report
from salt_jax.stages.record import is_workdir, read_record, starts, trained_at
from salt_jax.stages.stage import CLOSED_FORM, NO_TEACHER, Stage


class Role(NamedTuple):
    """A part in a run, and who has it when the run begins."""

    name: str
    source: str  # file, folder or workdir, or how it is made
    step: int | None  # updates of the student, where that is known
    digest: str  # SHA-256 in hexadecimal digits; "" where there is no file
    sees: str  # "causal", "bidirectional", "not recorded", or "-"
    trained: str  # on what


Part = Callable[[str, str], Role]  # a part's name and what it is read from


def refuse_roles(stage: Stage) -> None:
    """Raises UserError where a network cannot have the part that a recipe gives it."""
    recipe = stage.recipe
    list(starts(recipe.init_from))
    refuse_other_levels(recipe)
    t = recipe.teacher
    named = {"weights": recipe.weights, "teacher.weights": t.weights}
    for key, where in named.items():
        if is_workdir(where):
            raise UserError(
                f"config.{key}={where} is a workdir; write its network to a file with "
                "launch.export (of Wan 2.1: "
                "launch.convert_wan --to) and name that"
            )
    key = "teacher.weights" if t.weights else "weights"
    taught = dict(stage.parts()).get("teacher") not in (None, CLOSED_FORM, NO_TEACHER)
    if not taught or t.accept_student or not named[key]:
        return
    record = read_record(named[key])
    if record.student:
        start = "" if t.weights else " and this one in config.init_from"
        raise UserError(
            f"config.{key}={named[key]} would be the teacher and says that it is a student "
            f"({record.made}); "
            f"name a teacher{start}, or set config.teacher.accept_student=True"
        )


def refuse_other_levels(recipe: Recipe) -> None:
    """Raises UserError where a few-step student starts from one of another shift or other listed
    levels, and the recipe does not accept that.
    """
    if not recipe.init_from or recipe.accept_shift:
        return
    was, has = trained_at(read_record(recipe.init_from).config), trained_at(asdict(recipe))
    if was and has and was != has:
        raise UserError(
            f"config.init_from={recipe.init_from} was trained at {was}, and config.schedule of "
            f"this run has {has}; make them equal, start from another stage, or set "
            "config.accept_shift=True"
        )


def roles(stage: Stage, report: Report = no_report) -> list[Role]:
    """The parts of a run as it begins. Every file that is named is read for its digest.

    Raises:
      UserError: a file cannot be read, or a workdir has no checkpoint.
    """
    recipe, part = stage.recipe, _reader(stage.recipe, report)
    found = _student(recipe, part)
    for name, where in stage.parts():
        if where in (CLOSED_FORM, NO_TEACHER):
            found.append(Role(name, where, None, "", "-", "-"))
        elif name in stage.learners:
            found += _learner(name, where, recipe, part)
        else:
            found.append(part(name, where))
    return [*found, _text_encoder(recipe, part)]


def refuse_another_base(workdir: str | AnyPath, recipe: Recipe, learner: str = "student") -> None:
    """Raises UserError where the network that a workdir's LoRA adapts is not what it was when that
    run began. `learner`: "student" or "critic".
    """
    if not (recipe.lora.rank and (was := read_roles(workdir))):
        return
    part = _reader(recipe, no_report)
    if learner == "student":
        now = _student(recipe, part)
    else:
        where = recipe.init_from if recipe.init_critic else recipe.weights
        now = _learner(learner, where, recipe, part)
    refuse_changed(was, now, str(workdir))


def _reader(recipe: Recipe, report: Report) -> Part:
    network = functools.cache(functools.partial(_network, seed=recipe.seed, report=report))

    def part(name: str, where: str) -> Role:
        carried = recipe.init_critic and name in ("critic", "critic's base")
        kind = CRITIC if carried else VAE if name == "VAE" else WAN
        return network(where, kind)._replace(name=name)

    return part


def _student(recipe: Recipe, part: Part) -> list[Role]:
    """The student, and what is below it where it is a LoRA or starts from one."""
    found = _learner("student", recipe.init_from or recipe.weights, recipe, part)
    below = list(starts(recipe.init_from))[1:]
    return found + [
        part("base of " * i + "the start", w or recipe.weights) for i, w in enumerate(below, 1)
    ]


def _learner(name: str, where: str, recipe: Recipe, part: Part) -> list[Role]:
    if not recipe.lora.rank:
        return [part(name, where)]
    adapter = f"fresh adapter of rank {recipe.lora.rank} (seed {recipe.seed})"
    return [Role(name, adapter, None, "", "-", "-"), part(f"{name}'s base", where)]


def _network(where: str, kind: FilePart, seed: int, report: Report) -> Role:
    """`CRITIC`: that of a workdir, or beside a converted student."""
    if not where:
        return Role("", f"fresh (seed {seed})", None, "", "-", "-")
    record, file = read_record(where), part_file(kind, where)
    try:
        if is_workdir(where):
            assert record.step is not None
            item = "critic" if kind is CRITIC else "ema"
            sha = checkpoint_digest(where, record.step, item, report)
        else:
            sha = digest(file, report) if file.is_file() else ""
    except OSError as error:
        raise UserError(
            f"cannot read {where} ({error.strerror or error}); mend it, or name another"
        ) from error
    if kind is CRITIC:
        return Role("", where, record.step, sha, "bidirectional", f"critic of: {record.made}")
    if kind is VAE:
        return Role("", where, None, sha, "-", "-")
    return Role("", where, record.step, sha, record.sees, record.made)


def _text_encoder(recipe: Recipe, part: Part) -> Role:
    """In the file of the weights, or what the texts of encoded data were embedded with."""
    if recipe.data.kind != "latents":
        return part("text encoder", recipe.weights)._replace(sees="-")
    try:
        settings = json.loads((as_path(recipe.data.dir) / "settings.json").read_text())
        sha = str(settings.get(TEXT.file, ""))
    except (OSError, ValueError, AttributeError):
        sha = ""  # the reader of the data says what is wrong
    return Role("text encoder", recipe.data.dir, None, sha, "-", "embedded by launch.encode")


def going_on(found: list[Role], recipe: Recipe, workdir: str | AnyPath, step: int) -> list[Role]:
    """The parts of a resumed run: what is in training comes from its own checkpoint."""

    def now(r: Role) -> Role:
        causal = recipe.causal and r.name == "student"
        return r._replace(
            source=str(workdir),
            step=step,
            digest=checkpoint_digest(workdir, step, r.name),
            sees="causal" if causal else "bidirectional",
            trained=f"this run, from {r.source}",
        )

    return [now(r) if r.name in ("student", "critic") else r for r in found]


def table(found: list[Role]) -> str:
    """Aligned text, a line for each part."""
    rows = [("part", "from", "step", "sha256", "sees", "trained")]
    for r in found:
        step = "-" if r.step is None else str(r.step)
        rows.append((r.name, r.source, step, r.digest[:12] or "-", r.sees, r.trained))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_roles(workdir: str | AnyPath, found: list[Role]) -> None:
    """WORKDIR/roles.json, whole or not at all."""
    text = json.dumps([r._asdict() for r in found], indent=2)
    write_whole(as_path(workdir) / "roles.json", text)


def read_roles(workdir: str | AnyPath) -> list[Role]:
    """What `write_roles` wrote; none in a workdir of an earlier version.

    Raises:
      UserError: the file is damaged.
    """
    path = as_path(workdir) / "roles.json"
    if not path.is_file():
        return []
    try:
        return [Role(**role) for role in json.loads(path.read_text())]
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); put a copy of it back, or delete it"
        ) from error


def refuse_changed(was: list[Role], now: list[Role], run: str = "") -> None:
    """Raises UserError for a part whose file is not what it was. A file that was moved is the same.

    `run`: the workdir, where it is another one than that of the run that starts.
    """
    before = {r.name: r for r in was}
    for r in now:
        old = before.get(r.name, r)
        if old.digest != r.digest:
            raise UserError(
                f"the {r.name} of {run or 'this run'} is {_file(r)} and was {_file(old)} when it "
                "began; put the old file back, or "
                f"{'start from another workdir' if run else 'pass a new --workdir'}"
            )


def _file(r: Role) -> str:
    return f"{r.source} (sha256 {r.digest[:12] or 'none'})"
