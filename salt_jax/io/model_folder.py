"""A folder of converted weights (launch.convert_wan), opened part by part, or the same parts small
and random.

A part is a network with its file. Parts are read when they are needed, so that the text encoder,
which is the largest of a text-to-video model, can be gone before the transformer comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.io.header import stored_sizes
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import load_weights
from salt_jax.io.tokenizer import byte_tokenize, load_tokenizer
from salt_jax.models import image_encoder, presets, text_encoder, vae
from salt_jax.models.image_encoder import ImageEncoderConfig, init_image_encoder
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import TextEncoderConfig, encode_prompts, init_text_encoder
from salt_jax.models.vae import VAEConfig, init_vae
from salt_jax.models.wan import init_wan
from salt_jax.types import Params, PRNGKey

TOKENIZERS = ("tokenizer.json", "spiece.model")


Sizes = WanConfig | VAEConfig | TextEncoderConfig | ImageEncoderConfig
"""The sizes of a network."""

C = TypeVar("C", bound=Sizes)


@dataclass(frozen=True)
class Part(Generic[C]):
    """A network that a model consists of."""

    file: str
    init: Callable[[PRNGKey, C], Params]  # (key, sizes) -> parameters
    tiny: C  # the sizes of a random part; those in a file are of the same class


WAN = Part("wan.safetensors", init_wan, presets.PRESETS["wan2.1-t2v-tiny"])
CRITIC = Part("critic.safetensors", init_wan, WAN.tiny)  # of a distillation, beside its student
VAE = Part("vae.safetensors", init_vae, vae.PRESETS["tiny"])
TEXT = Part("text_encoder.safetensors", init_text_encoder, text_encoder.PRESETS["wan-tiny"])
IMAGE = Part("image_encoder.safetensors", init_image_encoder, image_encoder.PRESETS["tiny"])


class Source(NamedTuple):
    """Where the parts of a model come from."""

    folder: str  # of launch.convert_wan; "" stands for small parts with random weights
    seed: int = 0  # of random weights


def part_file(part: Part, where: str | AnyPath) -> AnyPath:
    """The file of a part in a folder.

    Where a transformer's file is named instead: that one, or beside it.
    """
    path = located(where)
    return path / part.file if path.is_dir() else path if part is WAN else path.with_name(part.file)


def stored_config(part: Part[C], where: str | AnyPath) -> C:
    """The sizes that a file was written with.

    Raises UserError: it is absent or says nothing about itself.
    """
    return stored_sizes(part_file(part, where), type(part.tiny))


def shapes(part: Part[C], config: C) -> Params:
    """The parameters of a part as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: part.init(jax.random.key(0), config))


def open_part(
    part: Part[C],
    source: Source,
    config: C | None = None,
    dtype: DTypeLike | None = None,
    shardings: Callable[[Params], Params] | None = None,
) -> tuple[C, Params]:
    """The sizes and the parameters of a part.

    Args:
      config: the sizes of a random part, where they are not `part.tiny`.
      dtype: of the parameters; None: as stored.
      shardings: tree of shapes -> tree of shardings: every device gets its slice alone.

    Raises:
      UserError: the file is absent, damaged or of another network.
    """
    config = stored_config(part, source.folder) if source.folder else config or part.tiny
    like = shapes(part, config)
    placed = shardings(like) if shardings else None
    if not source.folder:
        make = lambda: part.init(jax.random.key(source.seed), config)
        return config, jax.jit(make, out_shardings=placed)()
    return config, load_weights(part_file(part, source.folder), like, dtype, placed)


def tokenizer_files(source: Source) -> list[AnyPath]:
    """Those that the folder has, the one that is read first."""
    if not source.folder:
        return []
    folder = as_path(source.folder)
    paths = ((folder if folder.is_dir() else folder.parent) / name for name in TOKENIZERS)
    return [path for path in paths if path.is_file()]


def open_tokenizer(source: Source) -> Callable[[str, int], np.ndarray]:
    """(text, length) -> token ids, int32 [length].

    Raises:
      UserError: the folder has no tokenizer, or it cannot be read.
    """
    if not source.folder:
        return byte_tokenize
    found = tokenizer_files(source)
    if not found:
        raise UserError(
            f"{source.folder} has no {' or '.join(TOKENIZERS)}; copy umT5's there (google/umt5-xxl "
            "of the release)"
        )
    try:
        return load_tokenizer(found[0])
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error


def embed_prompts(
    tokenize: Callable[[str, int], np.ndarray],
    open_encoder: Callable[[], tuple[TextEncoderConfig, Params]],
    prompts: Sequence[str],
    length: int,
    dtype: DTypeLike,
) -> np.ndarray:
    """Prompts as float32 [N, length, D], rows past a prompt's end zero.

    One by one, so that the bits of one do not depend on the others. The encoder is opened when all
    prompts have been found to fit.

    Raises:
      UserError: a prompt does not fit.
    """
    try:
        tokens = np.stack([tokenize(prompt, length) for prompt in prompts])
    except ValueError as error:
        raise UserError(str(error)) from error
    config, params = open_encoder()
    rows = [
        encode_prompts(params, t[None], config, dtype=dtype)[0]
        for t in tqdm(tokens, desc="prompts", delay=2)
    ]
    return np.stack([np.asarray(row, np.float32) for row in rows])
