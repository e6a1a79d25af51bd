"""From a prompt to a video: a network with its text encoder and decoder.

Parts are read when they are first needed: the text encoder, which is the largest of a text-to-video
model, is gone before the transformer comes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

import jax.numpy as jnp
import numpy as np

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path
from salt_jax.models.cache_policy import CachePolicy, refuse_overflow
from salt_jax.models.denoiser import CausalDenoiser, Cond, guided
from salt_jax.pipeline.live import Live, Made, Prompt, Prompts, as_switch, read_script, resume, save
from salt_jax.pipeline.parts import Parts, Video, decoded
from salt_jax.rollout.sampler import (
    Cue,
    generate,
    next_chunk,
    numbered_keys,
    on_device,
    read_prompt,
    start_session,
    whole_clips,
)
from salt_jax.rollout.settings import Sampler, Switch
from salt_jax.types import Conditioning, Denoiser, Params

READ_PROMPTS = 8  # of which keys and values are kept, and
EMBEDDED = 64  # embeddings


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
        self._texts: dict[str, np.ndarray] = {}

    @cached_property
    def params(self) -> Params:
        """Of the network; read once."""
        return self.parts.read_params()

    @property
    def fps(self) -> int:
        return self.parts.fps

    @property
    def pixels(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return self.shape[1] * self.parts.zoom, self.shape[2] * self.parts.zoom

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
        prompts: Prompts,
        *,
        memory: CachePolicy | None = None,
        num_steps: int | tuple[int, ...] | None = None,
        seed: int = 0,
        frames: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The frames of a video as they come, uint8 [t, H, W, 3] each, chunk by chunk.

        The next chunk is on its way before the frames of one are waited for.

        Args:
          prompts: one; or those by the latent frame from which they hold, where 0 must be there and
            the others begin a chunk; or what is asked for the prompt of each chunk, with its first
            latent frame.
          memory: what a chunk sees, in place of what the model was trained with.
          num_steps: as in `generate`.
          frames: of the video; None: a video without end, in constant memory, if the memory
            forgets, and otherwise a usual clip behind the last prompt.

        Raises:
          ValueError: a prompt is not at the start of a chunk, or the video does not fit the memory;
            also under way, at the end of absolute positions.
          UserError: the model makes whole clips.
        """
        policy = self._causal(memory)
        length = None if frames is None else self.parts.frames_of(frames)
        script = read_script(prompts, policy, length, self.shape[0])
        self.embed(script.known)
        asked, length = script.asked, script.frames
        first = as_switch(asked(0) or "").prompt
        shape = (length or self.shape[0], *self.shape[1:])
        live = self.begin(first, memory=policy, num_steps=num_steps, seed=seed, shape=shape)
        refuse_overflow(policy, live.session.cache.slots, length or 0)
        return (self.parts.to_bytes(made.decoded) for made in self.chunks(live, asked, length))

    def chunks(
        self, live: Live, asked: Callable[[int], Prompt | None], frames: int | None
    ) -> Iterator[Made]:
        """What comes next in a video, which is given up; each chunk when the one after it is under
        way.

        Args:
          asked: for what changes at each chunk, with its first latent frame.
          frames: latent frames of the whole video; None: it has no end.
        """
        before = None
        while frames is None or live.frames < frames:
            made, live = self.advance(live, asked(live.frames))
            if before:
                yield before
            before = made
        if before:
            yield before

    def begin(
        self,
        prompt: str,
        *,
        memory: CachePolicy | None = None,
        num_steps: int | tuple[int, ...] | None = None,
        seed: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> Live:
        """A video without frames yet, for `advance`.

        Args:
          shape: (F, H, W, C) of latents; F has an effect where the memory forgets nothing, and
            holds so many. None: that of a usual clip.

        Raises:
          ValueError: the model does not make that many steps.
          UserError: it makes whole clips.
        """
        sampler = self._sampler(num_steps, self._causal(memory))
        self.embed([prompt])  # before the network's parameters come
        shape = shape or self.shape
        keys = numbered_keys(seed, np.array([0]))
        network = self._guided[0]
        assert isinstance(network, CausalDenoiser), "a formula has no cache"
        session = start_session(sampler, network, keys, shape)
        return Live(sampler, session, None, prompt, seed)

    def save(self, live: Live, file: str | AnyPath) -> None:
        """Writes a video under way, to go on with it another day. It stays as it is."""
        save(live, self.parts, as_path(file))

    def resume(self, file: str | AnyPath) -> Live:
        """What `save` wrote: it goes on bit for bit as it would have.

        Raises:
          UserError: the file is absent or damaged, or of another network.
        """
        return resume(self.parts, self.shape[1:], as_path(file))

    def advance(self, live: Live, prompt: Prompt | None = None) -> tuple[Made, Live]:
        """The next chunk of a video, and the video with it; nothing is waited for.

        Args:
          live: is given up; `live.fork` keeps a copy.
          prompt: from this chunk on; None: the one before.

        Raises:
          ValueError: the memory or its positions have no room for another chunk.
        """
        sampler, session, network = live.sampler, live.session, self._guided[0]
        policy, at = sampler.memory, live.frames
        assert policy and isinstance(network, CausalDenoiser)
        size = policy.chunk if at else policy.first
        refuse_overflow(policy, session.cache.slots, at + size)
        switch = as_switch(live.prompt if prompt is None else prompt)
        now, cue = switch.prompt, None
        if at and (now != live.prompt or switch.flush or switch.cut):
            cue = Cue(self.read(now), switch.flush, switch.cut)
        if not cue:  # what a video begins with, or a resumed one goes on with
            session = session._replace(cond=self.read(now))
        x0, session = next_chunk(sampler, network, self._guided[1], session, cue)
        frames, decoder = self.parts.decode(live.decoder, x0)
        made = Made(x0, frames, at, now)
        return made, live._replace(session=session, decoder=decoder, prompt=now)

    @cached_property
    def read(self) -> Callable[[str], Cond]:
        """A prompt's keys and values in every layer; those of the last ones are kept."""

        def read(prompt: str) -> Cond:
            cond = Conditioning(self.embed([prompt])[prompt])
            return read_prompt(*self._guided, on_device(cond))

        return lru_cache(READ_PROMPTS)(read)

    @cached_property
    def _guided(self) -> tuple[Denoiser, Params]:
        null = jnp.asarray(self.embed([])[self.parts.negative])
        return guided(self.parts.network, self.params, null, self.guidance)

    def embed(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """As `read_texts`; the text encoder is read for new prompts alone."""
        wanted = dict.fromkeys([*prompts, self.parts.negative])
        found = {prompt: self._texts[prompt] for prompt in wanted if prompt in self._texts}
        if new := [prompt for prompt in wanted if prompt not in found]:
            found |= self.parts.read_texts(new)
        self._texts = dict(list((self._texts | found).items())[-EMBEDDED:])
        return found

    def _causal(self, memory: CachePolicy | None) -> CachePolicy:
        if self.sampler.memory is None:
            raise UserError(f"{self.parts.source} makes whole clips; call generate")
        return memory or self.sampler.memory

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
        return decoded(self.parts, self.latents(video, self.read_texts(prompts)))

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
