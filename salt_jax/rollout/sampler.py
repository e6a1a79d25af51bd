"""Parameters and prompts in, latent clips out, for students and teachers alike: few steps whole or
chunk by chunk, of any length in constant accelerator memory; or many steps.
"""

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from salt_jax.flow.multistep import solver_steps
from salt_jax.io.stored_jit import StoredJit
from salt_jax.models.blocks import CrossKV
from salt_jax.models.cache_policy import CachePolicy, refuse_overflow
from salt_jax.models.denoiser import Branches, CausalDenoiser, Cond
from salt_jax.models.kv_cache import KVCache, flush
from salt_jax.rollout.causal import ChunkSpec, Steps, commit, extend, recache
from salt_jax.rollout.parallel import multistep_start, multistep_step, noise_at, sample
from salt_jax.rollout.settings import Sampler
from salt_jax.types import Conditioning, Denoiser, Latent, Params, Tree

_sample = jax.jit(sample, static_argnums=(0, 4, 6))
_noise_at = jax.jit(noise_at, static_argnums=3)
_multistep_step = jax.jit(multistep_step, static_argnums=0)
_commit = jax.jit(commit, static_argnums=(0, 5), donate_argnums=2)
read_again = StoredJit(recache, static=(0, 4), donated=2)
_flush = jax.jit(flush, static_argnums=(1, 2), donate_argnums=0)

USUAL_STEPS = 16  # levels are padded to that many steps, so one program serves all usual numbers
FLUSH_KEEPS = 2  # frames, and
CUT_AHEAD = 42  # positions: as Infinity-RoPE has them (45 where 3 would follow)


class Cue(NamedTuple):
    """What changes at a frame of a video under way."""

    cond: Cond  # the prompts from here on
    # drop all but the sink and the last frames, instead of reading them again under the prompt
    flush: bool = False
    cut: bool = False  # a scene cut: the first chunk stands far ahead in time (relative positions)


class Session(NamedTuple):
    """A video under way, chunk by chunk."""

    cache: KVCache
    cond: CrossKV | Branches | None  # of the prompt it is under, once read
    keys: Key[Array, "b"]
    frames: int  # made so far


@partial(StoredJit, static=(0,))
def read_prompt(network, params, cond):
    return network.read(params, cond)


@partial(StoredJit, static=(0, 1, 2, 3))
def empty_cache(network, clips, slots, picture):
    return network.empty_cache(clips, slots, picture)


@partial(StoredJit, static=(0, 6), donated=2)
def make_chunk(network, params, cache, cond, steps, call, spec):
    """`extend`, without the chunk's noisy state."""
    _, x0, cache = extend(network, params, cache, cond, steps, call, spec)
    return x0, cache


def clip_keys(seed: int, count: int) -> jax.Array:
    """One key per clip, [count]: all noise of clip i comes from the i-th."""
    return numbered_keys(seed, np.arange(count))


def numbered_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """The keys of the clips with these numbers."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(numbers))


def generate(
    sampler: Sampler,
    network: Denoiser,
    params: Params,
    cues: dict[int, Cue],
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
    given: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields clips, float32 [B, f, H, W, C]: whole, or chunk by chunk as soon as a chunk is there.

    The noise of a clip does not depend on its batch. Memory does not grow with the video's length,
    unless the sampler's policy drops nothing.

    Args:
      cues: by frame. Frame 0 must be there, the others must begin a chunk.
      keys: [B], from `clip_keys`.
      shape: (F, H, W, C); chunk by chunk F of any length that splits into chunks.
      given: float32 [B, f, H, W, C], the first chunks, which are not made but continued: a picture
        where the first chunk is one frame, or a clip. They are yielded first.

    Raises:
      ValueError: F does not split into chunks or does not fit the cache, or a cue is not at the
        start of a chunk, or a cut is asked of positions that are not relative, or `given` is no
        number of chunks below F.
    """
    if sampler.memory is None:
        yield whole_clips(sampler, network, params, cues[0].cond, keys, shape)
        return
    assert isinstance(network, CausalDenoiser), "a formula has no cache"
    starts = _refuse(sampler.memory, cues, given, (len(keys), *shape))
    session = start_session(sampler, network, keys, shape)
    for at in starts:
        size = sampler.memory.chunk if at else sampler.memory.first
        part = None if given is None or at >= given.shape[1] else given[:, at : at + size]
        x0, session = next_chunk(sampler, network, params, session, cues.get(at), part)
        yield np.asarray(x0)


def start_session(
    sampler: Sampler, network: CausalDenoiser, keys: Key[Array, "b"], shape: tuple[int, ...]
) -> Session:
    """A video without frames; `shape` (F, H, W, C): F of the longest that its cache has to hold."""
    policy = sampler.memory
    assert policy, "the sampler makes whole clips"
    cache = empty_cache(network, len(keys), policy.capacity(shape[0]), tuple(shape[1:]))
    return Session(cache, None, keys, 0)


def next_chunk(
    sampler: Sampler,
    network: CausalDenoiser,
    params: Params,
    session: Session,
    cue: Cue | None = None,
    given: np.ndarray | None = None,
) -> tuple[Latent, Session]:
    """The next frames of a video, float32 [B, chunk, H, W, C], and the video with them.

    The session's cache is given up. `given`: the frames themselves, which are not made.
    """
    policy, (cache, cond, keys, at) = sampler.memory, session
    assert policy and (cue or cond is not None), "a video begins with a prompt"
    size = policy.chunk if at else policy.first
    if isinstance(cache.frames.sharding, SingleDeviceSharding):  # new, or read from a file
        cache = _beside(params, cache)
    if cue:
        cond = cue.cond
        if isinstance(cond, Conditioning):
            cond = read_prompt(network, params, on_device(cond))
        if at and cue.flush:
            cache = _flush(cache, policy, min(FLUSH_KEEPS, cache.slots - policy.sink))
        elif at:
            cache = read_again(network, params, cache, cond, policy)
    if given is not None:
        x0 = jnp.asarray(given)
        cache = _commit(network, params, cache, x0, cond, policy)
    else:
        call = keys, np.int32(CUT_AHEAD if cue and cue.cut else 0)
        steps, spec = _steps(sampler, not at), ChunkSpec(size, policy)
        x0, cache = make_chunk(network, params, cache, cond, steps, call, spec)
    return x0, Session(cache, cond, keys, at + size)


@lru_cache
def _steps(sampler: Sampler, first: bool) -> Steps:
    """Of the first chunk, or of the others."""
    levels, solver = sampler.grid(first), sampler.solver
    assert solver in ("euler", "cm"), f"students have no {solver}"
    longest = max(len(sampler.grid()), len(sampler.grid(first=True)), USUAL_STEPS + 1)
    return Steps(np.pad(levels, (0, longest - len(levels))), np.int32(len(levels) - 2), solver)


def whole_clips(
    sampler: Sampler,
    network: Denoiser,
    params: Params,
    cond: Cond,
    keys: Key[Array, "b"],
    shape: tuple[int, ...],
    report: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Clips of all frames at once, float32 [B, F, H, W, C]; arguments as in `generate`.

    With one key every clip runs through the same program, so its bits depend on nothing but its key
    and prompt. `report` is called after each step of a stepwise sampler.
    """
    cond, solver = on_device(cond), sampler.solver
    if not sampler.stepwise:
        return np.asarray(_sample(network, params, cond, sampler.grid(), solver, keys, shape))
    assert solver in ("unipc", "dpmpp", "euler"), f"teachers have no {solver}"
    noise = _noise_at(keys, jnp.float32(1.0), np.arange(shape[0]), shape[1:])
    history = _beside(params, multistep_start(noise))
    rows = solver_steps(solver, sampler.num_steps, sampler.shift)
    table = jax.tree.map(lambda column: np.asarray(column, np.float32), rows)
    for i in range(sampler.num_steps):
        row = jax.tree.map(lambda column, i=i: column[i], table)
        history = _multistep_step(network, params, cond, history, row)
        # so that a progress bar tells the truth; the next step waits for it anyway
        history.x.block_until_ready()
        report()
    return np.asarray(history.x)


def _beside(params: Params, tree: Tree) -> Tree:
    """What a first step is given, where the next ones find it: all are then of one program."""
    there = getattr(jax.tree.leaves(params)[0], "sharding", None)  # numpy's arrays have none
    there = NamedSharding(there.mesh, P()) if isinstance(there, NamedSharding) else there
    return jax.device_put(tree, there)


def on_device(cond: Cond) -> Cond:
    return jax.tree.map(jnp.asarray, cond)


def refuse_cues(cues: Collection[int], starts: tuple[int, ...]) -> None:
    """Raises ValueError where prompts begin at other frames than chunks, or none does at 0."""
    if 0 not in cues or not set(cues) <= set(starts):
        raise ValueError(
            f"prompts begin at frames {sorted(cues)}; these must be starts of chunks, and 0 among "
            "them"
        )


def _refuse(
    policy: CachePolicy, cues: dict[int, Cue], given: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The frames at which chunks begin. Raises ValueError for what `generate` cannot do, before
    anything runs.
    """
    starts = policy.starts(shape[1])
    if given is not None:
        b, f, *place = given.shape
        if (b, *place) != (shape[0], *shape[2:]) or f not in starts[1:]:
            raise ValueError(
                f"the given frames are {given.shape}, a video of {shape} goes on from whole "
                f"chunks: {starts[1:]} frames"
            )
    refuse_cues(cues, starts)
    if policy.positions != "relative" and any(cue.cut for cue in cues.values()):
        raise ValueError("a scene cut moves relative positions; set positions to relative")
    refuse_overflow(policy, policy.capacity(shape[1]), shape[1])
    return starts
