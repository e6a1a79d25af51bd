"""Every config builds, tells how to run it, and stays a short delta of base.py; those at Wan size
trace.
"""

import ast
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from salt_jax.config.schema import read_recipe
from salt_jax.models.lora import init_lora
from salt_jax.models.wan import init_wan
from salt_jax.rollout.draws import Choice
from salt_jax.state import init_learner, init_state
from salt_jax.train.loop import decide
from salt_jax.train.optimizer import make_optimizer
from salt_jax.train.setup import empty_stream, make_network, make_networks
from salt_jax.train.stages import stage_step
from salt_jax.train.step import Networks, critic_step, student_step
from salt_jax.types import ImageText

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for path in (ROOT / "configs").glob("*.py") if path.name not in ("__init__.py", "parts.py")
)
DELTAS = [path for path in FILES if path.name != "base.py"]


def load(path):
    return importlib.import_module(f"configs.{path.stem}")


def variants(path):
    """What may stand after the colon: read off the config's own refusal; [()] for one without
    variants.
    """
    try:
        load(path).get_config("no such variant")
    except ValueError as error:
        return [(name,) for name in str(error).split("one of ")[1].split(", ")]
    except TypeError:
        return [()]
    raise AssertionError(f"{path.name} accepts any variant")


CASES = [
    pytest.param(path, v, id=":".join((path.stem, *v))) for path in FILES for v in variants(path)
]
WAN = [case for case in CASES if case.values[0].stem.startswith("wan_")]


@pytest.mark.parametrize(("path", "variant"), CASES)
def test_it_builds_a_recipe(path, variant):
    assert read_recipe(load(path).get_config(*variant)).updates >= 1


@pytest.mark.parametrize("path", DELTAS, ids=lambda path: path.stem)
def test_a_delta_is_short_has_only_known_keys_and_tells_its_command(path):
    assert len(path.read_text().splitlines()) <= 40
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m launch.train --config=configs/{path.name} --workdir=" in docstring
    for (variant,) in filter(None, variants(path)):
        assert variant in docstring or variant in ("chunk", "plain", "lora_salt")
    keys = lambda config: {
        name: keys(v) if hasattr(v, "items") else None for name, v in config.items()
    }
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
    table = (
        (ROOT / "docs/guide.md").read_text().split("\n## 3. ")[1].split("**From a Self-Forcing")[0]
    )
    for row in table.splitlines():
        keys, default = [*row.split(" | "), ""][:2]
        names = re.findall(r"`([\w.]+)`", keys)
        if names and default:
            names = [n if n[0] != "." else names[0].split(".")[0] + n for n in names]
            values = ast.literal_eval(f"({default.replace('`', '')},)")
            told |= dict(zip(names, values, strict=True))
    assert told == {name: value for name, value in known.items() if "_optimizer." not in name}


def programs(recipe):
    """Every kind of program that the first few hundred calls of a run need."""
    calls = [decide(recipe, recipe.updates, call) for call in range(300)]
    return dict(calls)


def abstract_run(recipe):
    """State, frozen parameters and batch of a run, as shapes."""
    shape, text = (
        recipe.clip_shape,
        jax.ShapeDtypeStruct((2, recipe.wan.text_length, recipe.wan.text_dim), jnp.float32),
    )
    null = jnp.zeros((1, *text.shape[1:]))

    def state():
        params = init_wan(jax.random.key(0), recipe.wan)
        adapt = (
            (lambda p: init_lora(jax.random.key(0), p, recipe.lora.rank))
            if recipe.lora.rank
            else lambda p: p
        )
        student = init_learner(
            adapt(params), make_optimizer(recipe.student_optimizer, recipe.updates)
        )
        critic = init_learner(
            adapt(params), make_optimizer(recipe.critic_optimizer, recipe.updates)
        )
        distil = recipe.stage == "distil"
        return init_state(
            student,
            critic if distil else None,
            empty_stream(recipe, make_network(recipe, None), null) if distil else None,
        )

    def frozen():
        params, teacher = (init_wan(jax.random.key(0), c) for c in (recipe.wan, recipe.teacher_wan))
        student = params if recipe.stage == "consistency" else teacher
        return {"teacher": student, "base": params, "student": params, "null_text": null}

    spec = lambda *sizes: jax.ShapeDtypeStruct((recipe.batch_size, *sizes), jnp.float32)
    clip = lambda *front: spec(*front, *shape)
    batch = {"video": clip(), "text": spec(*text.shape[1:])}
    if recipe.wan.image_dim:
        condition = spec(*shape[:-1], recipe.wan.condition_channels)
        batch["text"] = ImageText(batch["text"], spec(257, recipe.wan.image_dim), condition)
    if recipe.stage == "ode_regression":
        batch["states"] = clip(recipe.schedule.train_updates + 1)
    return jax.eval_shape(state), jax.eval_shape(frozen), batch, null


@pytest.mark.slow
@pytest.mark.parametrize(("path", "variant"), WAN)
def test_full_size_steps_trace(path, variant):
    """480p for five seconds in bfloat16, every program of the run: the state keeps its shapes and
    float32 masters.
    """
    config = load(path).get_config(*variant)
    config.batch_size = 2
    recipe = read_recipe(config)
    state, frozen, batch, null = abstract_run(recipe)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if recipe.stage == "distil":
        nets = make_networks(recipe, null, None)
        chosen = programs(recipe)
        steps = [(student_step, {"choice": c}, draw) for c, draw in chosen.items()]
        steps += [
            (critic_step, {"choice": Choice(sequence=s)}, draw)
            for s, draw in {c.sequence: draw for c, draw in chosen.items()}.items()
        ]
    else:
        network = make_network(recipe, None)
        nets, steps = Networks(network, network.denoise, network.denoise), [(stage_step, {}, None)]
    for step, static, draw in steps:
        run = lambda s, f, b, k, d, step=step, static=static: step(
            s, f, b, k, d, nets, recipe, **static
        )
        after, metrics = jax.eval_shape(run, state, frozen, batch, key, draw)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert {x.dtype for x in jax.tree.leaves(after.student.params)} == {np.dtype(np.float32)}
        assert all(metric.shape == () for metric in metrics.values())
