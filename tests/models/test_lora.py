"""Low-rank adaptation: W + alpha / rank a b in numpy, where it starts, and what moves."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from salt_jax.models.lora import init_lora, merge
from salt_jax.models.presets import PRESETS, WanConfig
from tests.helpers import randomised, shapes_of

SMALL = WanConfig(48, 2, 2, 64, 3, 3, (1, 2, 2), 8, 4, 32, 0, 1e-6)
BASE = randomised(shapes_of(SMALL), 1)
RANK, ALPHA = 4, 6.0
LORA = SimpleNamespace(rank=RANK, alpha=ALPHA)


def trained(seed=2):
    """As after some updates: b is not zero any more."""
    return randomised(jax.eval_shape(lambda: init_lora(jax.random.key(0), BASE, RANK)), seed)


def test_the_network_starts_unchanged():
    start = init_lora(jax.random.key(3), BASE, RANK)
    chex.assert_trees_all_equal(merge(BASE, start, LORA), BASE)


def test_every_matrix_of_the_blocks_gets_its_product_and_nothing_else_changes():
    """In every layer the difference has the rank of the adaptation."""
    params = trained()
    base, whole = flatten_dict(BASE), flatten_dict(merge(BASE, params, LORA))
    adapted = {path for path in base if path[0] == "blocks" and path[-1] == "kernel"}
    assert {path[:-1] for path in flatten_dict(params)} == adapted and len(adapted) == 10
    assert base.keys() == whole.keys()
    for path in base:
        if path not in adapted:
            np.testing.assert_array_equal(whole[path], base[path])
            continue
        a, b = (
            np.asarray(flatten_dict(params)[(*path, name)], float) for name in ("lora_a", "lora_b")
        )
        for layer in range(SMALL.num_layers):
            product = np.asarray(base[path][layer], float) + ALPHA / RANK * a[layer] @ b[layer]
            np.testing.assert_allclose(whole[path][layer], product, atol=1e-5)
            assert np.linalg.matrix_rank(a[layer] @ b[layer]) == RANK


def test_layers_and_matrices_start_with_noise_of_their_own_and_of_unit_variance():
    """x a has the variance of x, as in the paper's code up to a factor: rows are scaled by their
    number.
    """
    flat = flatten_dict(init_lora(jax.random.key(4), BASE, 16))
    starts = [
        np.asarray(z[layer])
        for path, z in flat.items()
        if path[-1] == "lora_a"
        for layer in range(2)
    ]
    for start in starts:
        assert start.std() * np.sqrt(len(start)) == pytest.approx(1.0, abs=0.12)
    first = [start[:48, :16].ravel() for start in starts]
    assert np.abs(np.corrcoef(first) - np.eye(len(first))).max() < 0.2
    assert all(not np.any(z) for path, z in flat.items() if path[-1] == "lora_b")


def test_the_gradient_reaches_both_factors_by_the_chain_rule_and_not_the_base():
    """Of <slope, W + alpha / rank a b>, whose gradient to the whole network is `slope` itself."""
    slope = randomised(BASE, 5)
    inner = lambda whole: sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, whole)), strict=True)
    )
    to_base, to_params = jax.grad(lambda base, p: inner(merge(base, p, LORA)), argnums=(0, 1))(
        BASE, trained()
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_base))
    slope, values, found = map(flatten_dict, (slope, trained(), to_params))
    for path in {path[:-1] for path in found}:
        a, b = (np.asarray(values[(*path, name)], float) for name in ("lora_a", "lora_b"))
        of_product = ALPHA / RANK * np.asarray(slope[path], float)
        np.testing.assert_allclose(
            found[(*path, "lora_a")], of_product @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(
            found[(*path, "lora_b")], a.swapaxes(1, 2) @ of_product, rtol=1e-3, atol=1e-5
        )


def test_without_a_rank_parameters_are_the_network():
    assert merge(None, BASE, SimpleNamespace(rank=0, alpha=0.0)) is BASE


def test_full_size_adapters_are_small():
    """Rank 256 on the 14B model: ten matrices in each of 40 layers."""
    base = shapes_of(PRESETS["wan2.1-t2v-14b"])
    params = jax.eval_shape(lambda p: init_lora(jax.random.key(0), p, 256), base)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 40 * 256 * (8 * (5120 + 5120) + 2 * (5120 + 13824))
    merged = jax.eval_shape(
        lambda b, p: merge(b, p, SimpleNamespace(rank=256, alpha=256.0)), base, params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)
