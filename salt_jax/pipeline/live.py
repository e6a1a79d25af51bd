"""A video under way, as a value: a copy of it, a file of it, and back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath
from salt_jax.io.header import read_header
from salt_jax.io.tensor_files import TensorWriter, load_weights, write_tensors
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.kv_cache import KVCache
from salt_jax.pipeline.parts import Decoded, Parts
from salt_jax.rollout.sampler import Session, numbered_keys, refuse_cues
from salt_jax.rollout.settings import Sampler, Switch
from salt_jax.types import Params

Prompt = str | Switch
Prompts = str | Mapping[int, Prompt] | Callable[[int], str]


class Live(NamedTuple):
    """A video under way. Its next chunk is a function of this and of a prompt."""

    sampler: Sampler
    session: Session
    decoder: Params | None  # what the decoder remembers
    prompt: str
    seed: int

    @property
    def frames(self) -> int:
        """Latent frames made so far."""
        return self.session.frames


class Made(NamedTuple):
    """A chunk on its way: nothing of it has been waited for."""

    latents: jax.Array  # float32 [1, f, H, W, C]
    decoded: Decoded
    at: int  # its first latent frame
    prompt: str


class Script(NamedTuple):
    """Which prompts a video gets."""

    asked: Callable[[int], Prompt | None]  # by the first latent frame of a chunk; None: as before
    known: list[str]  # beforehand
    frames: int | None  # latent frames of the video; None: it has no end


def as_switch(prompt: Prompt) -> Switch:
    """A prompt, or what also says how a video turns to it."""
    return prompt if isinstance(prompt, Switch) else Switch(prompt)


def read_script(prompts: Prompts, policy: CachePolicy, frames: int | None, usual: int) -> Script:
    """The arguments of `Model.stream`, in latent frames; `usual` has a clip.

    Raises ValueError where a prompt is not at the start of a chunk.
    """
    if isinstance(prompts, str):
        prompts = {0: prompts}
    cues = prompts if isinstance(prompts, Mapping) else {}
    last = max(cues, default=0)
    if frames is None and not policy.window:
        frames = policy.nearest(last + usual if last >= usual else usual)[0]
    if not isinstance(prompts, Mapping):
        return Script(prompts, [], frames)
    starts = policy.starts(frames or policy.nearest(last + policy.chunk)[0])
    refuse_cues(cues, starts)
    return Script(cues.get, [as_switch(cue).prompt for cue in cues.values()], frames)


@jax.jit
def _copied(tree: Params) -> Params:
    """In one program: a cache has many arrays."""
    return jax.tree.map(jnp.copy, tree)


def fork(live: Live) -> Live:
    """A copy: `Model.advance` gives up what it is given."""
    session = live.session
    cache, decoder = _copied((session.cache, live.decoder))
    return live._replace(session=session._replace(cache=cache), decoder=decoder)


def save(live: Live, parts: Parts, file: AnyPath) -> None:
    """Writes a video under way as a safetensors file."""
    session, sampler = live.session, live.sampler
    assert sampler.memory
    tree = {f"cache/{name}": leaf for name, leaf in vars(session.cache).items()}
    tree |= {f"decoder/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(live.decoder))}
    tree["keys"] = jax.random.key_data(session.keys)
    arrays = {name: np.asarray(leaf) for name, leaf in tree.items()}
    told = {
        "sampler": sampler._asdict() | {"memory": asdict(sampler.memory)},
        "slots": session.cache.slots,
        "frames": session.frames,
        "prompt": live.prompt,
        "seed": live.seed,
        "made_with": parts.made_with,
    }
    writers = {
        name: TensorWriter(array.dtype, array.shape, lambda array=array: [array])
        for name, array in arrays.items()
    }
    write_tensors(file, writers, {"live": json.dumps(told)})


def resume(parts: Parts, picture: tuple[int, ...], file: AnyPath) -> Live:
    """What `save` wrote. `picture`: (H, W, C) of a latent frame.

    Raises:
      UserError: the file is absent or damaged, or of another network.
    """
    try:
        told = json.loads(read_header(file)[1]["live"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is no video under way ({error}); see Model.save") from error
    if told["made_with"] != json.loads(json.dumps(parts.made_with)):
        raise UserError(f"{file} is of another network than {parts.source}; open that one")
    made = told["sampler"]
    policy = CachePolicy(**made["memory"])
    sampler = Sampler(**made | {"memory": policy, "levels": tuple(made["levels"])})
    empty = jax.eval_shape(lambda: parts.network.empty_cache(1, told["slots"], picture))
    first = jax.ShapeDtypeStruct((1, policy.first, *picture), jnp.float32)
    decoder = jax.eval_shape(parts.decode, None, first)[1] if told["frames"] else None
    leaves, form = jax.tree.flatten(decoder)
    keys = jax.eval_shape(lambda: jax.random.key_data(numbered_keys(0, np.array([0]))))
    like = {"cache": vars(empty), "keys": keys}
    if leaves:
        like["decoder"] = {str(i): leaf for i, leaf in enumerate(leaves)}
    tree = load_weights(file, like, dtype=None)
    keys = jax.random.wrap_key_data(tree["keys"])
    decoder = form.unflatten([tree["decoder"][str(i)] for i in range(len(leaves))])
    session = Session(KVCache(**tree["cache"]), None, keys, told["frames"])
    return Live(sampler, session, decoder, told["prompt"], told["seed"])
