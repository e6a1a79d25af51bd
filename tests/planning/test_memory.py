"""Bytes against the trees that a run has, against arrays on a mesh, and against XLA's account of
compiled updates.
"""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, causal_forcing, longlive, sc_dmd, self_forcing
from salt_jax import sharding
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from salt_jax.models.denoiser import wan_network
from salt_jax.models.presets import PRESETS, Compute, Remat, WanConfig
from salt_jax.models.wan import apply_wan, init_wan
from salt_jax.planning.memory import (
    block_bytes,
    cache_bytes,
    fresh_state,
    kept,
    kept_bytes,
    needed,
    passing,
    tree_bytes,
)
from salt_jax.rollout.draws import Choice
from salt_jax.train.loop import decide
from salt_jax.train.setup import make_networks, setup
from salt_jax.train.step import compile_step, critic_step, student_step
from tests.placing import place

S = jax.ShapeDtypeStruct
ONE = dict.fromkeys(sharding.AXES, 1)


def recipe(config, *variant, **changes):
    made = config.get_config(*variant)
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return read_recipe(made)


def rows(r, mesh, kernel="cudnn"):
    return {row.name: row for row in needed(r, mesh, kernel)}


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


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_what_is_counted_is_what_a_run_starts_from(start):
    c = base.get_config()
    c.update_from_flattened_dict(STARTS[start])
    r = read_recipe(c)
    parts = setup(r, sharding.make_mesh(ONE, jax.devices()[:1]))
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    state, frozen = jax.eval_shape(lambda: fresh_state(r))
    assert form(state) == form(parts.fresh()) == form(parts.state)
    assert form(frozen) == form(parts.frozen)


@pytest.mark.parametrize("sizes", [(2, 4, 1, 1), (1, 2, 2, 2)])
def test_a_device_holds_what_it_is_given(sizes):
    r = recipe(self_forcing, weights="", batch_size=8)
    state, _ = jax.eval_shape(lambda: fresh_state(r))
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
        network = wan_network(c, Compute(jnp.bfloat16), 21, 3)
        cache = jax.eval_shape(lambda n=network: n.empty_cache(jnp.zeros((1, 0, 60, 104, 16)), 21))
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
    r = recipe(self_forcing, "wan,salt")
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
        tuned["merged networks"].whole == 3 * tuned["base"].whole
        and tuned["videos under way"].whole
    )
    assert tuned["gradients"].whole == tuned["student"].whole < tuned["base"].whole / 4
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
    params = jax.eval_shape(lambda: init_wan(jax.random.key(0), c))
    told = S((1, 2, 64, 64, 16), jnp.float32), S((1,), jnp.float32), S((1, 4, 32), jnp.float32)
    back = lambda p, *args: jax.vjp(lambda p: apply_wan(p, *args, c, compute), p)[1]
    weights = {x.shape for x in jax.tree.leaves(params)}
    left = [
        x for x in jax.tree.leaves(jax.eval_shape(back, params, *told)) if x.shape not in weights
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
    state, frozen = jax.eval_shape(lambda: fresh_state(r))
    trees = (sharding.state_shardings(mesh, tree) for tree in (state, frozen))
    shardings = (*trees, sharding.batch_sharding(mesh), sharding.replicated(mesh))
    null = jnp.zeros((1, r.wan.text_length, r.wan.text_dim))
    clip = S((r.batch_size, *r.clip_shape), jnp.float32)
    batch = {"video": clip, "text": S((r.batch_size, *null.shape[1:]), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (state, frozen, batch, key, S((), jnp.int32), decide(r, 0, 0)[1])
    return r, make_networks(r, null, mesh), shardings, args


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("step", "sizes", "count"),
    [
        (student_step, ONE, 1),
        (critic_step, ONE, 1),
        (student_step, ONE | {"fsdp": 8}, 1),
        (student_step, ONE, 4),
    ],
    ids=["student", "critic", "student-on-eight", "student-in-portions"],
)
def test_a_compiled_update_takes_the_bytes_that_were_counted(step, sizes, count):
    """Arguments exactly, but for the text and a few scalars; temporaries within a factor of two.

    On a mesh too: a device works on its share of the batch alone.

    `pytest tests/planning/test_memory.py -m slow -s` prints both.
    """
    r, nets, shardings, args = small_run(sizes, accumulate=count)
    compiled = compile_step(step, nets, r, shardings, choice=Choice()).lower(*args).compile()
    memory, there = compiled.memory_analysis(), kept(r, sizes)
    # The video of the batch is not looked at; nor is the teacher by the critic's update, and its
    # jit drops it.
    used = sum(row.device for row in there if step is student_step or row.name != "teacher")
    text = math.prod(args[2]["text"].shape) * 4 // sizes["fsdp"]
    assert 0 <= memory.argument_size_in_bytes - used - text < 256
    passing_bytes = {row.name: row.device for row in passing(r, sizes, "blocks", there)}
    print(
        f"\n{step.__name__}: temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB, counted "
        f"{passing_bytes}"
    )
    if step is student_step:
        assert 0.5 < memory.temp_size_in_bytes / sum(passing_bytes.values()) < 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_device_of_a_mesh_takes_the_bytes_that_were_counted(sizes):
    """By XLA's account of a program that reads the whole state."""
    r, _, shardings, (state, frozen, *_) = small_run(ONE | sizes)
    look = jax.jit(
        lambda *trees: sum(x.sum() for x in jax.tree.leaves(trees)), in_shardings=shardings[:2]
    )
    found = look.lower(state, frozen).compile().memory_analysis().argument_size_in_bytes
    counted = sum(row.device for row in kept(r, ONE | sizes))
    assert 0 <= found - counted < 64  # counters


def test_a_block_needs_more_for_a_gradient_less_with_flash_and_on_more_devices():
    c, pairs = PRESETS["wan2.1-t2v-1.3b"], [(21, 21)]
    size = lambda kernel, gradient, tensor: block_bytes(c, pairs, 1560, 2, kernel, gradient, tensor)
    sizes = [size(kernel, True, 1) for kernel in ("splash", "blocks", "plain")]
    assert size("splash", False, 1) < sizes[0] < sizes[1] < sizes[2]
    assert size("splash", True, 4) < size("splash", True, 1)
