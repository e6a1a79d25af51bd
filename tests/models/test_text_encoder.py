"""The umT5 encoder against transformers, the published bucket table, and what the denoiser relies
on.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.models import text_encoder
from salt_jax.models.text_encoder import PRESETS, encode_prompts, encode_text, init_text_encoder
from tests.helpers import randomised, shapes_of
from tests.models.oracles import UMT5, random_tokens, umt5_of_transformers


def random_params(seed=0, std=0.2):
    return jax.tree.map(jnp.asarray, randomised(shapes_of(UMT5, init_text_encoder), seed, std))


def from_transformers(state, config):
    """UMT5EncoderModel's state dict -> our tree.

    Reads every tensor once; linear weights are transposed.
    """
    state = dict(state)
    take = lambda name: state.pop(name + ".weight")
    layers = [f"encoder.block.{i}.layer." for i in range(config.num_layers)]
    stack = lambda name, f: np.stack([f(take(layer + name)) for layer in layers])
    same, transpose = lambda w: w, lambda w: w.T
    state.pop("encoder.embed_tokens.weight", None)  # tied to shared
    blocks = {
        "attention_layer_norm": {"scale": stack("0.layer_norm", same)},
        "relative_attention_bias": {
            "embedding": stack("0.SelfAttention.relative_attention_bias", same)
        },
        **{name: {"kernel": stack(f"0.SelfAttention.{name}", transpose)} for name in "qkvo"},
        "ffn_layer_norm": {"scale": stack("1.layer_norm", same)},
        **{
            name: {"kernel": stack(f"1.DenseReluDense.{name}", transpose)}
            for name in ("wi_0", "wi_1", "wo")
        },
    }
    tree = {
        "shared": {"embedding": take("shared")},
        "blocks": blocks,
        "final_layer_norm": {"scale": take("encoder.final_layer_norm")},
    }
    assert not state, f"tensors without a place: {sorted(state)}"
    return tree


@pytest.mark.parity
def test_equals_transformers_with_padding():
    torch = pytest.importorskip("torch")
    oracle = umt5_of_transformers()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in oracle.named_parameters():
            std = (
                1.0 if "bias" in name or "wi_0" in name else 0.1
            )  # wide enough to tell GELU's two forms apart
            w.copy_(("norm" in name) + std * torch.randn(w.shape, generator=generator))
    params = from_transformers({k: v.numpy() for k, v in oracle.state_dict().items()}, UMT5)
    fresh = shapes_of(UMT5, init_text_encoder)
    chex.assert_trees_all_equal_shapes(params, fresh)

    tokens = random_tokens([160, 37, 1], 160)
    with torch.no_grad():
        ids = torch.from_numpy(np.array(tokens)).long()
        want = oracle(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state.numpy()
    got = np.asarray(encode_text(jax.tree.map(jnp.asarray, params), tokens, UMT5))
    is_text = np.asarray(tokens) != 0
    np.testing.assert_allclose(got[is_text], want[is_text], atol=2e-5, rtol=1e-5)
    assert np.abs(want[is_text]).max() > 1  # the tolerance is judged against outputs of order one
    assert (got[~is_text] == 0).all()


def test_buckets_are_the_published_ones():
    relative = np.array(
        [-200, -128, -64, -16, -9, -8, -7, -1, 0, 1, 7, 8, 9, 16, 64, 127, 128, 200]
    )
    want = [15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 30, 31, 31, 31]
    buckets = text_encoder.relative_buckets(401, UMT5)  # [query, key], relative = key - query
    np.testing.assert_array_equal(buckets[200, 200 + relative], want)


def test_full_size_has_the_published_parameter_count():
    params = shapes_of(PRESETS["umt5-xxl"], init_text_encoder)
    assert sum(w.size for w in jax.tree.leaves(params)) == 5_680_910_336


def test_padding_changes_nothing_but_adds_zero_rows():
    params = random_params()
    tokens = random_tokens([20, 9], 20)
    padded = encode_text(params, tokens, UMT5)
    alone = encode_text(params, tokens[1:, :9], UMT5)
    np.testing.assert_allclose(padded[1, :9], alone[0], atol=1e-5)
    assert (np.asarray(padded)[1, 9:] == 0).all()


def test_gradient_reaches_every_layer_and_only_the_tokens_used():
    tokens = random_tokens([12, 5], 16)
    target = np.random.default_rng(1).normal(size=(2, 16, UMT5.dim))
    grads = jax.grad(lambda p: jnp.sum(encode_text(p, tokens, UMT5) * target))(random_params())
    for path, g in jax.tree_util.tree_leaves_with_path(grads["blocks"]):
        per_layer = np.abs(np.asarray(g)).reshape(UMT5.num_layers, -1).max(1)
        assert ((per_layer > 0) & (per_layer < np.inf)).all(), jax.tree_util.keystr(path)
    moved = np.flatnonzero(np.abs(np.asarray(grads["shared"]["embedding"])).sum(1))
    assert set(moved) == set(np.unique(tokens)) - {0}


def test_fresh_sub_layers_put_out_values_of_order_one():
    """With q's missing 1/sqrt(d) absorbed in the initialisation, no softmax starts saturated."""
    config = PRESETS["tiny"]
    params = jax.tree.map(
        np.asarray, jax.jit(lambda k: init_text_encoder(k, config))(jax.random.key(0))
    )
    assert 0.7 < params["shared"]["embedding"].std() < 1.4
    assert not np.allclose(params["blocks"]["q"]["kernel"][0], params["blocks"]["q"]["kernel"][1])
    h = np.random.default_rng(0).normal(size=(64, config.dim))
    linear = lambda name, h: h @ params["blocks"][name]["kernel"][0]
    heads = lambda name: linear(name, h).reshape(64, config.num_heads, config.head_dim)
    assert 0.7 < np.einsum("qad,kad->aqk", heads("q"), heads("k")).std() < 1.4
    assert 0.7 < linear("o", linear("v", h)).std() < 1.4
    gated = np.asarray(jax.nn.gelu(linear("wi_0", h))) * linear("wi_1", h)
    assert 0.3 < linear("wo", gated).std() < 1.4


def test_bfloat16_stays_near_float32():
    params, tokens = random_params(), random_tokens([20, 9], 20)
    exact = encode_text(params, tokens, UMT5)
    rough = encode_text(params, tokens, UMT5, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    assert (
        np.abs(np.asarray(rough, np.float32) - np.asarray(exact)).mean() < 0.05
    )  # rows have mean square one


def test_prompts_cost_their_longest_and_equal_the_padded_encoding(monkeypatch):
    widths = []
    encode = text_encoder._encode
    monkeypatch.setattr(
        text_encoder,
        "_encode",
        lambda p, t, *a, **k: widths.append(t.shape[1]) or encode(p, t, *a, **k),
    )
    params = random_params(std=0.1)
    for lengths, width in (((64, 3), 64), ((65, 1), 100)):
        tokens = random_tokens(lengths, 100)
        got = encode_prompts(params, np.asarray(tokens), UMT5)
        assert widths.pop() == width
        np.testing.assert_allclose(got, encode_text(params, tokens, UMT5), atol=1e-5)


def arrays_of(jaxpr):
    """(dtype, shape) of everything that a program computes, inside its loops too."""
    for equation in jaxpr.eqns:
        yield from ((str(v.aval.dtype), v.aval.shape) for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def test_weights_stored_in_bfloat16_stay_so():
    """umT5-xxl is stored in bfloat16 and fits beside little else: no weight is copied into
    float32.
    """
    params, tokens = (
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), random_params()),
        random_tokens([20, 9], 20),
    )
    encode = lambda p: encode_text(p, tokens, UMT5, dtype=jnp.bfloat16)
    matrices = {
        w.shape[-2:] for w in jax.tree.leaves(params) if w.shape[-1] >= UMT5.dim and w.ndim > 1
    }
    made = [
        shape
        for dtype, shape in arrays_of(jax.make_jaxpr(encode)(params).jaxpr)
        if dtype == "float32"
    ]
    assert made and not matrices & set(made)
    assert jax.eval_shape(encode, params).dtype == jnp.bfloat16

    widened = encode_text(jax.tree.map(lambda w: w.astype(jnp.float32), params), tokens, UMT5)
    stored = encode_text(params, tokens, UMT5)  # the default computes in float32
    assert stored.dtype == jnp.float32
    np.testing.assert_allclose(stored, widened, atol=1e-5)
