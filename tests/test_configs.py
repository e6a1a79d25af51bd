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

from salt_jax.config.build import all_keys
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import Recipe
from salt_jax.config.table import table
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
# Every config with what may stand after the colon, alone and together.
OPTIONS = {
    "base": [None],
    "sc_dmd": [
        "",
        "dmd8",
        "dmd4",
        *("wan" + i2v + v for i2v in ("", ",i2v") for v in ("", ",dmd8", ",dmd4")),
    ],
    "teacher": [None],
    "teacher_forcing": ["", "frame", "wan", "wan,frame"],
    "ode_regression": ["", "frame", "wan", "wan,frame", "wan,causvid", "wan,causvid,salt"],
    "consistency": ["", "frame", "wan", "wan,frame"],
    "self_forcing": ["", "naive", "mixed", "mixed_sc", "salt", "wan", "wan,salt"],
    "causal_forcing": [
        size + variant
        for size in ("shapes", "wan")
        for variant in ("", ",salt", ",frame", ",frame,salt", ",two", ",one")
    ],
    "causvid": ["", "salt", "wan", "wan,salt"],
    "longlive_init": ["", "salt", "wan", "wan,salt"],
    "longlive": [
        size + variant
        for size in ("shapes", "wan")
        for variant in ("", ",salt", ",lora", ",lora,salt")
    ],
    "salt": [None],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WAN = [case for case in CASES if "wan" in (case[1] or "")]
CONFIGS = ROOT / "configs"


def load(name):
    return importlib.import_module(f"configs.{name}")


def get_config(name, options):
    """The ConfigDict; `options` None: the config takes none."""
    return load(name).get_config(*[] if options is None else [options])


def test_every_config_is_here():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "parts"}
    assert files == set(OPTIONS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_builds_a_recipe(name, options):
    assert read_recipe(get_config(name, options)).iterations >= 1


@pytest.mark.parametrize("name", [name for name in OPTIONS if None not in OPTIONS[name]])
def test_an_unknown_option_is_refused_with_those_there_are(name):
    known = {one for options in OPTIONS[name] for one in options.split(",")} - {""}
    with pytest.raises(ValueError) as error:
        get_config(name, "wan,no_such_option")
    told = set(re.findall(r"\w+", str(error.value)))
    assert known <= told
    assert all(
        re.search(
            rf"\b{one}\b", ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text())) or ""
        )
        for one in known - {"shapes"}
    )


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "base"])
def test_a_delta_is_short_has_only_known_keys_and_tells_its_command(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert f"python -m launch.train --config=configs/{name}.py --workdir=" in docstring
    keys = lambda config: {
        name: keys(v) if hasattr(v, "items") else None for name, v in config.items()
    }
    assert keys(get_config(name, OPTIONS[name][0])) == keys(get_config("base", None))


def test_two_calls_of_a_config_share_nothing():
    first = get_config("base", None)
    first.ema.decay = 0.123
    assert get_config("base", None).ema.decay != 0.123


def test_the_table_of_the_guide_is_that_of_the_schema():
    assert f"\n\n{table()}\n\n" in (ROOT / "docs/guide.md").read_text()


def test_every_key_has_a_meaning_or_is_an_optimizer_s():
    for path, field in all_keys(Recipe):
        assert field.metadata["doc"] or field.metadata["must"], path


def programs(recipe):
    """Every kind of program that the first few hundred calls of a run need."""
    calls = [decide(recipe, recipe.iterations, call) for call in range(300)]
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
            adapt(params), make_optimizer(recipe.student_optimizer, recipe.iterations)
        )
        critic = init_learner(
            adapt(params), make_optimizer(recipe.critic_optimizer, recipe.iterations)
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
        batch["states"] = clip(recipe.schedule.train_levels + 1)
    return jax.eval_shape(state), jax.eval_shape(frozen), batch, null


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), WAN)
def test_full_size_steps_trace(name, options):
    """480p for five seconds in bfloat16, every program of the run: the state keeps its shapes and
    float32 masters.
    """
    config = get_config(name, options)
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
