"""Bytes against the trees that a run has, against arrays on a mesh, and against XLA's account of
compiled updates.
"""

import math
from dataclasses import replace
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, causal_forcing, longlive, ode_regression, sc_dmd, self_forcing, teacher
from salt_jax import sharding
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.presets import PRESETS, Compute, Remat, WanConfig
from salt_jax.models.vae import PRESETS as VAES
from salt_jax.models.vae import init_vae
from salt_jax.models.vae_window import as_first
from salt_jax.models.wan import Inputs, apply_wan
from salt_jax.planning.bench import forms, random_batch
from salt_jax.planning.memory import (
    block_bytes,
    cache_bytes,
    fresh_state,
    kept_bytes,
    needed,
    persistent,
    transient,
    tree_bytes,
    vae_bytes,
)
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Update
from salt_jax.train.setup import setup
from salt_jax.train.step import Call, compile_step
from salt_jax.types import Conditioning
from tests.helpers import shapes_of
from tests.placing import place

S = jax.ShapeDtypeStruct
ONE = dict.fromkeys(sharding.AXES, 1)


def recipe(config, *variant, **changes):
    made = config.get_config(*variant)
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return read_recipe(made)


def rows(r, mesh, kernel="cudnn"):
    return {row.name: row for row in needed(make_stage(r), mesh, kernel)}


STARTS = {
    "network": {},
    "closed form": {"teacher.kind": "closed_form", "weights": ""},
    "teacher in the making": {"stage": "denoising", "teacher.kind": "closed_form", "weights": ""},
    "stage": {"stage": "consistency"},
    "aligned": {"video": "rollout", "align.weight": 0.5},
    "teacher in half": {"video": "rollout", "teacher.dtype": "bfloat16"},
    "adapted": {"video": "rollout", "lora.rank": 4, "lora.alpha": 4.0},
    "stream": {"video": "rollout", "memory.window": 9, "memory.sink": 3, "stream.max_frames": 36},
}


@pytest.mark.parametrize("start", STARTS)
def test_what_is_counted_is_what_a_run_starts_from(start):
    c = base.get_config()
    c.update_from_flattened_dict(STARTS[start])
    stage = make_stage(read_recipe(c), sharding.make_mesh(ONE, jax.devices()[:1]))
    parts = setup(stage)
    state, frozen = jax.eval_shape(lambda: fresh_state(stage))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, parts.fresh(), parts.state)
    chex.assert_trees_all_equal_shapes_and_dtypes(frozen, parts.frozen)


@pytest.mark.parametrize("sizes", [(2, 4, 1, 1), (1, 2, 2, 2)])
def test_a_device_holds_what_it_is_given(sizes):
    r = recipe(self_forcing, weights="", batch_size=8)
    state, _ = jax.eval_shape(lambda: fresh_state(make_stage(r)))
    mesh = sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)]
    )
    placed = place(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state),
        sharding.state_shardings(mesh, state),
    )
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    counted = tree_bytes(state, mesh.shape).values()
    assert sum(leaf.device for leaf in counted) == mine
    assert sum(leaf.whole for leaf in counted) == sum(x.nbytes for x in jax.tree.leaves(placed))


def test_the_cache_of_a_clip_is_what_was_derived_and_what_is_made():
    """30 x 2 x 32,760 x 1536 x 2 bytes, and 40 layers of 5120."""
    for name, gigabytes in (("wan2.1-t2v-1.3b", 6.04), ("wan2.1-t2v-14b", 26.8)):
        c = PRESETS[name]
        counted = cache_bytes(c, 21, (60, 104), 2)
        assert counted / 1e9 == pytest.approx(gigabytes, rel=2e-3)
        network = wan_denoiser(c, Compute(jnp.bfloat16), 21, 3)
        cache = jax.eval_shape(lambda n=network: n.empty_cache(1, 21, (60, 104, 16)))
        assert counted == 2 * cache.k.size * 2


def test_a_run_of_1_3b_under_14b_keeps_what_was_derived():
    """Parameters and one moment in float32, an average; the teacher at 2 bytes; 4 D for each token
    and layer.
    """
    r = recipe(self_forcing, "wan", batch_size=1)
    there = rows(r, ONE)
    n = 1_418_996_800
    assert there["student"].whole == there["critic"].whole == there["gradients"].whole == 4 * n
    # and a counter
    assert there["student optimizer"].whole == there["critic optimizer"].whole == 4 * n + 4
    assert there["teacher"].whole == 2 * 14_288_491_584
    assert there["caches"].whole == cache_bytes(r.wan, 21, (60, 104), 2)
    assert there["inputs of blocks"].whole == 30 * 32_760 * 1536 * 4
    total = sum(row.device for row in there.values())
    assert total == pytest.approx(84e9, rel=0.05)


@pytest.mark.slow
def test_bytes_on_a_device_fall_with_the_mesh_and_add_up():
    r = recipe(self_forcing, "wan,salt,paper")
    one, many = rows(r, ONE), rows(r, ONE | {"data": 8, "fsdp": 8})
    assert many["caches"].device * 64 == one["caches"].device
    assert one["student"].device == one["student"].whole == many["student"].whole
    assert one["student"].device / 8 <= many["student"].device < one["student"].device / 7.9
    assert "gathered blocks" in many and "gathered blocks" not in one
    # One cache, and with self-consistency two forwards with gradient; with alignment there are 1.6.
    assert one["caches"].whole == 64 * cache_bytes(r.wan, 21, (60, 104), 2)
    assert one["inputs of blocks"].whole == 64 * 2 * 30 * 32_760 * 1536 * 4


@pytest.mark.slow
def test_what_a_recipe_has_shows():
    tuned = rows(recipe(longlive, "wan,lora"), ONE)
    assert (
        tuned["merged networks"].whole == 3 * tuned["student's base"].whole
        and tuned["critic's base"].whole == tuned["student's base"].whole
        and "base" not in tuned
        and tuned["videos under way"].whole
    )
    assert tuned["gradients"].whole == tuned["student"].whole < tuned["student's base"].whole / 4
    assert "caches" not in rows(recipe(sc_dmd, "wan,i2v"), ONE)
    one = {
        kernel: rows(recipe(causal_forcing, "wan", batch_size=1), ONE, kernel)[
            "one block at work"
        ].whole
        for kernel in ("cudnn", "blocks", "plain")
    }
    # of the whole clip, in float32, twice
    assert one["plain"] - one["cudnn"] >= 2 * 12 * 32_760**2 * 4
    assert 0 < one["blocks"] - one["cudnn"] <= 3 * 2**26 * 4  # a block of them, three times


ONE_CHUNK = {
    "chunks of one frame": {"memory.chunk": 1, "memory.first": 1, "world.frames": 1},
    "a picture": {"memory.first": 1, "world.frames": 1},
    "the first of its own steps": {"rollout.first_steps": 2, "loss.self_consistency": 0.0},
    "no clean pass": {"memory.context": "last_step"},
    "cyclic": {"memory.positions": "cyclic", "memory.period": 3},
    "rolling": {"memory.window": 3},
}


@pytest.mark.parametrize("variant", ["", "salt"])
@pytest.mark.parametrize("policy", ONE_CHUNK)
def test_a_clip_of_one_chunk_needs_less_than_one_of_two(policy, variant):
    changes = {"world.frames": 3} | ONE_CHUNK[policy]
    one = recipe(self_forcing, variant, **changes)
    two = recipe(
        self_forcing, variant, **changes | {"world.frames": one.clip_shape[0] + one.memory.chunk}
    )
    less, more = rows(one, ONE, "blocks"), rows(two, ONE, "blocks")
    for name in ("batch", "caches", "inputs of blocks", "heads of networks", "one block at work"):
        assert (0 < less[name].whole < more[name].whole) or less[name] == more[name], name
    for learner in ("student", "critic"):
        assert all(p.pairs for p in make_stage(one).mean_passes(learner))


def test_a_vae_in_training_is_whole_on_every_device_and_its_work_is_counted():
    """126.9 M numbers of 2 bytes; of a clip of 480p what its convolutions remember, and a latent's
    frames.
    """
    r = recipe(longlive, "wan")
    one, many = rows(r, ONE), rows(r, ONE | {"data": 8, "fsdp": 8})
    assert one["VAE"].whole == one["VAE"].device == many["VAE"].device == 2 * 126_892_531
    assert 6e9 < vae_bytes(r) < 6.5e9
    above = one["VAE at work, above it"].whole
    assert above == 64 * vae_bytes(r) - one["one block at work"].whole > 0
    assert "VAE" not in rows(recipe(longlive, "long", weights=""), ONE)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_vae_takes_the_bytes_that_were_counted(dtype):
    r = recipe(longlive, "wan", batch_size=1, model__dtype=dtype, data__clip=(21, 16, 16))
    r = replace(r, model=replace(r.model, preset="wan2.1-t2v-tiny"))
    params = jax.tree.map(lambda x: S(x.shape, dtype), shapes_of(VAES["tiny"], init_vae))
    encode = jax.jit(lambda p, z: as_first(p, z, dtype))
    compiled = encode.lower(params, S((1, 5, 16, 16, 16), jnp.float32)).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    assert 0.7 < found / vae_bytes(r) < 1.4


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        (self_forcing, ["wan"]),
        (sc_dmd, ["wan"]),
        (sc_dmd, ["wan,i2v"]),
        (ode_regression, ["wan"]),
        (teacher, []),
    ],
)
def test_of_a_batch_what_the_stage_reads_is_counted(config, variant):
    r = recipe(config, *variant)
    batch = jax.eval_shape(lambda: random_batch(make_stage(r)))
    there = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
    assert rows(r, ONE)["batch"].whole == there > 0


def test_a_batch_that_does_not_spread_is_refused():
    with pytest.raises(UserError, match=r"config\.batch_size=64 .* 3"):
        rows(recipe(self_forcing, "wan"), ONE | {"data": 3})


def test_what_waits_with_the_host_is_on_no_device():
    make = lambda host: rows(recipe(self_forcing, "wan", host_state=host), ONE | {"fsdp": 8})
    here, there = make(False), make(True)
    for name in ("student optimizer", "critic optimizer", "average of the student"):
        assert there[name].device == 0 < here[name].device and there[name].whole == here[name].whole
    assert (
        there["student"] == here["student"] and there["moments fetched"].device == 0
    )  # activations are more


def test_in_portions_activations_are_those_of_one_and_gradients_are_summed():
    make = lambda count: rows(recipe(self_forcing, "wan", accumulate=count), ONE | {"fsdp": 8})
    whole, eighth = make(1), make(8)
    for name in ("caches", "inputs of blocks", "one block at work"):
        assert eighth[name].device * 8 == whole[name].device
    assert (
        eighth["gradients summed"].device == eighth["gradients"].device == whole["gradients"].device
    )
    assert set(eighth) - set(whole) == {"gradients summed"} and eighth["batch"] == whole["batch"]
    with pytest.raises(
        UserError, match=r"batch_size=64 must be a multiple of .* = 8, times config\.accumulate=16"
    ):
        make(16)


@pytest.mark.parametrize("kernel", ["blocks", "plain"])
@pytest.mark.parametrize("remat", get_args(Remat))
def test_what_a_policy_keeps_is_what_jax_keeps(remat, kernel):
    """What has as many rows as there are tokens in what a forward hands to its backward pass;
    beside parameters.
    """
    c = WanConfig(256, 4, 6, 1024, 16, 16, (1, 2, 2), 32, 4, 64, 0, 1e-6)
    compute = Compute(jnp.bfloat16, remat, kernel=kernel)
    params = shapes_of(c)
    text = Conditioning(S((1, 4, 32), jnp.float32))
    seen = Inputs(S((1, 2, 64, 64, 16), jnp.float32), S((1,), jnp.float32), text)
    back = lambda p, seen: jax.vjp(lambda p: apply_wan(p, seen, c, compute), p)[1]
    weights = {x.shape for x in jax.tree.leaves(params)}
    left = [
        x for x in jax.tree.leaves(jax.eval_shape(back, params, seen)) if x.shape not in weights
    ]
    found = sum(
        x.size * x.dtype.itemsize for x in left if x.shape[:1] == (6,) and x.size >= 6 * 2048 * 4
    )
    counted = 6 * kept_bytes(c, [(2, 2)], 1024, 2, kernel, compute, 1)
    if remat == "offload":
        assert counted == 0 and found == 6 * 2048 * 256 * 4  # on the host
    elif remat == "none" or (remat, kernel) == ("dots", "plain"):
        assert 0.5 < counted / found < 2
    else:
        assert counted == found


def small_run(mesh_sizes, **changes):
    """A run of 4 layers on 36 tokens each of 24 clips, and what its steps are lowered with."""
    r = recipe(self_forcing, weights="", teacher__kind="network", **changes)
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[: math.prod(mesh_sizes.values())])
    stage = make_stage(r, mesh)
    (state, frozen), shardings = forms(stage)
    batch = jax.eval_shape(lambda: random_batch(stage))
    key, draw = jax.eval_shape(lambda: jax.random.key(0)), stage.updates(0)[0][1]
    return stage, shardings, (state, frozen, batch, Call(key, S((), jnp.int32), draw))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("learner", "sizes", "count"),
    [
        ("student", ONE, 1),
        ("critic", ONE, 1),
        ("student", ONE | {"fsdp": 8}, 1),
        ("student", ONE, 4),
    ],
    ids=["student", "critic", "student-on-eight", "student-in-portions"],
)
def test_a_compiled_update_takes_the_bytes_that_were_counted(learner, sizes, count):
    """Arguments exactly, but for the text and a few scalars; temporaries within a factor of two.

    On a mesh too: a device works on its share of the batch alone.

    `pytest tests/planning/test_memory.py -m slow -s` prints both.
    """
    stage, shardings, args = small_run(sizes, accumulate=count)
    compiled = compile_step(stage, Update(learner), shardings).lower(*args).compile()
    memory, there = compiled.memory_analysis(), persistent(stage, sizes)
    # The teacher and its null text are not looked at by the critic's update, and its jit drops
    # them.
    idle = () if learner == "student" else ("teacher", "null text")
    used = sum(row.device for row in there if row.name not in idle)
    text = math.prod(args[2].cond.text.shape) * 4 // sizes["fsdp"]
    assert 0 <= memory.argument_size_in_bytes - used - text < 256
    goes = {row.name: row.device for row in transient(stage, sizes, "blocks", there)}
    assert goes["batch"] == text
    print(f"\n{learner}: temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB, counted {goes}")
    if learner == "student":
        assert 0.5 < memory.temp_size_in_bytes / sum(goes.values()) < 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_device_of_a_mesh_takes_the_bytes_that_were_counted(sizes):
    """By XLA's account of a program that reads the whole state."""
    stage, shardings, (state, frozen, *_) = small_run(ONE | sizes)
    look = jax.jit(
        lambda *trees: sum(x.sum() for x in jax.tree.leaves(trees)), in_shardings=shardings[:2]
    )
    found = look.lower(state, frozen).compile().memory_analysis().argument_size_in_bytes
    counted = sum(row.device for row in persistent(stage, ONE | sizes))
    assert 0 <= found - counted < 64  # counters


def test_a_block_needs_more_for_a_gradient_less_with_flash_and_on_more_devices():
    c, pairs = PRESETS["wan2.1-t2v-1.3b"], [(21, 21)]
    size = lambda kernel, gradient, tensor: block_bytes(c, pairs, 1560, 2, kernel, gradient, tensor)
    sizes = [size(kernel, True, 1) for kernel in ("splash", "blocks", "plain")]
    assert size("splash", False, 1) < sizes[0] < sizes[1] < sizes[2]
    assert size("splash", True, 4) < size("splash", True, 1)
