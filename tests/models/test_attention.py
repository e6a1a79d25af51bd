"""Every kernel against attention written down in numpy, and the layouts over a mesh against one
device.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from salt_jax.models import attention_blocks
from salt_jax.models.attention import attention, attention_layout, choose_kernel
from salt_jax.models.attention_splash import attend_splash
from salt_jax.sharding import make_mesh

SHAPES = {  # queries, keys, keys that count
    "even": (24, 24, None),
    "odd": (7, 13, None),
    "image rows": (12, 257, None),
    "one token": (1, 1, None),
    "a cache that fills": (6, 31, 17),
    "a cache with one": (6, 31, 1),
    "a full cache": (6, 31, 31),
}


def arrays(queries, keys, width=8, dtype=np.float32, batch=2, heads=3):
    rng = np.random.default_rng(queries + keys)
    draw = lambda n: jnp.asarray(rng.standard_normal((batch, n, heads, width)), dtype)
    return draw(queries), draw(keys), draw(keys)


def by_hand(q, k, v, length, d_out):
    """Output, and gradients of sum(out d_out), in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k, v = (x[:, :length] if length else x for x in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("blad,bmad->balm", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("blad,bmad->balm", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    out = np.einsum("balm,bmad->blad", weights, v)
    d_q = np.einsum("balm,bmad->blad", d_scores, k)
    return (
        out,
        d_q,
        np.einsum("balm,blad->bmad", d_scores, q),
        np.einsum("balm,blad->bmad", weights, d_out),
    )


def check(attend, queries, keys, length, atol, **how):
    q, k, v = arrays(queries, keys, **how)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), q.dtype)
    told = None if length is None else jnp.int32(length)
    out, back = jax.vjp(lambda *x: attend(*x, told), q, k, v)
    got = (out, *back(d_out))
    for name, ours, hand in zip(
        ("out", "dq", "dk", "dv"), got, by_hand(q, k, v, length, d_out), strict=True
    ):
        ours = np.asarray(ours, np.float64)
        if ours.shape != hand.shape:  # keys that do not count have no gradient
            np.testing.assert_array_equal(ours[:, length:], 0)
            ours = ours[:, :length]
        np.testing.assert_allclose(ours, hand, atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize("kernel", ["plain", "blocks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient(kernel, shape):
    check(functools.partial(attention, kernel=kernel), *SHAPES[shape], 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_that_do_not_divide(shape, monkeypatch):
    """So few scores at a time that every shape is cut, mostly unevenly."""
    monkeypatch.setattr(attention_blocks, "MOST_SCORES", 2 * 3 * 257 * 2)
    jax.clear_caches()
    check(functools.partial(attention, kernel="blocks"), *SHAPES[shape], 2e-5)
    jax.clear_caches()


@pytest.mark.parametrize("kernel", ["plain", "blocks"])
def test_half_precision(kernel):
    check(functools.partial(attention, kernel=kernel), 24, 40, None, 4e-2, dtype=jnp.bfloat16)


@pytest.mark.parametrize("shape", ["odd", "image rows", "a cache that fills"])
def test_the_tpu_kernel_interpreted(shape):
    attend = functools.partial(attend_splash, interpret=True)
    check(attend, *SHAPES[shape], 2e-4, width=128, batch=1, heads=2)


def test_on_a_tpu_blocks_behind_the_length_are_not_read():
    """Of 1,300 keys 600 count: two blocks of three.

    The third is NaN; the length is a value of the program.
    """
    length, rng = 600, np.random.default_rng(0)
    draw = lambda tokens: jnp.asarray(rng.standard_normal((1, tokens, 2, 128)), jnp.float32)
    q, k, v = draw(130), draw(1300), draw(1300)
    loss = lambda q, k, v, n: (attend_splash(q, k, v, n, interpret=True) ** 2).sum()
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    behind = jnp.arange(1300)[None, :, None, None] >= 1024
    found = run(q, *(jnp.where(behind, jnp.nan, x) for x in (k, v)), jnp.int32(length))
    expected = run(q, k[:, :length], v[:, :length], jnp.int32(length))
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if ours.shape != wanted.shape:
            np.testing.assert_array_equal(ours[:, length:], 0)
            ours = ours[:, :length]
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_scores_never_stand_whole():
    """Memory of a forward and its gradient grows with the tokens, not with their square."""

    def temporaries(tokens):
        like = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
        loss = lambda q, k, v: attention(q, k, v).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(like, like, like).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 32768**2  # bytes; of one block 2^28
    assert temporaries(32768) < 5 * 2**28 < scores / 6


@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"fsdp": 2, "context": 4}, {"context": 2, "tensor": 4}, {"context": 8}]
)
@pytest.mark.parametrize("text", [False, True])
def test_a_mesh_changes_nothing(axes, text):
    """Heads that divide and heads that do not (12 over 8), keys of clips and of texts, output and
    gradient.
    """
    mesh = make_mesh(dict(data=1, fsdp=1, context=1, tensor=1) | axes, jax.devices())
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((8, *shape, 12, 4)), jnp.float32)
    q, k, v = draw(2, 8), *((draw(5), draw(5)) if text else (draw(3, 8), draw(3, 8)))

    def run(mesh):
        loss = lambda *x: (attention(*x, mesh=mesh) ** 2).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    chex.assert_trees_all_close(run(mesh), run(None), rtol=1e-5, atol=1e-5)


def test_along_context_tokens_are_exchanged_for_heads():
    mesh = make_mesh(dict(data=2, fsdp=1, context=2, tensor=2), jax.devices())
    clip, text = (4, 3, 8, 4, 16), (4, 9, 4, 16)
    batch, heads = ("data", "fsdp"), ("tensor", "context")
    assert attention_layout(mesh, clip, clip) == (P(batch, None, None, heads),) * 2
    cut = P(batch, None, ("context",), ("tensor",))
    assert attention_layout(mesh, clip, text) == (cut, P(batch, None, ("tensor",)))
    odd = (3, 3, 8, 3, 16)  # neither the batch nor the heads divide
    assert attention_layout(mesh, odd, odd) == (
        P(None, None, ("context",), None),
        P(None, None, None, None),
    )


def test_the_kernel_follows_the_devices():
    assert choose_kernel("gpu", jnp.bfloat16, 128) == "cudnn"
    assert choose_kernel("gpu", jnp.float32, 128) == "blocks"  # cuDNN has half precision only
    assert choose_kernel("gpu", jnp.bfloat16, 256) == "blocks"
    assert choose_kernel("tpu", jnp.bfloat16, 128) == "splash"
    assert choose_kernel("tpu", jnp.bfloat16, 48) == "blocks"
    assert choose_kernel("cpu", jnp.bfloat16, 128) == "blocks"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_kernel(shape):
    check(
        functools.partial(attention, kernel="cudnn"),
        *SHAPES[shape],
        4e-2,
        dtype=jnp.bfloat16,
        width=64,
    )
