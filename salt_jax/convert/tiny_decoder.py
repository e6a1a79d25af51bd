"""TAEHV's decoder of Wan 2.1's latents, from a file as its author publishes it.

Its networks are lists of layers, and arrays have the numbers of these in their names. The encoder
that lies in the same file is not read.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from salt_jax.convert.files import open_tensors
from salt_jax.convert.names import CONV2, SAME
from salt_jax.convert.reading import FLOATS
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.tensor_files import view
from salt_jax.models.tiny_decoder import WIDTHS, decoder_shapes
from salt_jax.types import Leaf, Params

CHANNELS = 16  # of a latent
KINDS = {"kernel": ("weight", CONV2), "bias": ("bias", SAME)}  # theirs, and the form of ours


def read_tiny_decoder(file: str | AnyPath) -> Params:
    """The parameters for `models.tiny_decoder.decode_tiny`, float32.

    Args:
      file: taew2_1.pth or taew2_1.safetensors of github.com/madebyollin/taehv.

    Raises:
      UserError: it is absent or damaged, or its decoder has other arrays; the first is named.
    """
    found = {
        name: tensor
        for name, tensor in open_tensors([as_path(file)]).tensors.items()
        if not name.startswith("encoder.")
    }
    like: dict[str, Leaf] = flatten_dict(decoder_shapes(WIDTHS, CHANNELS), sep="/")
    ours = {_their_name(path): path for path in like}
    for name in sorted({*found, *ours}):
        there = found[name].shape if name in found else "absent"
        wanted = _their_shape(like[ours[name]].shape) if name in ours else "absent"
        if there == wanted and found[name].dtype not in FLOATS:
            there, wanted = found[name].dtype, "floating point"
        if there != wanted:
            raise UserError(
                f"{file} is not the tiny decoder of Wan 2.1: {name} is {there}, expected {wanted}; "
                "name taew2_1.pth or taew2_1.safetensors of github.com/madebyollin/taehv"
            )
    arrays = {
        path: rearrange(np.array(view(found[name]), np.float32), KINDS[path.split("/")[-1]][1])
        for name, path in ours.items()
    }
    return unflatten_dict({path: jnp.asarray(array) for path, array in arrays.items()}, sep="/")


def _their_name(path: str) -> str:
    """Where one of our arrays stands in the file.

    Layers 0 to 2 are bounds, a convolution and ReLU; a level is three blocks, enlarging, growing
    and a convolution; ReLU and a convolution are the end. A block's convolutions have ReLU between
    them.
    """
    match path.split("/"):
        case ["conv_in", kind]:
            layer = "1"
        case ["conv_out", kind]:
            layer = "22"
        case ["up", level, "blocks", block, conv, kind]:
            layer = f"{3 + 6 * int(level) + int(block)}.conv.{2 * int(conv[-1]) - 2}"
        case ["up", level, "grow", kind]:
            layer = f"{7 + 6 * int(level)}.conv"
        case ["up", level, _, kind]:
            layer = f"{8 + 6 * int(level)}"
        case _:
            raise ValueError(path)
    return f"decoder.{layer}.{KINDS[kind][0]}"


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape
