"""Our LoRA -> files that Diffusers and ComfyUI load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError

from salt_jax.convert.lora_scale import DIFFUSERS
from salt_jax.convert.names import WAN
from salt_jax.convert.writing import layer_of
from salt_jax.errors import UserError
from salt_jax.io.tensor_files import TensorWriter, all_or_nothing, list_tensors, write_tensors
from salt_jax.types import Params

FILES = {"diffusers": "pytorch_lora_weights.safetensors", "comfyui": "lora.safetensors"}


def write_lora(
    params: Params,
    rank: int,
    alpha: float,
    dst: str | Path,
    layout: Literal["diffusers", "comfyui"],
    dtype: Any = None,
    record: str = "",
    report: Callable[[int], Any] = lambda nbytes: None,
) -> Path:
    """Writes a LoRA of `models.lora` as one safetensors file in `dst`, and returns its name.

    For Diffusers the metadata tells alpha, as its own load_lora_adapter reads it; for ComfyUI a
    tensor of each module.

    Args:
      params: arrays of jax or numpy, or `TensorRef` ones.
      dtype: how to store it; None: as it is.
      record: metadata under the key salt_jax.

    Raises:
      UserError: there is such a file already, or the disk refuses; nothing is left then.
    """
    file = Path(dst) / FILES[layout]
    if file.exists():
        raise UserError(f"{file} exists; name another folder")
    tensors: dict[str, TensorWriter] = {}
    modules = []
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for row in WAN:
        if f"{row.ours}/lora_a" not in flat:
            continue
        for i in range(flat[f"{row.ours}/lora_a"].shape[0]):
            name = (
                (row.diffusers if layout == "diffusers" else row.official)
                .format(i=i)
                .removesuffix(".weight")
            )
            modules.append(name)
            for ab, theirs, comfy in (
                ("lora_a", "lora_A", "lora_down"),
                ("lora_b", "lora_B", "lora_up"),
            ):
                leaf = flat[f"{row.ours}/{ab}"]
                full = (
                    f"transformer.{name}.{theirs}"
                    if layout == "diffusers"
                    else f"diffusion_model.{name}.{comfy}"
                )
                part = lambda leaf=leaf, i=i: [layer_of(leaf, i).T]
                tensors[f"{full}.weight"] = TensorWriter(
                    np.dtype(dtype or leaf.dtype), leaf.shape[:0:-1], part
                )
            if layout == "comfyui":
                part = lambda: [np.array(alpha, np.float32)]
                tensors[f"diffusion_model.{name}.alpha"] = TensorWriter(
                    np.dtype(np.float32), (), part
                )
    metadata = {"format": "pt"} | ({"salt_jax": record} if record else {})
    if layout == "diffusers":
        adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules}
        metadata[DIFFUSERS] = json.dumps(
            {f"transformer.{key}": value for key, value in adapter.items()}
        )
    with all_or_nothing(dst) as folder:
        write_tensors(folder / file.name, tensors, metadata, report)
    return file


def open_lora(path: str | Path) -> tuple[Params, int, float] | None:
    """Our file of a LoRA, with `TensorRef` for arrays, its rank and alpha.

    None: it is another file, or none.
    """
    try:
        tensors, metadata = list_tensors(path)
        config = json.loads(metadata["config"])
        rank, alpha = int(config["rank"]), float(config["alpha"])
    except (OSError, SafetensorError, ValueError, TypeError, LookupError):
        return None
    return unflatten_dict(tensors, sep="/"), rank, alpha
