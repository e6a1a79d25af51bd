"""What a run starts from, for every stage, and which stages may follow each other."""

import dataclasses
import json
from dataclasses import replace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import base
from salt_jax.checkpoint import open_checkpoints, save
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.data.pipeline import collate
from salt_jax.data.writing_latents import Plan, begin, complete, write_parts
from salt_jax.errors import UserError
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import save_weights
from salt_jax.models.presets import PRESETS
from salt_jax.models.text_encoder import init_text_encoder
from salt_jax.models.vae import PRESETS as VAES
from salt_jax.moving_shapes.shapes import World
from salt_jax.sharding import state_shardings
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Weights
from salt_jax.stages.texts import to_batch
from salt_jax.stages.weights import critic_start, student_start
from salt_jax.state import init_learner, init_state
from salt_jax.train.setup import first_state, setup
from tests.helpers import close, mesh_of, shapes_of
from tests.placing import place

MESH = mesh_of()
BASE = {"head": {"kernel": jnp.zeros((4, 3))}}  # stands for a network's parameters
EMA = {"head": {"kernel": jnp.arange(12.0).reshape(4, 3)}}


def recipe(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return read_recipe(config)


CAUSAL = {"stage": "teacher_forcing"}


def workdir(path, made, average=EMA, critic=None):
    """A workdir of a stage with this average, and a critic where it has one."""
    learners = {"student": average} | ({} if critic is None else {"critic": critic})
    state = init_state({name: init_learner(p, optax.sgd(0.1)) for name, p in learners.items()})
    state = replace(state, iteration=jnp.int32(1), ema=jax.tree.map(jnp.copy, average))
    with open_checkpoints(path, 1) as manager:
        save(manager, state, {"config": to_json(made)})
    (path / "config.json").write_text(to_json(made))
    return str(path)


def exported(path, made, **metadata):
    """What launch.export writes."""
    shapes = shapes_of(made.text, init_text_encoder)
    text = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    save_weights(
        path, {"wan": EMA, "text_encoder": text}, "float16", {"config": to_json(made)} | metadata
    )
    return str(path)


same = chex.assert_trees_all_equal


def refused(told, **changes):
    with pytest.raises(UserError, match=told) as error:
        student_start(recipe(**changes), BASE, MESH)
    assert "\n" not in str(error.value) and "config.init_from=" in str(error.value)


def test_a_student_starts_at_the_weights_or_at_the_average_of_the_stage_before(tmp_path):
    same(student_start(recipe(), BASE, MESH), BASE)
    made = workdir(tmp_path / "run", recipe(**CAUSAL, **{"schedule.shift": 5.0, "iterations": 7}))
    for stage in ("ode_regression", "consistency", "distil"):
        same(student_start(recipe(stage=stage, init_from=made), BASE, MESH), EMA)
    file = exported(tmp_path / "file.safetensors", recipe(**CAUSAL))
    same(student_start(recipe(init_from=file, video="rollout"), BASE, MESH), EMA)


@pytest.mark.parametrize(
    ("told", "before", "now"),
    [
        ("model.preset=tiny, this run has small", {}, {"model.preset": "small"}),
        (r"weights=a\.safetensors, this run has shapes_teacher", {"weights": "a.safetensors"}, {}),
        (r"world\.frames=6, this run has 9", {"world.frames": 6}, {}),
        (r"memory\.chunk=1, this run has 3", {"memory.chunk": 1, "memory.first": 1}, {}),
        (
            r"memory\.first=1, this run has 4",
            {"memory.chunk": 4, "memory.first": 1},
            {"memory.chunk": 4, "memory.first": 4, "video": "noised"},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["workdir", "file"])
def test_a_stage_that_does_not_fit_is_refused_and_the_difference_is_named(
    tmp_path, kind, told, before, now
):
    made = recipe(**CAUSAL, **before)
    path = (
        workdir(tmp_path / "run", made)
        if kind == "workdir"
        else exported(tmp_path / "run.safetensors", made)
    )
    refused(f"was made with {told}", **({"video": "rollout", "init_from": path} | now))


def test_what_is_no_stage_is_refused(tmp_path):
    refused("neither the workdir of a stage .* nor a file", init_from=str(tmp_path / "absent"))
    refused("neither the workdir of a stage .* nor a file", init_from=str(tmp_path))
    teacher = recipe(stage="denoising", **{"teacher.kind": "closed_form"})
    refused(
        "holds a teacher.*launch.export.*config.weights",
        init_from=workdir(tmp_path / "run", teacher),
    )
    refused(
        "holds a teacher.*; name it in config.weights",
        init_from=exported(tmp_path / "file", teacher),
    )


def test_a_file_that_says_nothing_about_itself_is_refused(tmp_path):
    """As weights from elsewhere are."""
    path = tmp_path / "foreign.safetensors"
    save_weights(path, {"wan": EMA}, "float16", {})
    refused("foreign.safetensors", init_from=str(path))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.safetensors"):
        student_start(recipe(init_from=str(tmp_path / "text.safetensors")), BASE, MESH)


# A student that was adapted: launch.export merges, a workdir holds the product alone.

LORA = {"video": "rollout", "lora.rank": 2, "lora.alpha": 6.0}
MATRIX = jax.random.normal(jax.random.key(0), (3, 4, 5))
WHOLE = {"blocks": {"q": {"kernel": MATRIX, "bias": jnp.ones((3, 5))}}}


def adapter(seed):
    """A product of rank 2 for each of the three layers, and what it adds: 6 / 2 times a b."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 2), (3, 2, 5)))
    tree = {"blocks": {"q": {"kernel": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}}}
    return tree, 3.0 * np.stack([x @ y for x, y in zip(a, b, strict=True)])


def test_an_adapted_student_goes_on_from_its_export(tmp_path):
    """Run on, the export stays the student; config.weights would make it its own teacher and
    critic.
    """
    file = exported(tmp_path / "adapted.safetensors", recipe(**LORA))
    for changes in ({"video": "rollout"}, LORA):
        same(student_start(recipe(init_from=file, **changes), BASE, MESH), EMA)


def test_a_workdir_of_a_lora_is_merged_into_what_it_adapts(tmp_path):
    """Also a LoRA of a LoRA."""
    first, added = adapter(1)
    one = workdir(tmp_path / "one", recipe(**LORA), first)
    found = student_start(recipe(video="rollout", init_from=one), WHOLE, MESH)
    np.testing.assert_allclose(found["blocks"]["q"]["kernel"], MATRIX + added, rtol=1e-5, atol=1e-5)
    same(found["blocks"]["q"]["bias"], np.ones((3, 5)))
    second, more = adapter(2)
    two = workdir(tmp_path / "two", recipe(**LORA, init_from=one), second)
    found = student_start(recipe(video="rollout", init_from=two), WHOLE, MESH)
    np.testing.assert_allclose(
        found["blocks"]["q"]["kernel"], MATRIX + added + more, rtol=1e-5, atol=1e-5
    )


CARRIED = {"video": "rollout", "init_critic": True}
CRITIC = {"head": {"kernel": -EMA["head"]["kernel"]}}


def test_a_critic_starts_at_the_weights_or_at_that_of_the_stage_before(tmp_path):
    made = workdir(tmp_path / "run", recipe(video="rollout"), critic=CRITIC)
    same(critic_start(recipe(video="rollout", init_from=made), BASE, MESH), BASE)
    same(critic_start(recipe(**CARRIED, init_from=made), BASE, MESH), CRITIC)


def test_the_critic_of_a_lora_is_merged_into_what_it_adapts(tmp_path):
    """Into the weights, and of a run that carried one over into that."""
    student, _ = adapter(1)
    first, added = adapter(2)
    one = workdir(tmp_path / "one", recipe(**LORA), student, first)
    found = critic_start(recipe(**CARRIED, init_from=one), WHOLE, MESH)
    close(found["blocks"]["q"], {"kernel": MATRIX + added, "bias": jnp.ones((3, 5))})
    second, more = adapter(3)
    carried = recipe(**LORA, init_from=one, init_critic=True)
    two = workdir(tmp_path / "two", carried, student, second)
    found = critic_start(recipe(**CARRIED, init_from=two), WHOLE, MESH)
    close(found["blocks"]["q"]["kernel"], MATRIX + added + more)


def test_a_stage_before_without_a_critic_is_refused(tmp_path):
    """In one sentence, with what to do."""
    for where, why in (
        (workdir(tmp_path / "run", recipe(**CAUSAL)), "is of stage teacher_forcing and has none"),
        (exported(tmp_path / "file.safetensors", recipe(video="rollout")), "is a student alone"),
    ):
        told = rf"init_critic=True takes the critic of config\.init_from={where}, which {why}; name"
        with pytest.raises(UserError, match=told) as error:
            critic_start(recipe(**CARRIED, init_from=where), BASE, MESH)
        assert "\n" not in str(error.value) and "init_critic=False" in str(error.value)


def test_weights_that_were_moved_are_the_same_weights(tmp_path):
    file = located(base.get_config().weights)
    made = workdir(tmp_path / "run", recipe(**CAUSAL, weights=str(file)))
    same(student_start(recipe(video="rollout", init_from=made), BASE, MESH), EMA)


# What each stage starts from, with the shipped weights.


class Started(NamedTuple):
    """What a run starts from, its first state made."""

    state: Any
    frozen: Any
    encode_caption: Any
    records: Any


def parts_of(**changes):
    return setup(make_stage(recipe(**changes), MESH))


def started(**changes):
    parts = parts_of(**changes)
    state = parts.fresh()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, parts.state)
    return Started(state, parts.frozen, parts.encode_caption, parts.records)


@pytest.mark.parametrize("stage", ["teacher_forcing", "ode_regression", "consistency"])
def test_a_stage_has_its_student_as_causal_teacher_and_no_critic(stage):
    parts = started(stage=stage)
    assert set(parts.state.learners) == {"student"} and parts.state.stream is None
    same(parts.frozen["teacher"], parts.state.learners["student"].params)
    same(parts.state.ema, parts.state.learners["student"].params)
    assert parts.frozen["null_text"].shape == (1, *parts.encode_caption("").shape)
    same(parts.frozen["null_text"][0], parts.encode_caption(""))


def test_distillation_starts_three_networks_at_the_weights():
    parts = started(video="rollout")
    assert set(parts.frozen) == {"teacher", "null_text"}
    assert set(parts.state.learners) == {"student", "critic"}
    for tree in (*(learner.params for learner in parts.state.learners.values()), parts.state.ema):
        same(tree, parts.frozen["teacher"])
    same(parts.frozen["null_text"][0], parts.encode_caption(""))


@pytest.mark.parametrize(
    "changes", [{}, {"stage": "consistency"}, {"video": "rollout", "align.weight": 0.5}]
)
def test_a_teacher_is_kept_in_the_type_that_the_config_names(changes):
    """It is cast; what learns, and what the student's features are compared in, stays float32."""
    parts = started(**{"teacher.dtype": "bfloat16"} | changes)
    learnt = parts.state.learners["student"].params
    assert {x.dtype for x in jax.tree.leaves(parts.frozen["teacher"])} == {np.dtype(jnp.bfloat16)}
    same(parts.frozen["teacher"], jax.tree.map(lambda x: x.astype(jnp.bfloat16), learnt))
    assert {x.dtype for x in jax.tree.leaves((learnt, parts.frozen.get("base", {})))} == {
        np.dtype("float32")
    }


def test_an_alignment_that_looks_with_the_weights_keeps_a_copy_of_them():
    aligned = started(**{"video": "rollout", "align.weight": 0.5})
    same(aligned.frozen["base"], aligned.frozen["teacher"])
    other = started(**{"video": "rollout", "align.weight": 0.5, "align.network": "critic"})
    assert "base" not in other.frozen


def test_adapters_stand_for_student_and_critic_on_frozen_networks():
    parts = started(**{"video": "rollout", "lora.rank": 4, "lora.alpha": 4.0})
    learners = parts.state.learners.values()
    for learner in learners:
        assert {path[-1] for path in flatten_dict(learner.params)} == {"lora_a", "lora_b"}
    same(parts.frozen["student"], parts.frozen["base"])
    a, b = (jax.tree.leaves(learner.params)[0] for learner in learners)
    assert not np.array_equal(a, b), "they start with noise of their own"


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4, "lora.alpha": 4.0}])
def test_a_critic_that_is_carried_over_is_where_the_run_begins(tmp_path, changes):
    """Itself; of a LoRA what its new adapters stand on, as LongLive loads it before it adapts."""
    before = started(video="rollout")
    critic = jax.tree.map(lambda x: x + 1, before.frozen["teacher"])
    where = workdir(tmp_path / "run", recipe(video="rollout"), before.state.ema, critic)
    parts = started(**CARRIED, init_from=where, **changes)
    learnt = parts.state.learners["critic"].params
    assert not changes or not any(
        np.any(b) for p, b in flatten_dict(learnt).items() if "b" in p[-1]
    )
    stage = make_stage(recipe(**CARRIED, init_from=where, **changes), MESH)
    same(stage.whole("critic", learnt, parts.frozen), critic)
    assert set(parts.frozen) == {"teacher", "null_text"} | (
        {"student", "critic"} if changes else set()
    )
    same(parts.state.ema if not changes else parts.frozen["student"], before.state.ema)


def test_a_stream_starts_empty_in_the_form_that_it_keeps():
    parts = started(
        **{"video": "rollout", "memory.window": 9, "memory.sink": 3, "stream.max_frames": 36}
    )
    stream, wan = parts.state.stream, recipe().wan
    heads = (wan.num_heads, wan.dim // wan.num_heads)
    assert stream.cache.k.shape == (wan.num_layers, 24, 6, 4, *heads)  # 6 frames of 2 x 2 tokens
    assert stream.text.shape == (24, *parts.encode_caption("").shape)
    assert stream.cache.x0.shape == (24, 6, 12, 12, 3)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_frozen_outlives_the_state_and_what_is_not_is_given_up_to_it(devices):
    """Also where what a student starts from is frozen too."""
    mesh = mesh_of(fsdp=devices)
    starts = [place(EMA, state_shardings(mesh, EMA)) for _ in range(2)]
    stage, null_text = make_stage(recipe(), mesh), jnp.zeros((1, 32, 64))
    weights = Weights(starts[1], None, starts[0], starts[0], null_text)
    frozen = stage.frozen(weights)
    assert frozen.keys() == {"teacher", "null_text"} and frozen["teacher"] is starts[0]
    form, fresh = first_state(stage, weights, frozen)
    state = fresh()
    assert starts[1]["head"]["kernel"].is_deleted()
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(form), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.ema["head"]["kernel"].is_deleted()
    same(starts[0], EMA)
    same(null_text, np.zeros((1, 32, 64)))


def test_what_student_and_critic_start_from_together_is_given_up_once():
    start = place(EMA, state_shardings(MESH, EMA))
    stage = make_stage(recipe(**{"teacher.kind": "closed_form"}), MESH)
    weights = Weights(start, None, start, {"clips": jnp.zeros(3)}, jnp.zeros((1, 32, 64)))
    _, fresh = first_state(stage, weights, stage.frozen(weights))
    state = fresh()
    assert start["head"]["kernel"].is_deleted()
    for learner in state.learners.values():
        same(learner.params, EMA)


# Encoded data at Wan's shapes, with the small presets and random weights.

ENCODED = {
    "data.kind": "latents",
    "data.clip": (3, 4, 6),
    "text_encoder": "wan-tiny",
    "weights": "",
}


def encoded(path, *names, channels=16):
    """A data set of two records with the arrays of these names."""
    shapes = {"latent": (3, 4, 6, channels), "image": (5, 40), "condition": (3, 4, 6, channels)}
    shapes["switch"] = (None, 32)
    shapes = {"text": (None, 32)} | {name: shapes[name] for name in names}
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal([n or 7 for n in shape]).astype(np.float32)
    make = lambda numbers: [
        {"caption": f"clip {i}", **{k: draw(s) for k, s in shapes.items()}} for i in numbers
    ]
    plan = Plan({}, shapes, draw((None, 32)), ["a", "b"], 1)
    begin(path, plan)
    write_parts(path, plan, make, 0, 1)
    complete(path, plan)
    return str(path)


@pytest.mark.slow
def test_a_student_of_wan_starts_at_its_weights_and_has_the_teacher_that_is_named(tmp_path):
    wan = {"model.preset": "wan2.1-t2v-tiny", "data.dir": encoded(tmp_path / "data", "latent")}
    first = started(**ENCODED, **wan)
    same(first.frozen["teacher"], first.state.learners["student"].params)
    assert len(first.records) == 2 and first.records[1]["caption"] == "clip 1"
    file = tmp_path / "wan.safetensors"
    told = {"config": json.dumps(dataclasses.asdict(PRESETS["wan2.1-t2v-tiny"]))}
    save_weights(file, jax.tree.map(lambda w: w + 1, first.frozen["teacher"]), "bfloat16", told)
    other = started(**ENCODED, **wan, **{"teacher.weights": str(tmp_path)})
    same(other.state.learners["student"].params, first.state.learners["student"].params)
    assert {w.dtype for w in jax.tree.leaves(other.frozen["teacher"])} == {np.dtype(jnp.bfloat16)}
    wide = parts_of(
        **ENCODED, **wan, **{"teacher.weights": str(tmp_path), "teacher.dtype": "float32"}
    )
    same(wide.frozen["teacher"], other.frozen["teacher"])
    assert {w.dtype for w in jax.tree.leaves(wide.frozen["teacher"])} == {np.dtype(np.float32)}
    again = started(**ENCODED | {"weights": str(tmp_path)}, **wan)
    same(again.state.learners["student"].params, other.frozen["teacher"])
    learnt = jax.tree.leaves(again.state.learners["student"].params)
    assert {w.dtype for w in learnt} == {np.dtype(np.float32)}
    causal = {"teacher.weights": "", "init_from": str(tmp_path), "stage": "teacher_forcing"}
    critic = tmp_path / "critic.safetensors"
    save_weights(critic, jax.tree.map(lambda w: w - 1, first.frozen["teacher"]), "float32", told)
    goes_on = {"init_from": str(tmp_path), "video": "rollout", "init_critic": True}
    begun = started(**ENCODED, **wan | goes_on | {"memory.chunk": 1, "memory.first": 1})
    wanted = jax.tree.map(lambda w: w - 1, first.frozen["teacher"])
    same(begun.state.learners["critic"].params, wanted)
    begun = started(**ENCODED, **wan | causal)
    same(begun.state.learners["student"].params, other.frozen["teacher"])
    with pytest.raises(
        UserError, match=r"the weights in .* are WanConfig.*presets and weights of config\.model"
    ):
        parts_of(**ENCODED | wan | {"model.preset": "wan2.1-i2v-tiny", "weights": str(tmp_path)})


@pytest.mark.parametrize(
    ("preset", "names", "changes", "told"),
    [
        ("wan2.1-i2v-tiny", ("latent",), {}, r"without pictures.*encode it with --image"),
        ("wan2.1-t2v-tiny", (), {}, r"has prompts alone.*config\.video=rollout"),
        (
            "wan2.1-t2v-tiny",
            ("latent",),
            {"data.clip": (3, 4, 8)},
            r"the run wants \[3, 4, 8, 16\]",
        ),
    ],
)
def test_encoded_data_that_do_not_fit_are_refused(tmp_path, preset, names, changes, told):
    changes = {"model.preset": preset, "data.dir": encoded(tmp_path, *names)} | changes
    with pytest.raises(UserError, match=told):
        parts_of(**ENCODED | changes)


STREAMED = {"memory.chunk": 1, "memory.first": 1, "memory.window": 3, "memory.sink": 1}
STREAMED |= {"video": "rollout", "stream.max_frames": 9, "stream.overlap": 1, "batch_size": 2}


@pytest.mark.parametrize("switch", [0.0, 0.5])
def test_a_stream_holds_switch_prompts_where_prompts_are_paired_and_switches_are_drawn(
    tmp_path, switch
):
    changes = ENCODED | STREAMED | {"model.preset": "wan2.1-t2v-tiny", "stream.switch": switch}
    one = started(**changes, **{"data.dir": encoded(tmp_path / "one")}).state.stream
    assert one.switch is None
    parts = started(**changes, **{"data.dir": encoded(tmp_path / "two", "switch")})
    two = parts.state.stream
    assert (two.switch is None) == (not switch)
    if switch:
        assert two.switch.shape == two.text.shape == (2, 512, 32)
        batch = to_batch(make_stage(recipe(**changes), MESH), collate(parts.records, str, World()))
        same(batch.switch, np.stack([record["switch"] for record in parts.records]))


def test_a_stream_that_encodes_anew_has_the_vae_of_the_weights(tmp_path):
    """In the type of matrix products; absent, it is asked for in one sentence."""
    changes = ENCODED | STREAMED | {"model.preset": "wan2.1-t2v-tiny", "stream.reencode": 3}
    changes |= {"data.dir": encoded(tmp_path / "data"), "model.dtype": "bfloat16"}
    parts = started(**changes)
    assert {x.dtype for x in jax.tree.leaves(parts.frozen["vae"])} == {np.dtype(jnp.bfloat16)}
    assert parts.state.stream.past.shape == (2, 3, 4, 6, 16)
    wan = {"config": json.dumps(dataclasses.asdict(PRESETS["wan2.1-t2v-tiny"]))}
    save_weights(tmp_path / "wan.safetensors", parts.state.ema, "float32", wan)
    with pytest.raises(UserError, match=r"reencode=3 decodes with the VAE.*no .*vae\.safetensors"):
        parts_of(**changes | {"weights": str(tmp_path)})
    sizes = {"config": json.dumps(dataclasses.asdict(VAES["tiny"]))}
    ones = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float32), parts.frozen["vae"])
    save_weights(tmp_path / "vae.safetensors", ones, "float32", sizes)
    found = started(**changes | {"weights": str(tmp_path)}).frozen["vae"]
    same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones))


def test_prompts_are_enough_for_rollouts(tmp_path):
    changes = {"model.preset": "wan2.1-t2v-tiny", "data.dir": encoded(tmp_path), "video": "rollout"}
    parts = started(**ENCODED, **changes)
    assert set(parts.records[0]) == {"caption", "text"} and parts.records[0]["text"].shape == (
        512,
        32,
    )
