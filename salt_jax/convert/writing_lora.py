"""Our LoRA -> files that Diffusers and ComfyUI load."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError

from salt_jax.convert.lora_scale import DIFFUSERS
from salt_jax.convert.names import WAN
from salt_jax.convert.writing import Stacked, layer_of, metadata
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, all_or_nothing, as_path
from salt_jax.io.tensor_files import (
    Report,
    TensorWriter,
    list_tensors,
    no_report,
    write_tensors,
)
from salt_jax.types import Leaf, Params

Layout = Literal["diffusers", "comfyui"]
FILES = {"diffusers": "pytorch_lora_weights.safetensors", "comfyui": "lora.safetensors"}
PREFIXES = {"diffusers": "transformer", "comfyui": "diffusion_model"}
FACTORS = {"diffusers": ("lora_A", "lora_B"), "comfyui": ("lora_down", "lora_up")}


class LowRank(NamedTuple):
    """A LoRA of ours."""

    params: Params  # of `models.lora`: arrays of jax or numpy, or `TensorRef` ones
    rank: int
    alpha: float


def write_lora(
    lora: LowRank,
    dst: str | AnyPath,
    layout: Layout,
    dtype: DTypeLike | None = None,
    record: str = "",
    report: Report = no_report,
) -> AnyPath:
    """Writes a LoRA as one safetensors file in `dst`, and returns its name.

    For Diffusers the metadata tells alpha, as its own load_lora_adapter reads it; for ComfyUI a
    tensor of each module.

    Args:
      dtype: how to store it; None: as it is.
      record: metadata under the key salt_jax.

    Raises:
      UserError: there is such a file already, or the disk refuses; nothing is left then.
    """
    file = as_path(dst) / FILES[layout]
    if file.exists():
        raise UserError(f"{file} exists; name another folder")
    modules, written = _modules(lora.params, layout), metadata(record)
    if layout == "diffusers":
        config = {
            "peft_type": "LORA",
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(modules),
        }
        written[DIFFUSERS] = json.dumps(
            {f"transformer.{key}": value for key, value in config.items()}
        )
    with all_or_nothing(as_path(dst)) as folder:
        write_tensors(
            folder / file.name, _writers(modules, lora.alpha, layout, dtype), written, report
        )
    return file


class Factors(NamedTuple):
    """Of one matrix of one layer."""

    a: Stacked
    b: Stacked
    layer: int


def _modules(params: Params, layout: Layout) -> dict[str, Factors]:
    """Their name of each adapted matrix -> its factors, in the order of the network."""
    flat: dict[str, Leaf] = flatten_dict(params, sep="/")
    modules = {}
    for row in WAN:
        if f"{row.ours}/lora_a" not in flat:
            continue
        a, b = flat[f"{row.ours}/lora_a"], flat[f"{row.ours}/lora_b"]
        theirs = row.diffusers if layout == "diffusers" else row.official
        for i in range(a.shape[0]):
            modules[theirs.format(i=i).removesuffix(".weight")] = Factors(a, b, i)
    return modules


def _writers(
    modules: Mapping[str, Factors], alpha: float, layout: Layout, dtype: DTypeLike | None
) -> dict[str, TensorWriter]:
    """Their names -> the tensors; of ComfyUI with the alpha of each module."""
    front, names = PREFIXES[layout], FACTORS[layout]
    tensors = {}
    for module, (a, b, i) in modules.items():
        for name, leaf in zip(names, (a, b), strict=True):
            tensors[f"{front}.{module}.{name}.weight"] = TensorWriter(
                np.dtype(dtype or leaf.dtype), leaf.shape[:0:-1], partial(_transposed, leaf, i)
            )
        if layout == "comfyui":
            tensors[f"{front}.{module}.alpha"] = TensorWriter(
                np.dtype(np.float32), (), lambda: [np.array(alpha, np.float32)]
            )
    return tensors


def _transposed(leaf: Stacked, i: int) -> list[np.ndarray]:
    return [layer_of(leaf, i).T]


def open_lora(path: str | AnyPath) -> LowRank | None:
    """Our file of a LoRA, with `TensorRef` for arrays.

    None: it is another file, or none.
    """
    try:
        tensors, said = list_tensors(path)
        config = json.loads(said["config"])
        rank, alpha = int(config["rank"]), float(config["alpha"])
    except (OSError, SafetensorError, ValueError, TypeError, LookupError):
        return None
    return LowRank(unflatten_dict(tensors, sep="/"), rank, alpha)
