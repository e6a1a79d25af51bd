"""The transformer of ours -> files that the official code, diffusers and ComfyUI load."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike

from salt_jax.convert.names import WAN
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.files import AnyPath, all_or_nothing, as_path
from salt_jax.io.model_folder import part_file, stored_config
from salt_jax.io.tensor_files import (
    Report,
    TensorRef,
    TensorWriter,
    layer,
    list_tensors,
    no_report,
    view,
    write_tensors,
)
from salt_jax.models.presets import WanConfig
from salt_jax.types import Leaf, Params

Layout = Literal["official", "diffusers"]
NAME = "diffusion_pytorch_model"


Stacked = Array | np.ndarray | TensorRef
"""An array of ours, that of all layers where it belongs to a layer."""


class Transformer(NamedTuple):
    """A network of ours."""

    config: WanConfig
    # of `init_wan`: arrays of jax or numpy, or `TensorRef` ones, of which one layer is in memory at
    # a time
    params: Params


def write_official(
    network: Transformer,
    dst: str | AnyPath,
    layout: Layout,
    dtype: DTypeLike | None = None,
    max_shard: int = 5 * 10**9,
    report: Report = no_report,
    record: str = "",
) -> None:
    """Writes a transformer as safetensors with its config.json: in `dst`, or in `dst`/transformer
    for Diffusers.

    Args:
      dtype: how to store it; None: as it is.
      max_shard: bytes; what is larger goes into several files with an index.
      report: is called with the bytes of each array that was written.
      record: metadata of each file under the key salt_jax.

    Raises:
      UserError: there is such a model already, or the disk refuses; nothing is left then.
    """
    inner = "transformer" if layout == "diffusers" else "."
    _refuse_existing(as_path(dst) / inner)
    shards = _shards(writers(network, layout, dtype), max_shard)
    with all_or_nothing(as_path(dst)) as temporary:
        folder = temporary / inner
        folder.mkdir(exist_ok=True)
        for file, shard in shards.items():
            write_tensors(folder / file, shard, metadata(record), report)
        if len(shards) > 1:
            _write_json(folder / f"{NAME}.safetensors.index.json", _index(shards))
        _write_json(folder / "config.json", stated_sizes(network.config, layout))


def metadata(record: str) -> dict[str, str]:
    """Of a file that others load, with what we say of it."""
    return {"format": "pt"} | ({"salt_jax": record} if record else {})


def _refuse_existing(folder: AnyPath) -> None:
    there = sorted(folder.glob(f"{NAME}*")) + sorted(folder.glob("config.json"))
    if there:
        raise UserError(
            f"{there[0]} exists, and the new files could be taken for parts of it; name an empty "
            "folder"
        )


def _shards(
    tensors: Mapping[str, TensorWriter], max_shard: int
) -> dict[str, dict[str, TensorWriter]]:
    """By the name of a file what goes into it: as many tensors as fit, in their order."""
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards, size = shards + [{}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{NAME}.safetensors": shards[0]}
    count = len(shards)
    return {f"{NAME}-{k:05d}-of-{count:05d}.safetensors": s for k, s in enumerate(shards, 1)}


def _index(shards: Mapping[str, Mapping[str, TensorWriter]]) -> dict[str, object]:
    """Where each tensor is, as transformers and Diffusers look for it."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    places = {name: file for file, shard in shards.items() for name in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _write_json(file: AnyPath, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def open_wan(path: str | AnyPath) -> Transformer:
    """Our file of a transformer, with `TensorRef` for arrays: nothing of it is read yet.

    Raises:
      UserError: it is absent, damaged, or not complete.
    """
    config = stored_config(model_folder.WAN, path)
    tensors, _ = list_tensors(part_file(model_folder.WAN, path))
    like: dict[str, Leaf] = flatten_dict(model_folder.shapes(model_folder.WAN, config), sep="/")
    wrong = {(name, array.shape) for name, array in tensors.items()} ^ {
        (name, array.shape) for name, array in like.items()
    }
    if wrong:
        raise UserError(
            f"{path} is not the transformer it says it is: see {min(wrong)[0]}; convert it again"
        )
    return Transformer(config, unflatten_dict(tensors, sep="/"))


def writers(
    network: Transformer, layout: Layout, dtype: DTypeLike | None
) -> dict[str, TensorWriter]:
    """Their name -> the array, in the order of the network."""
    flat: dict[str, Leaf] = flatten_dict(network.params, sep="/")
    config = network.config
    sizes = dict(zip(("pt", "ph", "pw"), config.patch_size, strict=True))
    found = {}
    for row in WAN:
        if row.ours not in flat:
            continue
        leaf, name, stacked = flat[row.ours], getattr(row, layout), row.ours.startswith("blocks/")
        ours, theirs = row.form.split(" -> ")[::-1]
        axes = sizes if "pt" in row.form else {}
        turn = partial(rearrange, pattern=f"{ours} -> {theirs}", **axes)
        shape = turn(
            np.broadcast_to(np.float32(0), leaf.shape[1:] if stacked else leaf.shape)
        ).shape
        for i in range(config.num_layers) if stacked else [None]:
            parts = partial(_turned, leaf, i, turn)
            place = (-1, row.ours) if i is None else (i, row.ours)
            found[place, name.format(i=i)] = TensorWriter(
                np.dtype(dtype or leaf.dtype), shape, parts
            )
    return {name: found[place, name] for place, name in sorted(found)}


def _turned(
    leaf: Stacked, i: int | None, turn: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    return [turn(layer_of(leaf, i))]


def layer_of(leaf: Stacked, i: int | None) -> np.ndarray:
    """One layer of a stacked array, or the array where i is None."""
    if isinstance(leaf, TensorRef):
        # anew for each layer: what was read of a layer stays in memory while its view lives
        return view(leaf) if i is None else layer(leaf, i)
    if i is None:
        return np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        return leaf[i]
    # one program for all layers
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False))


def stated_sizes(config: WanConfig, layout: Layout) -> dict[str, object]:
    """What the config.json of the release says, or that of Diffusers."""
    c = config
    if layout == "official":
        return {
            "_class_name": "WanModel", "model_type": "i2v" if c.image_dim else "t2v",
            "dim": c.dim, "eps": c.eps, "ffn_dim": c.ffn_dim, "freq_dim": c.freq_dim,
            "in_dim": c.in_channels, "num_heads": c.num_heads, "num_layers": c.num_layers,
            "out_dim": c.out_channels, "text_len": c.text_length,
        }  # fmt: skip
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": c.patch_size,
        "num_attention_heads": c.num_heads, "attention_head_dim": c.dim // c.num_heads,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "text_dim": c.text_dim,
        "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": c.eps,
        "image_dim": c.image_dim or None, "added_kv_proj_dim": c.dim if c.image_dim else None,
        "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip
