"""The transformer of ours -> files that the official code, diffusers and ComfyUI load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from salt_jax.convert.names import WAN
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.model_folder import part_file, stored_config
from salt_jax.io.tensor_files import (
    TensorRef,
    TensorWriter,
    all_or_nothing,
    list_tensors,
    view,
    write_tensors,
)
from salt_jax.models.presets import WanConfig
from salt_jax.models.wan import init_wan
from salt_jax.types import Params

Layout = Literal["official", "diffusers"]
NAME = "diffusion_pytorch_model"


def write_official(
    params: Params,
    config: WanConfig,
    dst: str | Path,
    layout: Layout,
    dtype: Any = None,
    max_shard: int = 5 * 10**9,
    report: Callable[[int], Any] = lambda nbytes: None,
    record: str = "",
) -> None:
    """Writes a transformer as safetensors with its config.json: in `dst`, or in `dst`/transformer
    for Diffusers.

    Args:
      params: of `init_wan`: arrays of jax or numpy, or `TensorRef` ones, of which one layer is in
        memory at a time.
      dtype: how to store it; None: as it is.
      max_shard: bytes; what is larger goes into several files with an index.
      report: gets the bytes of each array that was written.
      record: metadata of each file under the key salt_jax.

    Raises:
      UserError: there is such a model already, or the disk refuses; nothing is left then.
    """
    inner = "transformer" if layout == "diffusers" else "."
    there = sorted((Path(dst) / inner).glob(f"{NAME}*")) + sorted(
        (Path(dst) / inner).glob("config.json")
    )
    if there:
        raise UserError(
            f"{there[0]} exists, and the new files could be taken for parts of it; name an empty "
            "folder"
        )
    tensors = writers(params, config, layout, dtype)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards, size = shards + [{}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    several = len(shards) > 1
    weight_map, metadata = {}, {"format": "pt"} | ({"salt_jax": record} if record else {})
    with all_or_nothing(dst) as temporary:
        folder = temporary / inner
        folder.mkdir(exist_ok=True)
        for k, shard in enumerate(shards, 1):
            file = (
                f"{NAME}-{k:05d}-of-{len(shards):05d}.safetensors"
                if several
                else f"{NAME}.safetensors"
            )
            write_tensors(folder / file, shard, metadata, report)
            weight_map |= dict.fromkeys(shard, file)
        if several:
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (folder / f"{NAME}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )
        (folder / "config.json").write_text(json.dumps(_config(config, layout), indent=2) + "\n")


def open_wan(path: str | Path) -> tuple[WanConfig, Params]:
    """Our file of a transformer, with `TensorRef` for arrays: nothing of it is read yet.

    Raises:
      UserError: it is absent, damaged, or not complete.
    """
    config = stored_config(model_folder.WAN, path)
    tensors, _ = list_tensors(part_file(model_folder.WAN, path))
    like: Any = flatten_dict(jax.eval_shape(lambda: init_wan(jax.random.key(0), config)), sep="/")
    shapes = lambda arrays: {(name, array.shape) for name, array in arrays.items()}
    wrong = shapes(tensors) ^ shapes(like)
    if wrong:
        raise UserError(
            f"{path} is not the transformer it says it is: see {min(wrong)[0]}; convert it again"
        )
    return config, unflatten_dict(tensors, sep="/")


def writers(
    params: Params, config: WanConfig, layout: Layout, dtype: Any
) -> dict[str, TensorWriter]:
    """Their name -> the array, in the order of the network."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    sizes = dict(zip(("pt", "ph", "pw"), config.patch_size, strict=True))
    found = {}
    for row in WAN:
        if row.ours not in flat:
            continue
        leaf, name, stacked = flat[row.ours], getattr(row, layout), row.ours.startswith("blocks/")
        ours, theirs = row.form.split(" -> ")[::-1]
        axes = sizes if "pt" in row.form else {}
        turn = lambda array, form=f"{ours} -> {theirs}", axes=axes: rearrange(array, form, **axes)
        shape = turn(
            np.broadcast_to(np.float32(0), leaf.shape[1:] if stacked else leaf.shape)
        ).shape
        for i in range(config.num_layers) if stacked else [None]:
            part = lambda leaf=leaf, turn=turn, i=i: [turn(layer_of(leaf, i))]
            place = (-1, row.ours) if i is None else (i, row.ours)
            found[place, name.format(i=i)] = TensorWriter(
                np.dtype(dtype or leaf.dtype), shape, part
            )
    return {name: found[place, name] for place, name in sorted(found)}


def layer_of(leaf: Any, i: int | None) -> np.ndarray:
    """One layer of a stacked array, or the array where i is None."""
    if isinstance(leaf, TensorRef):
        leaf = view(
            leaf
        )  # anew for each layer: what was read of a layer stays in memory while its view lives
    if i is None:
        return np.asarray(leaf)
    if isinstance(leaf, np.ndarray):
        return leaf[i]
    # one program for all layers
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False))


def _config(config: WanConfig, layout: Layout) -> dict[str, Any]:
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
