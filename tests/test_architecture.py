"""The rules of CONTRIBUTING.md that a machine can check: who may import whom, and how long code may
be.
"""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

MODULES = sorted(
    path for room in ("salt_jax", "configs", "launch") for path in (ROOT / room).rglob("*.py")
)
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]

BOTTOM = ("types", "errors", "choices", "keys", "hosts")
ORDER = (  # none imports a later one
    *BOTTOM,
    "flow",
    "losses",
    "models",
    "sharding",
    "io",
    "moving_shapes",
    "config",
    "samples",
    "convert",
    "data",
    "rollout",
    "optimizer",
    "state",
    "checkpoint_files",
    "checkpoint",
    "stages",
    "train",
    "workdir",
    "pipeline",
    "serve",
    "evaluate",
    "planning",
    "compile",
    "peers",
    "cli",
)
MAY_IMPORT = {
    "types": (),
    "errors": (),
    "choices": (),
    "keys": (),
    "hosts": (),
    "flow": (),
    "losses": ("flow",),
    "models": ("flow",),
    "sharding": ("models",),
    "io": ("models",),
    "moving_shapes": ("flow", "io"),
    "config": ("flow", "models", "moving_shapes", "io"),
    "samples": ("io",),
    "convert": ("models", "io"),
    "data": ("moving_shapes", "io", "config"),
    "rollout": ("flow", "models", "io", "config"),
    "optimizer": ("config",),
    "state": ("models", "config", "optimizer"),
    "checkpoint_files": ("io",),
    "checkpoint": ("sharding", "io", "state", "checkpoint_files"),
    "stages": (
        *("flow", "losses", "models", "sharding", "moving_shapes", "io", "config", "data"),
        *("rollout", "optimizer", "state", "checkpoint_files", "checkpoint"),
    ),
    "train": (
        *("models", "sharding", "moving_shapes", "io", "config", "data", "rollout", "optimizer"),
        *("state", "checkpoint_files", "checkpoint", "stages"),
    ),
    "workdir": ("models", "sharding", "io", "config", "checkpoint_files", "checkpoint", "stages"),
    "pipeline": (
        *("models", "sharding", "moving_shapes", "io", "config", "convert", "rollout", "stages"),
        "workdir",
    ),
    "serve": ("models", "io", "pipeline"),
    "evaluate": ("flow", "models", "moving_shapes", "io", "data", "rollout"),
    "planning": (
        *("flow", "models", "sharding", "moving_shapes", "config", "rollout", "state", "stages"),
        "train",
    ),
    "compile": (
        *("models", "sharding", "moving_shapes", "config", "rollout", "state", "stages", "train"),
        *("planning", "io"),
    ),
    "peers": (*("models", "io", "convert", "config", "rollout", "stages", "planning"),),
    "cli": ORDER[:-1],
}
READS_CONFIG = {"configs", "launch", "cli"}  # rooms; in salt_jax only config/reading.py


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, at top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name):
    path = ROOT / name
    room = (
        Path(name).parts[1].removesuffix(".py")
        if name.startswith("salt_jax/")
        else Path(name).parts[0]
    )
    for target in imports(path):
        top, *rest = target.split(".")
        assert top not in {"torch", "diffusers", "transformers", "tensorflow"}, (
            f"{name} imports {target}"
        )
        if top == "ml_collections":
            assert room in READS_CONFIG or name == "salt_jax/config/reading.py", (
                f"{name} imports {target}"
            )
        if name.startswith("salt_jax/") and room != "__init__":
            assert top not in {"configs", "launch", "tests"}, f"{name} imports {target}"
            if top == "salt_jax" and rest:
                assert rest[0] in {*MAY_IMPORT[room], *BOTTOM, room}, (
                    f"{name}: {room} may not import {target}"
                )


@pytest.mark.parametrize("name", NAMES)
def test_code_is_short(name):
    text = (ROOT / name).read_text()
    lines = text.count("\n")
    assert lines <= 300, f"{name} has {lines} lines, 300 allowed"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{name}:{node.lineno} {node.name}"
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{where} has {length} lines, 60 allowed"
            taken = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            count = len(taken) - (taken[:1] in (["self"], ["cls"]))
            assert count <= 7, f"{where} takes {count} values, 7 allowed"


def test_any_is_rare():
    """Each has its reason beside it; most are the aliases of types.py and keys.py."""
    names = (node for path in MODULES for node in ast.walk(ast.parse(path.read_text())))
    assert sum(isinstance(node, ast.Name) and node.id == "Any" for node in names) < 60


def test_no_room_imports_a_later_one():
    for room, others in MAY_IMPORT.items():
        later = ORDER[ORDER.index(room) :]
        assert not set(others) & set(later), f"{room} imports what stands below it"


def test_every_room_is_known():
    rooms = {
        path.stem
        for path in (ROOT / "salt_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} <= set(MAY_IMPORT)


def test_no_file_of_tests_is_imported():
    """What several share stands in helpers.py or in a module of their room."""
    for path in (ROOT / "tests").rglob("*.py"):
        for target in imports(path):
            assert not target.startswith("tests.") or ".test_" not in target, f"{path}: {target}"
