"""Every config builds, tells how to run it, and stays a short delta of base.py; those at Wan size
trace.
"""

import ast
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import parts
from salt_jax.config.build import all_keys
from salt_jax.config.reading import read_recipe
from salt_jax.config.schema import CAUSAL, Recipe
from salt_jax.config.table import table
from salt_jax.planning.updates import programs, update_name
from salt_jax.stages import make_stage, weights
from salt_jax.stages.stage import Batch
from salt_jax.train.step import Call, train_step
from salt_jax.types import Conditioning
from tests.every_config import CASES, OPTIONS, WAN, form, get_config
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"


def test_every_config_is_here():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "parts"}
    assert files == set(OPTIONS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_builds_a_recipe_of_a_stage(name, options):
    recipe = read_recipe(get_config(name, options))
    assert recipe.iterations >= 1 and make_stage(recipe).recipe == recipe


@pytest.mark.parametrize(("name", "options"), CASES)
def test_longlives_long_stage_alone_carries_its_critic_over(name, options):
    assert get_config(name, options).init_critic == (name == "longlive")


@pytest.mark.parametrize(("name", "options"), WAN)
def test_no_causal_stage_of_wan_drops_captions(name, options):
    """The text without a prompt is Wan's negative prompt: it would be taught on good clips."""
    recipe = read_recipe(get_config(name, options))
    assert recipe.stage not in CAUSAL or recipe.caption_dropout == 0


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


@pytest.mark.parametrize(
    ("size", "teacher", "layers"),
    [("wan", "wan2.1-t2v-14b", 21), ("wan", "", 16), ("shapes", "", 2), ("long", "", 2)],
)
def test_the_release_takes_features_at_the_same_depth_of_any_teacher(size, teacher, layers):
    """The authors' 21 blocks of 40; 1.3B has 30, the networks of Moving Shapes 4."""
    config = parts.causal(size)
    config.teacher.preset = teacher
    released = parts.Released(start=1, noise="own")
    assert parts.salt(config, size, {"release"}, released).align.layers == layers


def test_two_calls_of_a_config_share_nothing():
    first = get_config("base", None)
    first.ema.decay = 0.123
    assert get_config("base", None).ema.decay != 0.123


def test_the_table_of_the_guide_is_that_of_the_schema():
    assert f"\n\n{table()}\n\n" in (ROOT / "docs/guide.md").read_text()


def test_every_key_has_a_meaning_or_is_an_optimizer_s():
    for path, field in all_keys(Recipe):
        assert field.metadata["doc"] or field.metadata["must"], path


def abstract_run(stage):
    """State, frozen parameters and batch of a run, as shapes."""
    recipe, needs = stage.recipe, stage.needs
    loaded = jax.eval_shape(lambda: weights.fresh(stage))
    spec = lambda *sizes: jax.ShapeDtypeStruct((recipe.batch_size, *sizes), jnp.float32)
    clip = lambda *front: spec(*front, *recipe.clip_shape)
    cond = Conditioning(spec(recipe.wan.text_length, recipe.wan.text_dim))
    if recipe.wan.image_dim:
        channels = spec(*recipe.clip_shape[:-1], recipe.wan.condition_channels)
        cond = cond._replace(image=spec(257, recipe.wan.image_dim), channels=channels)
    batch = Batch(cond)
    if "video" in needs:
        batch = batch._replace(video=clip())
    if "states" in needs:
        batch = batch._replace(states=clip(recipe.schedule.train_levels + 1))
    state, frozen = (jax.eval_shape(f, loaded) for f in (stage.first_state, stage.frozen))
    return state, frozen, batch


@pytest.fixture(scope="module")
def traced():
    """The programs that were traced for one config or another."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), WAN)
def test_full_size_steps_trace(name, options, traced):
    """480p for five seconds in bfloat16, every program of the run: the state keeps its shapes and
    float32 masters. What several configs share is traced once.
    """
    config = get_config(name, options)
    config.batch_size = 2
    stage = make_stage(read_recipe(config))
    state, frozen, batch = abstract_run(stage)
    call = jax.eval_shape(lambda: Call(jax.random.key(0), jnp.int32(0), None))
    for update, draw in programs(stage).items():
        if (key := form(stage.recipe, update_name(update))) in traced:
            continue
        traced.add(key)
        run = lambda s, f, b, c, update=update: train_step(stage, update, s, f, b, c)
        after, metrics = jax.eval_shape(run, state, frozen, batch, call._replace(draw=draw))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        learnt = jax.tree.leaves(after.learners["student"].params)
        assert {x.dtype for x in learnt} == {np.dtype(np.float32)}
        assert all(metric.shape == () for metric in metrics.values())
