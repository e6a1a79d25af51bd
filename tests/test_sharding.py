"""Parameters, moments and EMA are cut as the rules say, stay cut through an update, and give the
same numbers.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from salt_jax.errors import UserError
from salt_jax.models.presets import PRESETS
from salt_jax.models.wan import init_wan
from salt_jax.sharding import (
    AXES,
    batch_sharding,
    make_mesh,
    partition_spec,
    replicated,
    state_shardings,
)
from salt_jax.state import apply_gradients, init_learner, init_state, update_ema
from tests.helpers import close, lies
from tests.placing import place

# eps is large: a gradient of almost zero would turn the rounding of a sharded sum into a whole step
# of Adam.
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))


def sizes(data=1, fsdp=1, context=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def by_path(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def wan_state(preset):
    def make():
        params = init_wan(jax.random.key(0), PRESETS[preset])
        return init_state({name: init_learner(params, TX) for name in ("student", "critic")})

    return make


def bytes_per_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_a_single_device_is_a_mesh_of_one_and_axes_are_auto():
    mesh = make_mesh(sizes(), jax.devices()[:1])
    assert mesh.axis_names == AXES and mesh.devices.shape == (1, 1, 1, 1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (sizes(fsdp=-1), (1, 8, 1, 1)),
        (sizes(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
        (sizes(data=-1, fsdp=8), (1, 8, 1, 1)),
        (sizes(2, 2, 2, 1), (2, 2, 2, 1)),
    ],
)
def test_one_size_may_be_inferred(asked, shape):
    assert make_mesh(asked, jax.devices()[:8]).devices.shape == shape


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (sizes(data=3), "8 device"),
        (sizes(data=3, fsdp=-1), "8 device"),
        (sizes(data=16, fsdp=-1), "8 device"),
        (sizes(data=-1, fsdp=-1), "one of them may be -1"),
        (sizes(fsdp=0), "fsdp=0"),
        (sizes(fsdp=2.0), "fsdp=2.0"),
        ({"data": 8, "fsdp": 1, "context": 1}, "tensor=None"),
        (sizes(fsdp=8) | {"model": 1}, "model=1"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused_in_one_sentence(asked, told):
    with pytest.raises(UserError, match=told) as error:
        make_mesh(asked, jax.devices()[:8])
    assert "config.mesh" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks/self_attn/q/kernel", (2, 64, 64), P(None, "fsdp", "tensor")),
        (
            "learners/student/params/blocks/cross_attn/v/kernel",
            (2, 64, 64),
            P(None, "fsdp", "tensor"),
        ),
        (
            "learners/critic/opt_state/1/0/nu/wan/blocks/ffn_in/kernel",
            (2, 64, 256),
            P(None, "fsdp", "tensor"),
        ),
        ("ema/blocks/self_attn/o/kernel", (2, 64, 64), P(None, "tensor", "fsdp")),
        ("blocks/ffn_out/kernel", (2, 256, 64), P(None, "tensor", "fsdp")),
        ("blocks/self_attn/q/bias", (2, 64), P()),
        ("blocks/self_attn/norm_q/scale", (2, 64), P()),
        ("blocks/modulation", (2, 6, 64), P()),
        ("time_embedding/projection/kernel", (64, 384), P(None, "fsdp")),
        ("shared/embedding", (256, 64), P("fsdp")),
        ("head/linear/kernel", (64, 12), P("fsdp")),
        # What does not divide stays whole: 6 is no multiple of fsdp = 4, nor 9 of tensor = 2.
        ("blocks/self_attn/k/kernel", (2, 6, 64), P(None, None, "tensor")),
        ("blocks/self_attn/o/kernel", (2, 9, 64), P(None, None, "fsdp")),
        ("head/linear/kernel", (6, 10), P()),
        # Layers are never cut, though 64 of them would divide; factored moments have fewer axes
        # than their parameter.
        ("blocks/wi/kernel", (64, 6, 8), P(None, None, "fsdp")),
        ("opt_state/0/v_row/blocks/self_attn/q/kernel", (64, 6), P()),
        ("learners/student/opt_state/1/0/count", (), P()),
        # Videos under way are spread as the batch is, if there are enough of them; of a cache heads
        # are cut too.
        (
            "stream/cache/k",
            (2, 8, 6, 4, 2, 8),
            P(None, ("data", "fsdp"), None, None, ("tensor", "context")),
        ),
        ("stream/cache/x0", (8, 6, 4, 4, 3), P(("data", "fsdp"))),
        ("stream/text", (8, 12, 64), P(("data", "fsdp"))),
        ("stream/cache/v", (2, 6, 6, 4, 3, 8), P(None, None, None, None, None)),
        ("stream/cache/frames", (8,), P()),
    ],
)
def test_rules(path, shape, spec):
    assert partition_spec(path, shape, sizes(fsdp=4, tensor=2)) == spec


@pytest.mark.parametrize("preset", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_a_full_size_state_is_cut_evenly_and_moments_and_ema_follow_their_parameter(preset):
    abstract = jax.eval_shape(wan_state(preset))
    mesh = make_mesh(sizes(fsdp=4, tensor=2), jax.devices()[:8])
    leaves, shardings = by_path(abstract), by_path(state_shardings(mesh, abstract))
    assert leaves.keys() == shardings.keys()
    count = lambda shape: int(np.prod(shape, dtype=np.int64))
    whole = sum(count(x.shape) for x in leaves.values())
    local = sum(count(shardings[path].shard_shape(x.shape)) for path, x in leaves.items())
    # 8 would be a perfect cut; embeddings and head know only fsdp, vectors are copied.
    assert 7 < whole / local < 8
    params = {
        path.removeprefix("ema/"): s.spec
        for path, s in shardings.items()
        if path.startswith("ema/")
    }
    for path, spec in params.items():
        twins = [s.spec for name, s in shardings.items() if name.endswith("/" + path)]
        # EMA; student and critic: parameter and two moments
        assert len(twins) == 7 and set(twins) == {spec}


def test_an_update_keeps_everything_cut_compiles_once_and_gives_the_single_device_numbers():
    wave = lambda *shape: 0.3 * np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
    params = {
        "blocks": {
            "ffn_in": {"kernel": wave(2, 16, 64), "bias": wave(2, 64)},
            "ffn_out": {"kernel": wave(2, 64, 16)},
        },
        "head": {"kernel": wave(16, 6)},
    }

    def loss_of(params, x):
        def block(h, w):
            return h + jnp.tanh(h @ w["ffn_in"]["kernel"] + w["ffn_in"]["bias"][None]) @ w[
                "ffn_out"
            ]["kernel"], None

        h, _ = jax.lax.scan(block, x, params["blocks"])
        return jnp.mean((h @ params["head"]["kernel"]) ** 2)

    def step(state, x):
        student = state.learners["student"]
        loss, grads = jax.value_and_grad(loss_of)(student.params, x)
        student = apply_gradients(student, grads, loss, TX)
        ema = update_ema(state.ema, student.params, 0.9, state.iteration, 0)
        moved = {"iteration": state.iteration + 1, "learners": {"student": student}, "ema": ema}
        return state.replace(**moved), loss

    def run(mesh):
        state = init_state({"student": init_learner(params, TX)})
        shardings = state_shardings(mesh, state)
        state = place(state, shardings)
        born = bytes_per_device(state)
        jitted = jax.jit(
            chex.assert_max_traces(step, n=2),  # one for each mesh
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        )
        for i in range(2):
            state, _ = jitted(state, place(wave(8, 16) + i, batch_sharding(mesh)))
        assert bytes_per_device(state) == born
        lies(state, shardings)
        return born, jax.tree.map(np.asarray, state)

    one_bytes, one = run(make_mesh(sizes(), jax.devices()[:1]))
    eight_bytes, eight = run(make_mesh(sizes(fsdp=4, tensor=2), jax.devices()[:8]))
    assert eight_bytes < one_bytes / 5
    student = eight.learners["student"]
    assert int(eight.iteration) == 2 and int(student.skipped) == 0
    assert np.abs(student.params["head"]["kernel"] - params["head"]["kernel"]).max() > 1e-3
    close(one, eight, atol=1e-5)


def test_a_batch_is_spread_over_data_and_fsdp_and_examples_are_whole():
    mesh = make_mesh(sizes(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    video = np.arange(8 * 3 * 4, dtype=np.float32).reshape(8, 3, 2, 2, 1)
    placed = place({"video": video}, batch_sharding(mesh))["video"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3, 2, 2, 1)}
    np.testing.assert_array_equal(placed, video)


def test_a_mesh_may_cut_an_axis_of_a_torus(monkeypatch):
    """jax.make_mesh refuses 8 x 8 on a torus of 4 x 4 x 4."""

    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = make_mesh({"data": 2, "fsdp": -1, "context": 1, "tensor": 1})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert mesh.devices.size == len(set(mesh.devices.flat)) == 8
