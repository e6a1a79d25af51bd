"""From a prompt to a video: a network with its text encoder and decoder.

Parts are read when they are first needed: the text encoder, which is the largest of a text-to-video
model, is gone before the transformer comes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from salt_jax.errors import UserError
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import WanDenoiser, guided
from salt_jax.rollout.sampler import Cue, generate, numbered_keys, whole_clips
from salt_jax.rollout.settings import Sampler, Switch
from salt_jax.types import Conditioning, Params


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
    # latent chunks [1, f, H, W, C] -> uint8 [t, H, W, 3], as they come
    decode: Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]
    frames_of: Callable[[int], int]  # latent frames of a video of so many frames
    negative: str  # what guidance leads away from
    fps: int


class Model:
    """A network that makes videos of prompts; `salt_jax.load` opens one.

    Args:
      sampler: what it does where a call says nothing else.
      shape: (F, H, W, C) of a usual latent clip.
      guidance: scale w of u + w (c - u); 1 is none.
    """

    def __init__(
        self, parts: Parts, sampler: Sampler, shape: tuple[int, ...], guidance: float = 1.0
    ):
        self.parts, self.sampler, self.shape, self.guidance = parts, sampler, shape, guidance

    @cached_property
    def params(self) -> Params:
        """Of the network; read once."""
        return self.parts.read_params()

    @property
    def fps(self) -> int:
        return self.parts.fps

    def generate(
        self,
        prompt: str,
        *,
        num_steps: int | tuple[int, ...] | None = None,
        seed: int = 0,
        frames: int | None = None,
        image: np.ndarray | None = None,
    ) -> np.ndarray:
        """A video, uint8 [F, H, W, 3].

        Args:
          num_steps: network evaluations, of the clip or of each chunk; or (of the first chunk, of
            each other one).
          seed: the same seed gives the same video on the same machine.
          frames: of the video; of Wan 4k + 1.
          image: the first frame, uint8 [H, W, 3], for models that read it or begin with one frame.

        Raises:
          ValueError: the model does not make that many steps or frames.
        """
        sampler = self._sampler(num_steps, self.sampler.memory)
        video = self._video({0: Switch(prompt)}, sampler, seed, frames)
        if image is not None:
            given = self.parts.read_given(image, video.shape, sampler.memory is not None)
            video = video._replace(given=given)
        return np.concatenate(list(self._pixels(video)))

    def stream(
        self,
        prompts: str | Mapping[int, str],
        *,
        memory: CachePolicy | None = None,
        num_steps: int | tuple[int, ...] | None = None,
        seed: int = 0,
        frames: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The frames of a video as they come, uint8 [t, H, W, 3] each, chunk by chunk.

        Args:
          prompts: one, or the prompts by the latent frame from which they hold; 0 must be there,
            and the others begin a chunk.
          memory: what a chunk sees, in place of what the model was trained with.
          num_steps: as in `generate`.
          frames: of the video; None: as far as the last prompt, and at least a usual clip.

        Raises:
          ValueError: a prompt is not at the start of a chunk, or the video does not fit the memory.
          UserError: the model makes whole clips.
        """
        if self.sampler.memory is None:
            raise UserError(f"{self.parts.source} makes whole clips; call generate")
        cues = {0: prompts} if isinstance(prompts, str) else prompts
        switches = {frame: Switch(prompt) for frame, prompt in cues.items()}
        sampler = self._sampler(num_steps, memory or self.sampler.memory)
        video = self._video(switches, sampler, seed, frames)
        last = max(switches)
        if frames is None and last >= video.shape[0] and sampler.memory:
            # a usual clip behind the last prompt
            length = sampler.memory.nearest(last + video.shape[0])[0]
            video = video._replace(shape=(length, *video.shape[1:]))
        return self._pixels(video)

    def _sampler(
        self, num_steps: int | tuple[int, ...] | None, memory: CachePolicy | None
    ) -> Sampler:
        sampler = self.sampler._replace(memory=memory)
        if num_steps is None:
            return sampler
        *first, rest = num_steps if isinstance(num_steps, tuple) else (num_steps,)
        if len(first) > bool(memory):
            raise ValueError(
                f"num_steps={num_steps} must be one number, or of a model that works chunk by "
                "chunk two: of the first chunk, and of each other one"
            )
        if sampler.levels and {*first, rest} != {len(sampler.levels)}:
            raise ValueError(f"this student was trained at the levels {sampler.levels} alone")
        return sampler._replace(
            num_steps=rest, first_steps=first[0] if first else sampler.first_steps
        )

    def _video(
        self, switches: Mapping[int, Switch], sampler: Sampler, seed: int, frames: int | None
    ) -> Video:
        length = self.shape[0] if frames is None else self.parts.frames_of(frames)
        return Video(switches, sampler, (length, *self.shape[1:]), seed)

    def _pixels(self, video: Video) -> Iterator[np.ndarray]:
        prompts = [switch.prompt for switch in video.switches.values()]
        return self.parts.decode(self.latents(video, self.read_texts(prompts)))

    def read_texts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeddings of prompts, and of what guidance leads away from, float32 [1, T, D] each."""
        return self.parts.read_texts(list(dict.fromkeys([*prompts, self.parts.negative])))

    def latents(
        self,
        video: Video,
        texts: Mapping[str, np.ndarray],
        report: Callable[[], object] = lambda: None,
    ) -> Iterator[np.ndarray]:
        """One video, float32 [1, f, H, W, C], whole or chunk by chunk.

        Args:
          texts: of `read_texts`.
          report: is called after each step of a stepwise sampler.
        """
        sampler, shape, (image, latents) = video.sampler, video.shape, video.given
        cues = {
            frame: Cue(Conditioning(texts[s.prompt], *(image or ())), s.flush, s.cut)
            for frame, s in video.switches.items()
        }
        keys = numbered_keys(video.seed, np.array([video.number]))
        null_text = jnp.asarray(texts[self.parts.negative])
        network, params = guided(self.parts.network, self.params, null_text, self.guidance)
        if sampler.memory is None:
            yield whole_clips(sampler, network, params, cues[0].cond, keys, shape, report)
        else:
            yield from generate(sampler, network, params, cues, keys, shape, latents)
