"""Parameters and prompts in, clips out: few-step students whole or chunk by chunk, as long as one
likes in constant memory; teachers by many updates; and latents to pixels as they come."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from salt_jax.choices import Solver, TeacherSolver
from salt_jax.flow.multistep import steps
from salt_jax.models.denoiser import Network
from salt_jax.models.kv_cache import flush
from salt_jax.models.memory import CachePolicy, refuse_overflow
from salt_jax.models.vae import VAEConfig, decode_first, decode_next, decode_tiled
from salt_jax.rollout.causal import commit, generate_chunk, recache
from salt_jax.rollout.parallel import multistep_start, multistep_update, noise_at, sample
from salt_jax.types import Denoiser, Params, Told

_sample = jax.jit(sample, static_argnums=(0, 4, 6))
_noise_at = jax.jit(noise_at, static_argnums=3)
_multistep_update = jax.jit(multistep_update, static_argnums=0)
_decode_first = jax.jit(decode_first, static_argnums=(2, 3))
_decode_next = jax.jit(decode_next, static_argnums=(3, 4), donate_argnums=1)
_decode_tiled = jax.jit(decode_tiled, static_argnums=(2, 3, 4, 5))
_read_text = jax.jit(
    lambda network, params, text: network.read_text(params, text), static_argnums=0
)
_recache = jax.jit(recache, static_argnums=(0, 4), donate_argnums=2)
_commit = jax.jit(commit, static_argnums=(0, 5), donate_argnums=2)
_flush = jax.jit(flush, static_argnums=(1, 2), donate_argnums=0)

# levels are padded to that many steps, so one program serves all usual numbers
USUAL_STEPS = 16
FLUSH_KEEPS = 2  # frames, and
CUT_AHEAD = 42  # positions: as Infinity-RoPE has them (45 where 3 would follow)


class Sampler(NamedTuple):
    """How a few-step student makes clips."""

    # float32 [K + 1], noise levels falling from 1 to 0: `flow.schedule.grid` or `explicit`
    levels: np.ndarray
    solver: Solver
    memory: CachePolicy | None = None  # chunk by chunk; None: whole clips
    first_levels: np.ndarray | None = None  # of the first chunk; None: as the others


class Cue(NamedTuple):
    """What changes at a frame of a video under way."""

    text: np.ndarray  # float32 [B, T, D], the prompts from here on
    # forget all but the sink and the last frames, instead of reading them again under the
    # prompt
    flush: bool = False
    cut: bool = False  # a scene cut: the first chunk stands far ahead in time (relative positions)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_cache(network, slots, batch, picture):
    return network.empty_cache(jnp.zeros((batch, 0, *picture)), slots)


@partial(jax.jit, static_argnames=("network", "solver", "size", "policy"), donate_argnames="cache")
def _next_chunk(network, params, cache, text, levels, exit_step, solver, keys, size, policy, jump):
    _, x0 = generate_chunk(
        network, params, cache, text, levels, exit_step, solver, keys, size, policy, jump
    )
    return x0, commit(network, params, cache, x0, text, policy)


def clip_keys(seed: int, count: int) -> jax.Array:
    """One key per clip, [count]: all noise of clip i comes from the i-th."""
    return numbered_keys(seed, np.arange(count))


def numbered_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """The keys of the clips with these numbers."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(numbers))


def sample_clips(
    denoiser: Denoiser,
    params: Params,
    text: Told | np.ndarray,
    keys: jax.Array,
    sampler: Sampler,
    shape: tuple[int, ...],
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yields batches of whole clips, float32 latents [batch_size, F, H, W, C], in order; the last
    may be smaller.

    The noise of a clip does not depend on its batch. With `batch_size` 1 every clip runs through
    the same program, so its bits depend on nothing but its key and text.

    Args:
      text: what the network is told of each of N clips.
      keys: [N], from `clip_keys`.
      shape: (F, H, W, C).
    """
    for start in range(0, len(keys), batch_size):
        part = slice(start, start + batch_size)
        told = jax.tree.map(lambda leaf, part=part: jnp.asarray(leaf[part]), text)
        yield np.asarray(
            _sample(denoiser, params, told, sampler.levels, sampler.solver, keys[part], shape)
        )


def multistep_clip(
    denoiser: Denoiser,
    params: Params,
    text: Told,
    keys: jax.Array,
    num_steps: int,
    shift: float,
    solver: TeacherSolver,
    shape: tuple[int, ...],
    report: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Clips of a teacher, float32 [B, F, H, W, C]; arguments as in `sample_clips`.

    `report` is called after each update.
    """
    noise = _noise_at(keys, jnp.float32(1.0), np.arange(shape[0]), shape[1:])
    # Beside the parameters from the start: the first update is then of the same program as the
    # others.
    there = jax.tree.leaves(params)[0].sharding
    there = NamedSharding(there.mesh, P()) if isinstance(there, NamedSharding) else there
    history = jax.device_put(multistep_start(noise), there)
    table = jax.tree.map(
        lambda column: np.asarray(column, np.float32), steps(solver, num_steps, shift)
    )
    for i in range(num_steps):
        row = jax.tree.map(lambda column, i=i: column[i], table)
        history = _multistep_update(denoiser, params, text, history, row)
        # so that a progress bar tells the truth; the next update waits for it anyway
        history.x.block_until_ready()
        report()
    return np.asarray(history.x)


def stream_pixels(
    params: Params, config: VAEConfig, chunks: Iterable[np.ndarray], dtype: Any, tile: int = 0
) -> Iterator[np.ndarray]:
    """Latent chunks of a video, [B, f, h, w, 16] each -> its frames, uint8 [B, t, H, W, 3], chunk
    by chunk.

    `tile` > 0 decodes the whole video at its end instead, in tiles of so many latent rows and
    columns a quarter of which overlaps: less memory, and seams may be seen.
    """
    if tile:
        whole = np.concatenate(list(chunks), axis=1)
        yield to_bytes(_decode_tiled(params, whole, config, dtype, tile, tile // 4))
        return
    memory: Any = None
    for chunk in chunks:
        chunk, frames = jnp.asarray(chunk), []
        if memory is None:
            first, memory = _decode_first(params, chunk[:, :1], config, dtype)
            chunk, frames = chunk[:, 1:], [first]
        if chunk.shape[1]:
            more, memory = _decode_next(params, memory, chunk, config, dtype)
            frames.append(more)
        yield to_bytes(np.concatenate(frames, axis=1))


def to_bytes(pixels: Any) -> np.ndarray:
    """[-1, 1] -> uint8, cut off and not rounded, as Wan 2.1 writes its videos."""
    return (np.clip((np.asarray(pixels) + 1) / 2, 0, 1) * 255).astype(np.uint8)


def stream_chunks(
    network: Network,
    params: Params,
    cues: dict[int, Cue],
    keys: jax.Array,
    sampler: Sampler,
    shape: tuple[int, ...],
    given: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields a video chunk by chunk, float32 [B, chunk, H, W, C] each, as soon as it is there.

    Memory does not grow with the video's length, unless the sampler's forgets nothing.

    Args:
      network: `models.denoiser.guided_network` for guidance.
      cues: by frame. Frame 0 must be there, the others must begin a chunk.
      keys: [B], from `clip_keys`.
      sampler: with a memory.
      shape: (F, H, W, C); F of any length that splits into chunks.
      given: float32 [B, f, H, W, C], the first chunks, which are not made but continued: a picture
        where the first chunk is one frame, or a clip. They are yielded first.

    Raises:
      ValueError: F does not split into chunks or does not fit the cache, or a cue is not at the
        start of a chunk, or a cut is asked of absolute positions, or `given` is no number of chunks
        below F.
    """
    policy = sampler.memory
    assert policy, "the sampler has a memory"
    sizes, slots = policy.sizes(shape[0]), policy.capacity(shape[0])
    starts = (0, *np.cumsum(sizes)[:-1].tolist())
    _refuse(cues, starts, slots, policy, given, (len(keys), *shape))
    first = sampler.levels if sampler.first_levels is None else sampler.first_levels
    longest = max(len(sampler.levels), len(first), USUAL_STEPS + 1)
    cache = _empty_cache(network, slots, len(keys), shape[1:])
    text = None
    for at, size in zip(starts, sizes, strict=True):
        cue = cues.get(at)
        if cue:
            if at and cue.flush:
                cache = _flush(cache, policy, min(FLUSH_KEEPS, slots - policy.sink))
            elif at:
                cache = _recache(network, params, cache, jnp.asarray(cue.text), policy)
            text = _read_text(network, params, jnp.asarray(cue.text))
        if given is not None and at < given.shape[1]:
            x0 = given[:, at : at + size]
            cache = _commit(network, params, cache, jnp.asarray(x0), text, policy)
            yield np.asarray(x0)
            continue
        levels = sampler.levels if at else first
        padded = jnp.asarray(np.pad(levels, (0, longest - len(levels))))
        exit_step, jump = (
            jnp.int32(len(levels) - 2),
            jnp.int32(CUT_AHEAD if cue and cue.cut else 0),
        )
        x0, cache = _next_chunk(
            network,
            params,
            cache,
            text,
            padded,
            exit_step,
            sampler.solver,
            keys,
            size,
            policy,
            jump,
        )
        yield np.asarray(x0)


def _refuse(cues, starts, slots, policy, given, shape) -> None:
    """Raises ValueError for what `stream_chunks` cannot do, before anything runs."""
    if given is not None:
        b, f, *place = given.shape
        if (b, *place) != (shape[0], *shape[2:]) or f not in starts[1:]:
            raise ValueError(
                f"the given frames are {given.shape}, a video of {shape} goes on from whole "
                f"chunks: {starts[1:]} frames"
            )
    if 0 not in cues or not set(cues) <= set(starts):
        raise ValueError(
            f"prompts begin at frames {sorted(cues)}; these must be starts of chunks, and 0 among "
            "them"
        )
    if policy.positions == "absolute" and any(cue.cut for cue in cues.values()):
        raise ValueError("a scene cut moves relative positions; set positions to relative")
    refuse_overflow(policy, slots, shape[1])
