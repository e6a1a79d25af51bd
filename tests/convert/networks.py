"""Small networks as files of others: official names by hand, other layouts by our table."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from salt_jax.convert import names, reading
from salt_jax.convert.reading import find_network
from salt_jax.io.tensor_files import load_weights, write_tensors
from salt_jax.models.presets import PRESETS
from tests.convert.pickles import archive, ordered, storage, table, tensor
from tests.helpers import shapes_of

T2V, I2V = PRESETS["wan2.1-t2v-tiny"], PRESETS["wan2.1-i2v-tiny"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def official(params, config):
    """Our tree under the names of the release, numpy arrays: by hand, in the words of its code, not
    from our table.
    """
    out = {}

    def put(name, p):
        out[f"{name}.weight"] = p["kernel"].T if "kernel" in p else p["scale"]
        if "bias" in p:
            out[f"{name}.bias"] = p["bias"]

    patch, kernel = (
        (config.dim, config.in_channels, *config.patch_size),
        params["patch_embedding"]["kernel"],
    )
    out["patch_embedding.weight"] = kernel.T.reshape(patch)
    out["patch_embedding.bias"] = params["patch_embedding"]["bias"]
    for part in ("text", "time"):
        put(f"{part}_embedding.0", params[f"{part}_embedding"]["in"])
        put(f"{part}_embedding.2", params[f"{part}_embedding"]["out"])
    put("time_projection.1", params["time_embedding"]["projection"])
    put("head.head", params["head"]["linear"])
    out["head.modulation"] = params["head"]["modulation"][None]
    for place, part in enumerate(("norm_in", "in", None, "out", "norm_out")):
        if part and config.image_dim:
            put(f"img_emb.proj.{place}", params["image_embedding"][part])
    for i in range(config.num_layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for attention in ("self_attn", "cross_attn"):
            for part in block[attention]:
                put(f"blocks.{i}.{attention}.{part}", block[attention][part])
        put(f"blocks.{i}.norm3", block["norm_cross"])
        put(f"blocks.{i}.ffn.0", block["ffn_in"])
        put(f"blocks.{i}.ffn.2", block["ffn_out"])
        out[f"blocks.{i}.modulation"] = block["modulation"][None]
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def save_torch(path, tree):
    """What torch.save would write of nested dicts of arrays, by hand."""
    data, kinds = (
        {},
        {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"},
    )

    def describe(value):
        if isinstance(value, dict):
            return ordered({key: describe(v) for key, v in value.items()})
        key = str(len(data))
        data[key] = value.tobytes()
        strides = [int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim)]
        return tensor(storage(kinds[value.dtype.name], key, value.size), 0, value.shape, strides)

    return archive(path, table({key: describe(v) for key, v in tree.items()}), data)


def write(found, path, dtype=None):
    write_tensors(path, reading.writers(found, dtype), {"config": json.dumps(vars(found.config))})
    return path


def come_in(files, path, dtype=None, key=""):
    """Converts and loads as stored: (found, tree)."""
    found = find_network(files, key)
    like = shapes_of(found.config, reading.PARTS[found.network].init)
    return found, load_weights(write(found, path / "ours.safetensors", dtype), like, None)


def lora_file(path, params, rank, seed=3):
    """LongLive's: {"generator_lora": PEFT's names}, all matrices of the blocks."""
    rng, out = np.random.default_rng(seed), {}
    for name, w in official(params, T2V).items():
        if name.startswith("blocks.") and w.ndim == 2 and name.endswith(".weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            out[f"{layer}.lora_A.weight"] = rng.standard_normal((rank, w.shape[1])).astype(
                np.float32
            )
            out[f"{layer}.lora_B.weight"] = rng.standard_normal((w.shape[0], rank)).astype(
                np.float32
            )
    return save_torch(path, {"generator_lora": out, "step": np.int64([1])}), out


def from_table(network, layout, tree):
    """A file of theirs, made of our tree by the table: names and forms of one layout, numpy
    arrays.
    """
    out = {}
    for row in names.TABLES[network]:
        name, _, third = getattr(row, layout).partition("#")
        leaf = np.asarray(flatten_dict(tree, sep="/")[row.ours])
        form = row.official_form if layout == "official" and row.official_form else row.form
        there, here = form.split(" -> ")
        back = lambda array, here=here, there=there: reading.rearrange(array, f"{here} -> {there}")
        for i in range(len(leaf) if "{i}" in name else 1):
            array = back(leaf[i] if "{i}" in name else leaf)
            held = out.get(name.format(i=i))
            out[name.format(i=i)] = (
                array if not third or held is None else np.concatenate([held, array])
            )
    return {name: np.ascontiguousarray(array) for name, array in out.items()}
