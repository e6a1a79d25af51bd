"""Every number of a config reaches the recipe, and what contradicts itself is refused by name."""

import ast
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import base, teacher
from salt_jax.config import migrate, validate
from salt_jax.config.reading import from_json, read_recipe, to_json
from salt_jax.config.sections import Optimizer
from salt_jax.errors import UserError
from salt_jax.io.header import read_metadata
from salt_jax.optimizer import make_optimizer
from salt_jax.stages import contradictions, make_stage
from tests.helpers import ROOT

# Values that other values, or a list of choices, hold in place.
TIED = {
    "stage",
    "video",
    "model.preset",
    "model.dtype",
    "model.remat",
    "model.residual",
    "model.attention",
    "text_encoder",
    "data.kind",
    "teacher.kind",
    "teacher.dtype",
    "teacher.preset",
    "memory.positions",
    "memory.period",
    "memory.context",
    "rollout.solver",
    "align.network",
    "align.reference_exit",
    "align.reference_noise",
    "loss.stop_gradient",
    "loss.level_weight",
    "sample.solver",
}
TIED |= {
    "world.size",
    "world.patch",
    "schedule.train_levels",
    "schedule.anchor_levels",
    "schedule.levels",
}
TIED |= {"memory.window", "align.weight", "stream.max_frames", "accumulate", "init_critic"}
# Values that one key alone would contradict; these stand together.
TOGETHER = {"video": "rollout", "schedule.train_levels": 12, "schedule.anchor_levels": 6}
LISTED = {
    "schedule.levels": (1000, 757, 522),
    "schedule.train_levels": 3,
    "schedule.anchor_levels": 3,
}
LISTED |= {"sample.num_steps": (3,)}
TOGETHER |= {
    "rollout.num_steps": (12, 3),
    "rollout.probabilities": (0.25, 0.75),
    "align.weight": 0.7,
}
TOGETHER |= {
    "memory.window": 9,
    "memory.sink": 3,
    "memory.positions": "cyclic",
    "memory.period": 21,
    "memory.context": "last_step",
    "stream.max_frames": 50,
    "teacher.preset": "tiny",
}
TOGETHER |= {
    "accumulate": 3,
    "init_from": str(ROOT / "runs/before"),
    "init_critic": True,
    "teacher.dtype": "bfloat16",
    "model.remat": "none",
    "model.residual": "bfloat16",
}
DECAYS = {"student_optimizer.decay": True, "critic_optimizer.decay": True}


pytestmark = pytest.mark.usefixtures("elsewhere")


def flat(tree, prefix=""):
    out = {}
    for name, value in tree.items():
        out |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return out


def refused(told, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes.pop("flat", {}))
    for name, value in changes.items():
        config[name] = value
    with pytest.raises(UserError, match=told) as error:
        make_stage(read_recipe(config))
    assert "\n" not in str(error.value)


def test_every_key_reaches_the_recipe_whatever_its_value():
    config = base.get_config()
    for path, value in flat(config.to_dict()).items():
        if path not in TIED:
            kinds = {bool: lambda v: not v, int: lambda v: 3 * v + 3, float: lambda v: v / 2 + 0.1}
            kinds |= {str: lambda v: v + "x", tuple: lambda v: v[::-1] + v or (1, 2)}
            config.update_from_flattened_dict({path: kinds[type(value)](value)})
    assert flat(dataclasses.asdict(read_recipe(config))) == flat(config.to_dict())


def test_values_that_hang_together_reach_the_recipe():
    config = base.get_config()
    config.update_from_flattened_dict(TOGETHER)
    found = flat(dataclasses.asdict(read_recipe(config)))
    assert {name: found[name] for name in TOGETHER} == TOGETHER


@pytest.mark.parametrize("module", [base, teacher])
def test_json_and_back(module):
    recipe = read_recipe(module.get_config())
    assert from_json(to_json(recipe)) == recipe
    assert json.loads(to_json(recipe))["schedule"]["shift"] == 12.0


def test_levels_of_a_run_are_those_that_are_listed_where_they_are_as_many():
    config = base.get_config()
    config.update_from_flattened_dict(LISTED | {"schedule.shift": 8.0})
    recipe = read_recipe(config)
    assert from_json(to_json(recipe)) == recipe
    assert recipe.levels(3).tolist() == np.float32([1, 0.757, 0.522, 0]).tolist()
    # 8 u / (1 + 7 u) at u = 1/2
    np.testing.assert_allclose(recipe.levels(2), [1, 8 / 9, 0], rtol=1e-6)


def test_an_unknown_and_a_missing_key_are_refused_by_name():
    config = base.get_config()
    config.ema.halflife = 5
    with pytest.raises(UserError, match=r"config\.ema has unknown keys \['halflife'\]"):
        read_recipe(config)
    without = ConfigDict(
        {name: value for name, value in base.get_config().items() if name != "seed"}
    )
    with pytest.raises(UserError, match=r"config has unknown keys \[\] and lacks \['seed'\]"):
        read_recipe(without)


@pytest.mark.parametrize(
    ("key", "choice"),
    [
        ("stage", "denoising, teacher_forcing, ode_regression, consistency, shortcut, distil"),
        ("video", "noised, noised_chunks, rollout"),
        ("data.kind", "moving_shapes, latents"),
        ("teacher.preset", "tiny, small, long, wan2.1-t2v-1.3b"),
        ("memory.positions", "absolute, relative, cyclic"),
        ("memory.context", "clean, last_step"),
        ("rollout.solver", "euler, cm"),
        ("align.network", "base, teacher, critic, student"),
        ("model.preset", "tiny, small, long, wan2.1-t2v-1.3b"),
        ("model.dtype", "float32, bfloat16"),
        ("model.remat", "none, all, save_attention, dots, dots_no_batch, offload"),
        ("model.residual", "float32, bfloat16"),
        ("text_encoder", "tiny, umt5-xxl"),
        ("teacher.kind", "data, network, closed_form"),
        ("teacher.dtype", "stored, float32, bfloat16"),
        ("loss.stop_gradient", "none, composed, direct, midpoint"),
        ("sample.solver", "euler, cm"),
    ],
)
def test_a_wrong_choice_is_told_the_right_ones(key, choice):
    refused(
        re.escape(f"config.{key} is 'wrong'; choose one of ") + ".*" + choice, flat={key: "wrong"}
    )


def test_a_value_of_another_kind_is_refused_by_name(tmp_path):
    """A config that is read from JSON, or a tuple on the command line, is not checked by
    ml_collections.
    """
    for key, value, told in (
        (
            "rollout.num_steps",
            ("2",),
            r"config\.rollout\.num_steps is \('2',\); it has to be several int",
        ),
        ("iterations", "sixty", r"config\.iterations is 'sixty'; it has to be one int"),
        ("sample.num_steps", 4, r"config\.sample\.num_steps is 4; it has to be several int"),
        (
            "teacher.accept_student",
            1,
            r"config\.teacher\.accept_student is 1; it has to be one bool",
        ),
        ("teacher", "network", r"config\.teacher is 'network', not a section"),
    ):
        told_config = json.loads(to_json(read_recipe(base.get_config())))
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, told_config)[last] = value
        with pytest.raises(UserError, match=told):
            from_json(json.dumps(told_config))


@pytest.mark.parametrize(
    "text", ["", "not JSON", "[]", "3", "{}", '{"teacher": {}}', "[" * 100_000]
)
def test_a_damaged_config_json_is_refused_by_its_name_in_one_short_sentence(text):
    with pytest.raises(UserError, match=r"runs/a/config\.json") as error:
        from_json(text, "runs/a/config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


ROLLOUT = {"video": "rollout"}
ALIGN = ROLLOUT | {"align.weight": 0.5}
STREAM = ROLLOUT | {"stream.max_frames": 36, "memory.window": 9, "memory.sink": 3}
LATENTS = {"data.kind": "latents", "data.clip": (21, 60, 104), "model.preset": "wan2.1-t2v-1.3b"}
LATENTS |= {"text_encoder": "umt5-xxl"}
WAN_STREAM = STREAM | LATENTS | {"stream.max_frames": 57}
LISTED_ROLLOUT = ROLLOUT | LISTED | {"rollout.num_steps": (3,), "rollout.probabilities": (1.0,)}
CONTRADICTIONS = {
    "counts": [
        (rf"config\.{name}={value} must be at least 1", {name: value})
        for name, value in (
            ("iterations", 0),
            ("batch_size", -1),
            ("accumulate", 0),
            ("critic_ratio", 0),
            ("log_every", 0),
            ("save_every", 0),
            ("keep", 0),
            ("max_skipped", 0),
            ("schedule.train_levels", 0),
            ("schedule.anchor_levels", 0),
            ("ode.num_steps", 0),
            ("ode.trajectories", 0),
        )
    ]
    + [(r"config\.batch_size=24 must be a multiple of config\.accumulate=5", {"accumulate": 5})],
    "ranges": [
        (rf"config\.{name}={re.escape(str(value))} must be {told}", changes | {name: value})
        for told, name, value, changes in (
            ("finite", "teacher.guidance", float("nan"), {}),
            ("finite", "student_optimizer.learning_rate", float("inf"), {}),
            ("finite", "rollout.probabilities", (0.2, float("nan"), 0.4), {}),
            ("above 0", "schedule.shift", 0.0, {}),
            ("above 0", "renoise.shift", -1.0, {}),
            ("above 0", "student_optimizer.clip", -1.0, {}),
            ("at least 0", "critic_optimizer.learning_rate", -1e-4, {}),
            ("at least 0", "keep_every", -1, {}),
            ("at least 0 and below 1", "ema.decay", 2.0, {}),
            ("at least 0 and below 1", "ema.decay", 1.0, {}),
            ("at least 0 and below 1", "critic_optimizer.b2", 1.0, {}),
            ("from 0 to 1", "caption_dropout", 1.5, {}),
            ("at least 1 and at most 128", "schedule.train_levels", 10**7, {}),
            ("above 0 and up to 1", "renoise.lowest", 0.0, {}),
            ("above 0 and up to 1", "renoise.highest", 1.5, {}),
            ("from 0 to 4294967295", "seed", -1, {}),
            ("from 0 to 4294967295", "data.seed", 2**32, {}),
            ("one or more", "sample.num_steps", (0,), {}),
            ("one or more", "sample.num_steps", (), {}),
            ("one or more", "rollout.num_steps", (0, 8), {}),
            ("at least one number", "world.starts", (), {}),
            ("at least 1", "world.frames", -1, {}),
            ("frames, height and width", "data.clip", (21, 60), {"data.kind": "latents"}),
        )
    ]
    + [
        (
            r"config\.renoise\.lowest=0\.9 must not be above config\.renoise\.highest=0\.5",
            {"renoise.lowest": 0.9, "renoise.highest": 0.5},
        )
    ],
    "levels": [
        (
            r"config\.schedule\.levels \(1000\.0, 757\.0, 900\.0\) must be falling",
            LISTED | {"schedule.levels": (1000, 757, 900)},
        ),
        (
            r"config\.schedule\.levels .*begin at 990",
            LISTED | {"schedule.levels": (1.0, 0.757, 0.522)},
        ),
        (
            r"config\.schedule\.levels=\(1000\.0, .* are a student's",
            LISTED | {"stage": "denoising", "teacher.kind": "data"},
        ),
        (
            r"config\.schedule\.train_levels=4 does not go with the 3 levels",
            LISTED | {"schedule.train_levels": 4, "schedule.anchor_levels": 4},
        ),
        (
            r"config\.sample\.num_steps=\(2, 4, 8\) does not go .* set it to \(3,\)",
            LISTED | {"sample.num_steps": (2, 4, 8)},
        ),
        (
            r"config\.rollout\.num_steps=\(2, 4, 8\) does not go with the 3 levels .* to \(3,\)",
            LISTED | {"video": "rollout"},
        ),
        (
            r"config\.rollout\.first_steps=4 is not the 3 levels",
            LISTED | {"rollout.first_steps": 4},
        ),
    ],
    "stage": [
        (r"stage=denoising makes a teacher; set config\.teacher\.kind", {"stage": "denoising"}),
        (r"config\.teacher\.kind=data leaves no teacher", {"teacher.kind": "data"}),
        (
            r"config\.lora\.rank=8 .*config\.stage=distil; set it to 0 in stage consistency",
            {"stage": "consistency", "lora.rank": 8, "lora.alpha": 8.0},
        ),
        (r"config\.lora\.alpha=0\.0 .*config\.lora\.rank=8", {"lora.rank": 8}),
    ],
    "clip": [
        (
            r"9 frames of 14 x 14 does not split .* config\.model\.preset=tiny; .*config\.world",
            {"world.size": 14},
        ),
        (
            r"21 frames of 61 x 104 does not split .*config\.data\.clip",
            LATENTS | {"data.clip": (21, 61, 104)},
        ),
        (
            r"config\.teacher\.preset=small .*config\.teacher\.weights.*empty",
            {"teacher.preset": "small"},
        ),
        *(
            (
                r"wan2.1-i2v-14b makes whole clips of a picture",
                LATENTS | {"model.preset": "wan2.1-i2v-14b"} | how,
            )
            for how in ({"video": "noised_chunks"}, {"stage": "consistency"})
        ),
        (r"world\.patch=5 must divide config\.world\.size=12", {"world.patch": 5}),
        (
            r"config\.model\.preset=wan2.1-t2v-1.3b makes 16 channels",
            {"model.preset": "wan2.1-t2v-1.3b"},
        ),
        (
            r"config\.teacher\.kind=closed_form .*data\.kind=latents",
            LATENTS | {"teacher.kind": "closed_form"},
        ),
        (
            r"config\.stage=denoising .*data\.kind=latents",
            LATENTS | {"stage": "denoising", "teacher.kind": "data"},
        ),
        (
            r"config\.text_encoder=umt5-xxl writes rows of 4096, .*tiny reads .* 64",
            {"text_encoder": "umt5-xxl"},
        ),
        (
            r"9 latent frames do not split into a chunk of 1 and chunks of 3; "
            r"change config\.memory\.chunk",
            ROLLOUT | {"memory.first": 1},
        ),
        (
            r"9 latent frames do not split .* chunks of 2",
            {"stage": "teacher_forcing", "memory.chunk": 2, "memory.first": 2},
        ),
    ],
    "memory": [
        (r"config\.memory: first=4 must be between 1 and chunk=3", {"memory.first": 4}),
        (
            r"config\.memory: window=5 must be 0 \(everything\) or hold sink=3 and chunk=3",
            {"memory.window": 5, "memory.sink": 3},
        ),
    ],
    "schedule": [
        (
            r"config\.schedule\.anchor_levels=3 must divide train_levels=8",
            {"schedule.anchor_levels": 3},
        ),
        *(
            (
                r"config\.schedule\.train_levels=8 must divide config\.ode\.num_steps=50",
                {"stage": stage, "ode.num_steps": 50},
            )
            for stage in ("ode_regression", "consistency")
        ),
    ],
    "rollout": [
        (
            r"config\.rollout\.probabilities=\(0\.5, 0\.5\) must be one for each",
            ROLLOUT | {"rollout.probabilities": (0.5, 0.5)},
        ),
        (
            r"config\.rollout\.probabilities=.* sum to 1",
            ROLLOUT | {"rollout.probabilities": (0.2, 0.4, 0.5)},
        ),
        (r"config\.rollout\.probabilities=", ROLLOUT | {"rollout.probabilities": (-0.2, 0.6, 0.6)}),
        (
            r"config\.rollout\.num_steps=\(2, 4, 8\) .*config\.schedule\.train_levels=16",
            ROLLOUT | {"schedule.train_levels": 16},
        ),
        (
            r"config\.rollout\.num_steps=\(2, 3, 8\) must divide",
            ROLLOUT | {"rollout.num_steps": (2, 3, 8)},
        ),
        (r"config\.rollout\.first_steps=-1 must be 0", ROLLOUT | {"rollout.first_steps": -1}),
        (
            r"config\.rollout\.first_steps=4 .* set it or config\.loss\.self_consistency to 0",
            ROLLOUT | {"rollout.first_steps": 4},
        ),
    ],
    "align": [
        (
            r"config\.align\.weight=0\.5 aligns rollouts .*config\.video=rollout",
            {"align.weight": 0.5},
        ),
        (
            r"config\.align\.weight=0\.5 aligns rollouts .*config\.stage=distil",
            {"stage": "teacher_forcing", "align.weight": 0.5},
        ),
        (
            r"config\.align\.weight=0\.5 .*more than one of config\.rollout\.num_steps",
            ALIGN | {"rollout.num_steps": (8,), "rollout.probabilities": (1.0,)},
        ),
        (
            r"config\.align\.layers=0 must be between 1 and the 4 layers",
            ALIGN | {"align.layers": 0},
        ),
        (
            r"config\.align\.layers=5 must be between 1 and the 4 layers",
            ALIGN | {"align.layers": 5},
        ),
        (
            r"config\.align\.network=teacher has no features .*teacher\.kind=closed_form",
            ALIGN | {"align.network": "teacher", "teacher.kind": "closed_form"},
        ),
        (
            r"config\.align\.num_steps=\(8,\) must be among \(2, 4\)",
            ALIGN | {"align.num_steps": (8,)},
        ),
        (
            r"config\.align\.lowest_exit=2 leaves no update .* \(2,\); lower it",
            ALIGN | {"align.num_steps": (2,), "align.lowest_exit": 2},
        ),
        (
            r"config\.align\.probability=0\.0 must be in \(0, 1\]",
            ALIGN | {"align.probability": 0.0},
        ),
        (r"config\.align\.probability=1\.5 must be in", ALIGN | {"align.probability": 1.5}),
    ],
    "stream": [
        *(
            (
                r"config\.stream\.max_frames continues rollouts .*config\.memory\.window",
                STREAM | change,
            )
            for change in (
                {"video": "noised"},
                {"stage": "teacher_forcing"},
                {"memory.window": 0},
                {"memory.chunk": 4, "memory.first": 1},
            )
        ),
        (
            r"config\.stream\.overlap=2 must be a multiple of memory\.chunk=3",
            STREAM | {"stream.overlap": 2},
        ),
        (r"config\.stream\.overlap=0 must be", STREAM | {"stream.overlap": 0}),
        (r"config\.stream\.overlap=6 must be .* behind its sink=3", STREAM | {"stream.overlap": 6}),
        (
            r"config\.stream\.overlap=9 must be .* less than the clip's 9",
            STREAM | {"stream.overlap": 9, "memory.window": 15, "memory.sink": 0},
        ),
        (
            r"config\.memory\.window=15 must be filled by the first clip of 9",
            STREAM | {"memory.window": 15},
        ),
        (
            r"config\.stream\.max_frames=14 leaves no room .* at least 15",
            STREAM | {"stream.max_frames": 14},
        ),
        (
            r"config\.stream\.reencode=4 decodes latents of Wan's VAE, and .* are frames; set it",
            STREAM | {"stream.reencode": 4},
        ),
        (
            r"config\.stream\.reencode=20 is more than the 19 latent .* clip of 21 .* lower it",
            WAN_STREAM | {"stream.reencode": 20},
        ),
    ],
    "critic": [
        (
            r"config\.init_critic=True takes the critic of config\.init_from=''",
            {"init_critic": True},
        ),
        (
            r"config\.init_critic=True .* config\.stage=consistency; name",
            {"init_critic": True, "init_from": "runs/x", "stage": "consistency"},
        ),
    ],
    "what a chunk sees": [
        (r"positions=cyclic with period=0: .* need a period", {"memory.positions": "cyclic"}),
        *(
            (
                r"config\.memory\.context=last_step is of chunks .* set it to \"clean\"",
                change | {"memory.context": "last_step"},
            )
            for change in ({}, {"stage": "teacher_forcing"}, {"video": "noised_chunks"})
        ),
    ],
    "optimizers": [
        (
            r"config\.student_optimizer\.warmup=100 leaves no",
            DECAYS | {"student_optimizer.warmup": 100},
        ),
        (
            r"config\.critic_optimizer\.warmup=500 leaves no",
            DECAYS | {"critic_optimizer.warmup": 500},
        ),
    ],
}
CONTRADICTIONS = [(told, changes) for group in CONTRADICTIONS.values() for told, changes in group]


@pytest.mark.parametrize(("told", "changes"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(told, changes):
    refused(told, flat=changes)


@pytest.mark.parametrize(
    "changes",
    [ROLLOUT, ALIGN, STREAM, LATENTS, ALIGN | STREAM, ROLLOUT | LATENTS, LISTED, LISTED_ROLLOUT],
)
def test_what_the_refused_configs_were_made_from_is_accepted(changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    read_recipe(config)


def test_every_refusal_has_a_case_here():
    """Each sentence that `contradictions` may say is said by one of the cases above."""
    stages = Path(contradictions.__file__).parent
    names = ("contradictions", "causal", "denoising", "distil")
    files = [Path(validate.__file__), *(stages / f"{name}.py" for name in names)]
    lines = {
        (str(file), node.lineno)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Yield)
    }
    said = set()
    watched = {str(file) for file in files}

    def watch(frame, event, argument):
        if event == "line" and frame.f_code.co_filename in watched:
            said.add((frame.f_code.co_filename, frame.f_lineno))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        for _, changes in CONTRADICTIONS:
            config = base.get_config()
            config.update_from_flattened_dict(changes)
            with pytest.raises(UserError):
                make_stage(read_recipe(config))
    finally:
        sys.settrace(before)
    assert lines <= said, f"no case for {sorted(lines - said)}"


def rate(updates, **how):
    """The learning rate as the optimizer applies it: Adam's first updates of a constant gradient
    are of that size.
    """
    tx = make_optimizer(
        Optimizer(b1=0.9, b2=0.999, eps=0.0, weight_decay=0.0, clip=100.0, **how), updates
    )
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


def test_the_shipped_causal_start_says_what_made_it():
    """It was written before the last keys came, and configs name it in init_from."""
    file = Path(__file__).parents[2] / "salt_jax" / "assets" / "shapes_causal.safetensors"
    assert from_json(read_metadata(file)["config"]).causal


def test_a_run_from_before_a_key_came_goes_on():
    recipe = read_recipe(base.get_config())
    before = json.loads(to_json(recipe))
    del (
        before["teacher"]["weights"],
        before["teacher"]["accept_student"],
        before["schedule"]["levels"],
    )
    del (
        before["keep_every"],
        before["accumulate"],
        before["teacher"]["dtype"],
        before["model"]["residual"],
    )
    before["model"]["remat"] = True
    assert from_json(json.dumps(before)) == recipe
    migrate.refuse_another_run(json.dumps(before), recipe)
