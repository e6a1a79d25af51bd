"""What several test files share."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from salt_jax import sharding
from salt_jax.flow.prediction import from_velocity
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.visibility import KeysValues
from salt_jax.models.wan import init_wan
from salt_jax.stages.stage import Stage
from salt_jax.train.step import Call
from tests.placing import place

ROOT = Path(__file__).parents[1]
RED, BLUE = "A red circle moves left.", "A blue square moves up."  # captions of Moving Shapes


@functools.cache
def shapes_of(config, init=init_wan):
    """Of a network's parameters, as `jax.eval_shape` tells them."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


@contextmanager
def without_type_checks() -> Iterator[None]:
    """Calls as users make them: only in tests jaxtyping looks at the shapes too."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def randomised(params, seed, std=0.08):
    """Every leaf random, gains around one: default zeros and ones would hide a wrong mapping."""
    rng = np.random.default_rng(seed)
    noise = lambda path, p: (std * rng.standard_normal(p.shape) + (path[-1].key == "scale")).astype(
        np.float32
    )
    return jax.tree_util.tree_map_with_path(noise, params)


def host(tree):
    """Its arrays, copied."""
    return jax.tree.map(np.array, tree)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def same_bits(found, wanted):
    """Also types, signs of zeros, and NaN that is itself."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    chex.assert_trees_all_equal(found, wanted)  # it names the array
    assert bits(found) == bits(wanted)


def lies(tree, shardings):
    """Every array as its sharding says."""
    chex.assert_trees_all_equal_comparator(
        lambda x, where: x.sharding.is_equivalent_to(where, x.ndim),
        lambda x, where: f"{x.sharding} is not {where}",
        tree,
        shardings,
    )


def mesh_of(**sizes):
    """So many of the devices; an axis that is not named has one."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def layout(state, frozen, sizes=()):
    """Where everything that an update reads lies on a mesh of these sizes, as `compile_step` wants
    it.
    """
    mesh = mesh_of(**dict(sizes))
    shard = lambda tree: sharding.state_shardings(mesh, tree)
    return shard(state), shard(frozen), sharding.batch_sharding(mesh), sharding.replicated(mesh)


def with_networks(stage: Stage, **networks):
    """The same stage with other denoisers as its `student`, `critic` or `teacher`."""
    kind = type(stage)
    return type(kind.__name__, (kind,), networks)(stage.recipe, stage.mesh)


def traced(stage: Stage, n: int):
    """The same stage with a loss that may be traced so often."""
    chex.clear_trace_counter()
    return with_networks(stage, loss=chex.assert_max_traces(type(stage).loss, n))


def wan_inputs(seed, config, batch=2, frames=3, height=8, width=6, rows=12):
    """Latents, timesteps and text for a network of Wan, random numpy arrays."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, frames, height, width, config.in_channels)).astype(np.float32)
    text = rng.standard_normal((batch, rows, config.text_dim)).astype(np.float32)
    return x, np.array([937.5, 20.25], np.float32)[:batch], text


def to_diffusers(params, config):
    """Our tree under diffusers' names, torch tensors: written from the name table, not from our
    loader.
    """
    torch = pytest.importorskip("torch")
    out = {}

    def linear(name, p):
        out[f"{name}.weight"], out[f"{name}.bias"] = p["kernel"].T, p["bias"]

    pt, ph, pw = config.patch_size
    patch = params["patch_embedding"]
    out["patch_embedding.weight"] = patch["kernel"].T.reshape(
        config.dim, config.in_channels, pt, ph, pw
    )
    out["patch_embedding.bias"] = patch["bias"]
    for ours, theirs in (("time", "time_embedder"), ("text", "text_embedder")):
        linear(f"condition_embedder.{theirs}.linear_1", params[f"{ours}_embedding"]["in"])
        linear(f"condition_embedder.{theirs}.linear_2", params[f"{ours}_embedding"]["out"])
    linear("condition_embedder.time_proj", params["time_embedding"]["projection"])
    linear("proj_out", params["head"]["linear"])
    out["scale_shift_table"] = params["head"]["modulation"][None]
    if config.image_dim:
        image, theirs = params["image_embedding"], "condition_embedder.image_embedder"
        for a, b in (("norm_in", "norm1"), ("norm_out", "norm2")):
            out[f"{theirs}.{b}.weight"], out[f"{theirs}.{b}.bias"] = (
                image[a]["scale"],
                image[a]["bias"],
            )
        linear(f"{theirs}.ff.net.0.proj", image["in"])
        linear(f"{theirs}.ff.net.2", image["out"])
    for i in range(config.num_layers):
        block, name = jax.tree.map(lambda p, i=i: p[i], params["blocks"]), f"blocks.{i}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                linear(f"{name}.{theirs}.{b}", block[ours][a])
            for norm in ("norm_q", "norm_k"):
                out[f"{name}.{theirs}.{norm}.weight"] = block[ours][norm]["scale"]
        if config.image_dim:
            linear(f"{name}.attn2.add_k_proj", block["cross_attn"]["k_img"])
            linear(f"{name}.attn2.add_v_proj", block["cross_attn"]["v_img"])
            out[f"{name}.attn2.norm_added_k.weight"] = block["cross_attn"]["norm_k_img"]["scale"]
        out[f"{name}.norm2.weight"], out[f"{name}.norm2.bias"] = (
            block["norm_cross"]["scale"],
            block["norm_cross"]["bias"],
        )
        linear(f"{name}.ffn.net.0.proj", block["ffn_in"])
        linear(f"{name}.ffn.net.2", block["ffn_out"])
        out[f"{name}.scale_shift_table"] = block["modulation"][None]
    return {k: torch.tensor(np.array(v)) for k, v in out.items()}


def diffusers_sizes(config):
    """Of a text-to-video network, as diffusers' take them."""
    return dict(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )


def wan_of_diffusers(config):
    """diffusers' network of the same sizes."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        **diffusers_sizes(config),
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.dim if config.image_dim else None,
    ).eval()


def arguments(shardings, state, frozen, batch, draw=None, index=0):
    """What a compiled update is called with, copied and laid out: that of a run with seed key 7."""
    call = Call(jax.random.key(7), np.int32(index), draw)
    pairs = zip((state, frozen, batch, call), shardings, strict=True)
    return tuple(place(*pair) for pair in pairs)


def assert_all_moved(before, after):
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


@dataclass(frozen=True)
class Formula:
    """A function (params, x, sigma, cond) -> prediction as a denoiser of whole clips."""

    function: Callable

    def denoise(self, params, x, sigma, cond):
        return self.function(params, x, sigma, cond)


class Straight(WanDenoiser):
    """Reads nothing but the text: its velocity is one number for each clip, the mean of the text
    times the parameter, and its trajectories are lines.
    """

    def denoise(self, params, x, sigma, cond, plan=None):
        slope = params * cond.text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        return from_velocity(x, jnp.broadcast_to(slope, x.shape), sigma)

    def keys_values(self, params, x0, cond, plan):
        nothing = jnp.zeros((1, *x0.shape[:2], 1, 1, 1))
        return KeysValues(nothing, nothing)
