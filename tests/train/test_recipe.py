"""Every number of a config reaches the recipe, and what contradicts itself is refused by name."""

import dataclasses
import json
import re

import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from configs import base, shapes_teacher
from salt_jax.errors import UserError
from salt_jax.train.recipe import Optimizer, from_json, make_optimizer, read_recipe, to_json

# Values that other values, or a list of choices, hold in place.
TIED = {
    "stage",
    "model.preset",
    "model.dtype",
    "text_encoder",
    "teacher.kind",
    "loss.stop_gradient",
    "sample.solver",
}
TIED |= {"world.size", "schedule.train_updates", "schedule.anchor_updates"}
DECAYS = {"student_optimizer.decay": True, "critic_optimizer.decay": True}


def flat(tree, prefix=""):
    out = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def refused(told, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes.pop("flat", {}))
    for name, value in changes.items():
        config[name] = value
    with pytest.raises(UserError, match=told) as error:
        read_recipe(config)
    assert "\n" not in str(error.value)


def test_every_key_reaches_the_recipe_whatever_its_value():
    config = base.get_config()
    for path, value in flat(config.to_dict()).items():
        if path not in TIED:
            kinds = {bool: lambda v: not v, int: lambda v: 3 * v + 3, float: lambda v: v / 2 + 0.1}
            kinds |= {str: lambda v: v + "x", tuple: lambda v: v[::-1] + v}
            config.update_from_flattened_dict({path: kinds[type(value)](value)})
    assert flat(dataclasses.asdict(read_recipe(config))) == flat(config.to_dict())


@pytest.mark.parametrize("module", [base, shapes_teacher])
def test_json_and_back(module):
    recipe = read_recipe(module.get_config())
    assert from_json(to_json(recipe)) == recipe
    assert json.loads(to_json(recipe))["schedule"]["shift"] == 12.0


def test_an_unknown_and_a_missing_key_are_refused_by_name():
    config = base.get_config()
    config.ema.halflife = 5
    with pytest.raises(UserError, match=r"config\.ema has unknown keys \['halflife'\]"):
        read_recipe(config)
    without = ConfigDict({name: value for name, value in base.get_config().items() if name != "seed"})
    with pytest.raises(UserError, match=r"config has unknown keys \[\] and lacks \['seed'\]"):
        read_recipe(without)


@pytest.mark.parametrize(
    ("key", "choice"),
    [
        ("stage", "denoising, distil"),
        ("model.preset", "tiny, small, wan2.1-t2v-1.3b"),
        ("model.dtype", "float32, bfloat16"),
        ("text_encoder", "tiny, umt5-xxl"),
        ("teacher.kind", "data, network, closed_form"),
        ("loss.stop_gradient", "none, composed, direct, midpoint"),
        ("sample.solver", "euler, cm"),
    ],
)
def test_a_wrong_choice_is_told_the_right_ones(key, choice):
    refused(re.escape(f"config.{key} is 'wrong'; choose one of ") + ".*" + choice, flat={key: "wrong"})


@pytest.mark.parametrize(
    ("told", "changes"),
    [
        (r"config\.schedule\.anchor_updates=3 must divide train_updates=8", {"schedule.anchor_updates": 3}),
        (
            r"9 frames of 14 x 14 does not split .* config\.model\.preset=tiny; .*config\.world",
            {"world.size": 14},
        ),
        (r"config\.model\.preset=wan2.1-t2v-1.3b makes 16 channels", {"model.preset": "wan2.1-t2v-1.3b"}),
        (
            r"config\.text_encoder=umt5-xxl writes rows of 4096, .*tiny reads .* 64",
            {"text_encoder": "umt5-xxl"},
        ),
        (r"config\.student_optimizer\.warmup=100 leaves no", DECAYS | {"student_optimizer.warmup": 100}),
        (r"config\.critic_optimizer\.warmup=500 leaves no", DECAYS | {"critic_optimizer.warmup": 500}),
        (r"stage=denoising makes a teacher; set config\.teacher\.kind", {"stage": "denoising"}),
        (r"config\.teacher\.kind=data leaves no teacher", {"teacher.kind": "data"}),
        (r"config\.updates=0 must be at least 1", {"updates": 0}),
        (r"config\.batch_size=-1 must be at least 1", {"batch_size": -1}),
        (r"config\.log_every=0 must be", {"log_every": 0}),
        (r"config\.schedule\.train_updates=0 must be", {"schedule.train_updates": 0}),
    ],
)
def test_contradictions_are_refused_by_name(told, changes):
    refused(told, flat=changes)


def rate(updates, **how):
    """The learning rate as the optimizer applies it: Adam's first updates of a constant gradient are of that size."""
    tx = make_optimizer(Optimizer(b1=0.9, b2=0.999, eps=0.0, weight_decay=0.0, clip=100.0, **how), updates)
    params, grads, rates = jnp.zeros(()), jnp.ones(()), []
    state = tx.init(params)
    for _ in range(updates):
        change, state = tx.update(grads, state, params)
        params, rates = optax.apply_updates(params, change), rates + [-float(change)]
    return rates


def test_the_learning_rate_warms_up_and_then_stays_or_falls():
    assert rate(3, learning_rate=0.5, warmup=0, decay=False) == pytest.approx([0.5] * 3, rel=1e-4)
    assert rate(5, learning_rate=0.4, warmup=4, decay=False) == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4], rel=1e-4
    )
    cosine = rate(6, learning_rate=0.4, warmup=2, decay=True)
    assert cosine[:3] == pytest.approx([0, 0.2, 0.4], rel=1e-4)
    assert cosine[4] == pytest.approx(0.2, rel=1e-3) and 0 < cosine[5] < 0.1
