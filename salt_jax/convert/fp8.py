"""Floats of 8 bits: exact values in bfloat16, or in float32 where a scale stands beside them.

A scaled file has beside X.weight, of 8 bits, a tensor X.scale_weight (ComfyUI's first format,
musubi-tuner) or X.weight_scale (its second): the weight is their product. The scale is one number,
one for each row, or one for each block of a row [O, blocks, 1].
"""

import json
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from salt_jax.errors import UserError
from salt_jax.io.tensor_files import TensorRef, view

FP8 = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
SCALE = re.compile(r"(.+\.)(scale_weight|weight_scale)")
# Scales of activations, and marks that say what the numbers say themselves.
PASSED_OVER = re.compile(r"(.*[./])?(scaled_fp8|scale_input|input_scale|comfy_quant)")
PLAIN = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}


def split_scales(
    tensors: Mapping[str, TensorRef], metadata: Mapping[str, str], where: str
) -> tuple[dict[str, TensorRef], dict[str, TensorRef]]:
    """The tensors without what belongs to 8-bit numbers, and the scale of each weight by the
    weight's name.

    Raises:
      UserError: the file says that it is quantised in another way, or a weight with a scale is not
        of 8 bits.
    """
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        scale = SCALE.fullmatch(name)
        if scale:
            scales[f"{scale[1]}weight"] = tensor
        elif not PASSED_OVER.fullmatch(name):
            weights[name] = tensor
        elif name.endswith("comfy_quant"):
            _check_format(view(tensor).tobytes(), where, name)
    _check_format(metadata.get("_quantization_metadata", "").encode(), where, "its metadata")
    for name in scales:
        if name in weights and weights[name].dtype not in FP8:
            kind = weights[name].dtype
            raise UserError(
                f"{where} has a scale beside {name}, which is {kind}, no fp8; name another file"
            )
    return weights, scales


def fits(scale: TensorRef, shape: tuple[int, ...]) -> bool:
    """Whether a scale is of floats, and one for all of a weight, for each row or for each block of
    a row.
    """
    rows, *rest = shape or (1,)
    one = all(n == 1 for n in scale.shape)
    by_row = scale.shape[:1] == (rows,) and all(n == 1 for n in scale.shape[1:])
    by_block = len(shape) == 2 and len(scale.shape) == 3 and scale.shape[::2] == (rows, 1)
    floats = scale.dtype in map(np.dtype, (np.float32, np.float16, jnp.bfloat16, np.float64))
    return floats and (
        one or by_row or (by_block and scale.shape[1] > 0 and rest[0] % scale.shape[1] == 0)
    )


def rescaled(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [O, ...] of a weight and a scale that `fits`."""
    rows = weight.astype(np.float32).reshape(len(weight), scale.size // len(weight) or 1, -1)
    scale = scale.astype(np.float32).reshape(-1, max(scale.size // len(weight), 1), 1)
    return (rows * scale).reshape(weight.shape)


def _check_format(text: bytes, where: str, name: str) -> None:
    """ComfyUI tells the format of a layer as JSON in a tensor beside it, or of all layers in the
    metadata.
    """
    if not text:
        return
    try:
        read = json.loads(text)
        layers = list(read["layers"].values()) if "layers" in read else [read]
        other = [
            layer
            for layer in layers
            if not str(layer["format"]).startswith("float8_") or layer.keys() - PLAIN
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{where} tells in {name} an unknown kind of numbers; name another file"
        ) from error
    if other:
        raise UserError(
            f"{where} is quantised as {other[0]['format']}, as {name} says; name a file in float "
            "or fp8"
        )
