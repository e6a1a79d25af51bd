"""How fast the parts of training and of generating run on this machine: real shapes, random
weights.

A part is compiled, run once to warm up, then timed several times, each time until its results are
there; the median stands for it. FLOPs are counted (`planning.flops`), never measured.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped
from jax.typing import DTypeLike

from salt_jax import sharding
from salt_jax.config.schema import Recipe
from salt_jax.models.latent_size import SPACE, TIME
from salt_jax.models.layout import platform_of
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.vae import VAEConfig, decode_video, encode_video, init_vae
from salt_jax.models.visibility import chunk_pairs
from salt_jax.models.wan import init_wan
from salt_jax.planning.flops import image_tokens, sweep, traced_flops, update_flops
from salt_jax.planning.memory import fresh_state
from salt_jax.planning.random_params import random_params
from salt_jax.planning.updates import programs, update_name
from salt_jax.rollout.pixels import stream_pixels
from salt_jax.rollout.sampler import Cue, Sampler, clip_keys, generate
from salt_jax.stages.networks import denoiser_of, runs_flash
from salt_jax.stages.stage import Batch, Frozen, Stage
from salt_jax.state import TrainState
from salt_jax.train.step import Call, Shardings, compile_step
from salt_jax.types import Conditioning, Params, PRNGKey

T = TypeVar("T")


class Result(NamedTuple):
    """What was measured of one part."""

    part: str
    seconds: float  # median
    every: tuple[float, ...]  # seconds of each run
    compile_seconds: float
    flops: float  # counted
    # arguments, results and temporaries by XLA's account, on one device; None: many programs
    xla_bytes: int | None
    more: dict[str, int | float]


def time_runs(call: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each of `runs` calls after one that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    part: str, function: Wrapped, args: tuple, flops: float, runs: int, **more: int | float
) -> Result:
    """Times a jitted function. If argument 0 is donated, output 0 replaces it in the next call."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    donates = any(info.donated for info in jax.tree.leaves(compiled.args_info, is_leaf=_is_info))
    current = list(args)

    def call():
        out = compiled(*current)
        if donates:
            current[0] = out[0]
        return out

    every = time_runs(call, runs)
    m = compiled.memory_analysis()
    used = m and m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    used = m and used and used - m.alias_size_in_bytes
    return Result(part, median(every), tuple(every), compile_seconds, flops, used or None, more)


def _is_info(leaf):
    return hasattr(leaf, "donated")


def matmul(size: int, dtype: DTypeLike, runs: int) -> Iterator[Result]:
    """The reference rate: one square matrix product."""
    a = jnp.ones((size, size), dtype)
    yield measure("matmul", jax.jit(jnp.matmul), (a, a), 2.0 * size**3, runs, size=size)


def shapes_of(init: Callable[[PRNGKey, T], Params], config: T) -> Params:
    """The shapes of a network's parameters; `config` is its sizes."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def random_cond(recipe: Recipe, clips: int) -> Conditioning:
    """What a network is given with each clip."""
    c, (frames, height, width, _) = recipe.wan, recipe.clip_shape
    noise = lambda *shape: jax.random.normal(jax.random.key(recipe.seed), (clips, *shape))
    text = noise(c.text_length, c.text_dim)
    if not c.image_dim:
        return Conditioning(text)
    channels = noise(frames, height, width, c.condition_channels)
    return Conditioning(text, noise(image_tokens(c), c.image_dim), channels)


def random_batch(stage: Stage) -> Batch:
    """Of what the stage reads of any data set; not all have switch prompts."""
    recipe, clips = stage.recipe, stage.recipe.batch_size
    video = (clips, *recipe.clip_shape)
    states = (clips, recipe.schedule.train_levels + 1, *recipe.clip_shape)
    every = {
        "cond": partial(random_cond, recipe, clips),
        "tokens": partial(jnp.zeros, (clips, recipe.wan.text_length), jnp.int32),
        "video": partial(jax.random.normal, jax.random.key(recipe.seed), video),
        "states": partial(jnp.zeros, states),
    }
    return Batch(**{name: every[name]() for name in stage.needs if name in every})


def teacher_forward(recipe: Recipe, dtype: DTypeLike, runs: int) -> Iterator[Result]:
    """One evaluation of the teacher's network on one clip, without guidance. `dtype`: of the
    weights.
    """
    c, frames = recipe.teacher_wan, recipe.clip_shape[0]
    network = denoiser_of(recipe, None, c)
    params = random_params(shapes_of(init_wan, c), dtype, recipe.seed)
    x = jnp.ones((1, *recipe.clip_shape))
    forward = jax.jit(lambda p, x, sigma, cond: network.denoise(p, x, sigma, cond).velocity)
    flops = sweep(c, recipe.clip_shape[1:3], [(frames, frames)]).total
    args = (params, x, jnp.full(1, 0.5), random_cond(recipe, 1))
    yield measure("teacher forward", forward, args, flops, runs)


def updates(stage: Stage, learner: str, runs: int) -> Iterator[Result]:
    """A learner's update, one result for each program of it, on the first draw that asks for it."""
    recipe, mesh = stage.recipe, stage.mesh
    assert mesh is not None
    shapes, shardings = forms(stage)
    over_batch, everywhere = shardings[2:]
    frozen = random_params(shapes[1], None, recipe.seed, shardings[1])
    batch = sharding.put(random_batch(stage), over_batch)
    key = jax.jit(jax.random.key, out_shardings=everywhere)(recipe.seed)
    flash = runs_flash(recipe, platform_of(mesh))
    for update, draw in programs(stage).items():
        if update.moves != learner:
            continue
        jitted = compile_step(stage, update, shardings)
        put = lambda x: sharding.put(x, everywhere)
        call = Call(key, put(np.int32(0)), jax.tree.map(put, draw))
        # the one before is donated
        state = random_params(shapes[0], None, recipe.seed, shardings[0])
        flops = sum(update_flops(recipe, stage.passes(update, draw), flash).values())
        clean = recipe.memory.clean_pass
        evaluations = 0.0 if draw is None else int(draw.exit_step) + 1.0 + clean
        more = {"clips": recipe.batch_size, "evaluations_per_chunk": evaluations}
        args = (state, frozen, batch, call)
        yield measure(update_name(update), jitted, args, flops, runs, **more)


Forms = tuple[TrainState, Frozen]  # with a shape in the place of each array


def forms(stage: Stage) -> tuple[Forms, Shardings]:
    """Shapes of (state, frozen), and where (state, frozen, batch, everything else) lie: what
    `compile_step` takes.
    """
    mesh = stage.mesh
    assert mesh is not None
    shapes = jax.eval_shape(partial(fresh_state, stage))
    host = stage.recipe.host_state
    state, frozen = (sharding.state_shardings(mesh, tree, host) for tree in shapes)
    return shapes, (state, frozen, sharding.batch_sharding(mesh), sharding.replicated(mesh))


def text_encoder(recipe: Recipe, dtype: DTypeLike, runs: int) -> tuple[Result, jax.Array]:
    """The embedding of one prompt of full length, and the embedding.

    `dtype`: of weights and products.
    """
    params = random_params(shapes_of(init_text_encoder, recipe.text), dtype, recipe.seed)
    tokens = jnp.ones((1, recipe.wan.text_length), jnp.int32)
    encode = jax.jit(partial(encode_text, config=recipe.text, dtype=dtype))
    flops = traced_flops(encode, params, tokens)
    return measure("text encoder", encode, (params, tokens), flops, runs), encode(params, tokens)


def streaming(
    recipe: Recipe, vae: VAEConfig | None, num_steps: int, dtype: DTypeLike, runs: int
) -> list[Result]:
    """A video chunk by chunk, as a viewer gets it: seconds in the text encoder, the transformer and
    the VAE.

    Transfers to the host and the way to bytes count as the VAE's. `dtype`: of the weights. Where
    `vae` is None latents are the end.
    """
    text, embedding = text_encoder(recipe, recipe.compute.dtype, runs)
    c, policy, network = recipe.wan, recipe.memory, denoiser_of(recipe, None)
    params = random_params(shapes_of(init_wan, c), dtype, recipe.seed)
    decoder = vae and random_params(shapes_of(init_vae, vae), dtype, recipe.seed)
    keys = clip_keys(recipe.seed, 1)
    cues = {0: Cue(Conditioning(np.asarray(embedding, np.float32)))}
    sampler = Sampler(num_steps, recipe.schedule.shift, recipe.sample.solver, policy)

    def once() -> tuple[list[float], list[float], list[int]]:
        latents: list[float] = []
        every, frames, last = [], [], time.perf_counter()
        chunks = _clocked(
            generate(sampler, network, params, cues, keys, recipe.clip_shape), latents
        )
        for made in stream_pixels(decoder, vae, chunks, recipe.compute.dtype) if vae else chunks:
            every.append(time.perf_counter() - last)
            frames.append(made.shape[1])
            last = time.perf_counter()
        return latents, every, frames

    start = time.perf_counter()
    once()
    first_run = time.perf_counter() - start
    all_runs = [once() for _ in range(runs)]
    transformer = [sum(latents) for latents, _, _ in all_runs]
    whole = [sum(every) for _, every, _ in all_runs]
    first, last = ([every[i] for _, every, _ in all_runs] for i in (0, -1))
    frames, seconds = all_runs[0][2], median(whole)
    pairs = chunk_pairs(policy, recipe.clip_shape[0])
    work = sweep(c, recipe.clip_shape[1:3], pairs)
    flops = work.context + (num_steps + policy.clean_pass) * (work.linear + work.attention)
    more = {
        "num_steps": num_steps,
        "frames": sum(frames),
        "transformer_seconds": median(transformer),
        "vae_seconds": median(a - b for a, b in zip(whole, transformer, strict=True)),
        "first_chunk_seconds": text.seconds + median(first),
        "frames_per_second": sum(frames) / seconds,
        "last_chunk_frames_per_second": frames[-1] / median(last),
    }
    if vae:
        clip = jax.ShapeDtypeStruct((1, *recipe.clip_shape), jnp.float32)
        decode = partial(decode_video, config=vae, dtype=recipe.compute.dtype)
        flops += traced_flops(decode, decoder, clip)
    compiling = first_run - seconds
    return [text, Result("streaming", seconds, tuple(whole), compiling, flops, None, more)]


def _clocked(chunks: Iterable[T], seconds: list[float]) -> Iterator[T]:
    """The same chunks, with the time that each took to come."""
    start = time.perf_counter()
    for chunk in chunks:
        seconds.append(time.perf_counter() - start)
        yield chunk
        start = time.perf_counter()


def vae_parts(recipe: Recipe, vae: VAEConfig, runs: int) -> Iterator[Result]:
    """Encoding and decoding one clip whole."""
    frames, height, width, _ = recipe.clip_shape
    dtype = recipe.compute.dtype
    params = random_params(shapes_of(init_vae, vae), dtype, recipe.seed)
    video = jnp.zeros((1, TIME * (frames - 1) + 1, SPACE * height, SPACE * width, 3))
    for name, code, x in (
        ("VAE encode", encode_video, video),
        ("VAE decode", decode_video, jnp.zeros((1, *recipe.clip_shape))),
    ):
        run = jax.jit(partial(code, config=vae, dtype=dtype))
        flops = traced_flops(run, params, x)
        yield measure(name, run, (params, x), flops, runs, frames=video.shape[1])
