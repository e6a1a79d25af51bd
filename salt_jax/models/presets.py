"""The sizes of transformer and text encoder, and how to run them.

No jax in here, as in `choices`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from salt_jax.errors import UserError


@dataclass(frozen=True)
class WanConfig:
    """Architecture. Widths in features, lengths in tokens."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]  # frames, rows, columns of latent per token
    text_dim: int
    text_length: int  # rows of text that cross attention sees, padding included
    freq_dim: int  # width of the sinusoidal time embedding
    # features of the image encoder that image-to-video models read; 0: text to video
    image_dim: int
    eps: float

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Behind the noisy latent of image-to-video models: which pixel frames are known, and their
        latent.
        """
        return 4 + self.out_channels if self.image_dim else 0

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim={self.dim} must split into num_heads={self.num_heads} heads of even width"
            )


def _wan(dim, heads, layers, ffn, image_dim=0, text_dim=4096, freq_dim=256):
    channels = 36 if image_dim else 16
    return WanConfig(
        dim, heads, layers, ffn, channels, 16, (1, 2, 2), text_dim, 512, freq_dim, image_dim, 1e-6
    )


PRESETS = {
    # Moving Shapes: few wide tokens (6 x 6 pixels each) learn shape in minutes on two cores. 3
    # channels of colour and 16 of position in, see models.denoiser.
    "tiny": WanConfig(192, 4, 4, 768, 19, 3, (1, 6, 6), 64, 32, 64, 0, 1e-6),
    "small": WanConfig(384, 6, 8, 1536, 19, 3, (1, 4, 4), 64, 80, 128, 0, 1e-6),
    # Its long world, 16 tokens a frame. Nothing but rotary positions tells a token where it is: in
    # an endless video neither frames nor places differ.
    "long": WanConfig(192, 4, 4, 768, 18, 18, (1, 3, 3), 64, 32, 64, 0, 1e-6),
    "wan2.1-t2v-1.3b": _wan(1536, 12, 30, 8960),
    "wan2.1-t2v-14b": _wan(5120, 40, 40, 13824),
    "wan2.1-i2v-14b": _wan(5120, 40, 40, 13824, 1280),
    # Wide enough that products take most of the time, and a CPU runs it in a second: see
    # `launch.bench --peer`.
    "wan2.1-t2v-small": _wan(768, 6, 6, 3072, text_dim=32),
    # Wan's channels, patches and text length, and little else: every program runs on a CPU in
    # seconds.
    "wan2.1-t2v-tiny": _wan(48, 2, 2, 96, text_dim=32, freq_dim=64),
    "wan2.1-i2v-tiny": _wan(48, 2, 2, 96, image_dim=40, text_dim=32, freq_dim=64),
}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the encoder. The last three are the same for every published umT5."""

    vocab_size: int  # rows of the token table
    dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_buckets: int = 32  # of relative positions, half for each side
    max_distance: int = 128  # tokens; farther ones share the last bucket
    eps: float = 1e-6  # of the RMS norms


TEXT_PRESETS = {
    "tiny": TextEncoderConfig(
        vocab_size=259, dim=64, num_layers=2, num_heads=4, head_dim=16, ffn_dim=128
    ),
    "wan-tiny": TextEncoderConfig(
        vocab_size=259, dim=32, num_layers=2, num_heads=4, head_dim=8, ffn_dim=64
    ),
    "umt5-xxl": TextEncoderConfig(
        vocab_size=256_384, dim=4096, num_layers=24, num_heads=64, head_dim=64, ffn_dim=10_240
    ),
}
"""`tiny` and `wan-tiny` read the bytes of `tokenizer.byte_tokenize`; `umt5-xxl` is the encoder of
Wan 2.1.
"""


def tiny_preset(model: str) -> str:
    """The small preset with the architecture of a real one.

    Raises:
      UserError: there is none.
    """
    name = f"{model.rsplit('-', 1)[0]}-tiny"
    if name not in PRESETS:
        raise UserError(
            f"there is no small {model}; choose from {', '.join(p for p in PRESETS if 'wan' in p)}"
        )
    return name


# What a block's backward pass finds: everything; its input alone; that and what attention made;
# that and all matrix products, or those with weights; its input in the host's memory.
Remat = Literal["none", "all", "save_attention", "dots", "dots_no_batch", "offload"]
Kernel = Literal["plain", "blocks", "cudnn", "splash"]  # see models.attention
KernelChoice = Literal["auto", "plain", "blocks", "cudnn", "splash"]


@dataclass(frozen=True)
class Compute:
    """How to run the network, which changes speed and rounding but not the function."""

    dtype: np.dtype | type = np.float32  # of matrix products
    remat: Remat = "none"  # what of a block is kept for the backward pass, see models.remat
    # of the tokens between two blocks, whose inputs are what "all" keeps
    residual: np.dtype | type = np.float32
    kernel: Kernel = "blocks"  # of attention
    # Mesh of the sharding constraints on tokens and attention, a jax.sharding.Mesh, which nothing
    # in here may name. None: XLA decides, and under fsdp may replicate the batch.
    mesh: Any = None
