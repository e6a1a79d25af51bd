"""Every config builds, tells how to run it, and stays a short delta of base.py."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from salt_jax.train.recipe import read_recipe

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
DELTAS = [path for path in FILES if path.name != "base.py"]


def load(path):
    return importlib.import_module(f"configs.{path.stem}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds_a_recipe(path):
    assert read_recipe(load(path).get_config()).updates >= 1


@pytest.mark.parametrize("path", DELTAS, ids=lambda path: path.stem)
def test_a_delta_is_short_has_only_known_keys_and_tells_its_command(path):
    assert len(path.read_text().splitlines()) <= 40
    assert f"python -m launch.train --config=configs/{path.name} --workdir=" in (
        ast.get_docstring(ast.parse(path.read_text())) or ""
    )
    keys = lambda config: {name: keys(v) if hasattr(v, "items") else None for name, v in config.items()}
    base = load(path.with_name("base.py")).get_config()
    assert keys(load(path).get_config()) == keys(base)


def test_two_calls_of_a_config_share_nothing():
    module = load(FILES[0])
    first = module.get_config()
    first.ema.decay = 0.123
    assert module.get_config().ema.decay != 0.123


def test_the_guide_lists_every_config_key_with_its_default():
    """The optimizers' keys are listed without values; the rest as in configs/base.py."""
    known, told = flatten_dict(load(ROOT / "configs/base.py").get_config().to_dict(), sep="."), {}
    table = (ROOT / "docs/guide.md").read_text().split("\n## 3. ")[1].split("**From a Self-Forcing")[0]
    for row in table.splitlines():
        keys, default = [*row.split(" | "), ""][:2]
        names = re.findall(r"`([\w.]+)`", keys)
        if names and default:
            names = [n if n[0] != "." else names[0].split(".")[0] + n for n in names]
            values = ast.literal_eval(f"({default.replace('`', '')},)")
            told |= dict(zip(names, values, strict=True))
    assert told == {name: value for name, value in known.items() if "_optimizer." not in name}
