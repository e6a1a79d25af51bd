"""A network with its text encoder and decoder, and the video that is asked of them, as values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.settings import Sampler, Switch
from salt_jax.types import Params


class Given(NamedTuple):
    """What a video begins with: the conditioning on a picture, or frames to continue."""

    # `Conditioning.image`, `Conditioning.channels`
    image: tuple[Array | np.ndarray, Array | np.ndarray] | None = None
    latents: np.ndarray | None = None  # [1, f, H, W, C]


class Video(NamedTuple):
    """One video to make."""

    switches: Mapping[int, Switch]  # prompts, by the latent frame from which they hold
    sampler: Sampler
    shape: tuple[int, ...]  # (F, H, W, C) of its latents
    seed: int = 0
    number: int = 0  # among the clips of a seed
    given: Given = Given()


Decoded = tuple[Array, ...]
"""Frames that follow each other, as a decoder leaves them on its device."""

Decode = Callable[[Params | None, Array], tuple[Decoded, Params | None]]
"""(What the decoder remembers of a video, None before its first latents; the next [1, f, H, W, C])
-> (their frames, not waited for; what it remembers then). The memory is given up.
"""


class Parts(NamedTuple):
    """A network with its text encoder and decoder. Weights are read on first use."""

    source: str  # of the network, as the user names it
    made_with: dict[str, object]  # digests of all that is read, and what else decides the pixels
    network: WanDenoiser
    read_params: Callable[[], Params]
    # float32 [1, T, D] each; the text encoder is in memory only meanwhile
    read_texts: Callable[[Sequence[str]], dict[str, np.ndarray]]
    # (a picture or clip, uint8 [H, W, 3] or [T, H, W, 3], latent shape, whether chunk by chunk)
    read_given: Callable[[np.ndarray, tuple[int, ...], bool], Given]
    decode: Decode
    to_bytes: Callable[[Decoded], np.ndarray]  # uint8 [t, H, W, 3]
    whole: bool  # whether `decode` must be given all of a video at once
    frames_of: Callable[[int], int]  # latent frames of a video of so many frames, and
    shown: Callable[[int], int]  # the other way
    learnt: Callable[[str], bool]  # whether the text encoder has seen such a prompt
    examples: tuple[str, ...]  # of prompts
    negative: str  # what guidance leads away from
    fps: int
    zoom: int  # rows of a frame to a latent row


def decoded(parts: Parts, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Latent chunks of a video, [1, f, H, W, C] each -> its frames, uint8 [t, H, W, 3], as they
    come.
    """
    memory = None
    for chunk in [np.concatenate(list(chunks), axis=1)] if parts.whole else chunks:
        frames, memory = parts.decode(memory, jnp.asarray(chunk))
        yield parts.to_bytes(frames)
