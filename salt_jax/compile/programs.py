"""The programs of a run, by name, each with arguments that have shapes and places and no values.

Nothing is allocated: a program at full size can be named, and compiled for devices that are not
there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from salt_jax import sharding
from salt_jax.config.schema import Recipe
from salt_jax.models.kv_cache import KVCache
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.models.vae import decode_first, init_vae
from salt_jax.models.wan import init_wan
from salt_jax.planning import bench, updates
from salt_jax.rollout import pixels, sampler
from salt_jax.rollout.causal import Steps
from salt_jax.rollout.draws import Draw
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.ode_regression import OdeRegression
from salt_jax.stages.stage import Stage, Update
from salt_jax.stages.weights import in_dtype
from salt_jax.train.step import Call, compile_step
from salt_jax.types import Conditioning, Params


class Program(NamedTuple):
    """A jitted function and what it is called with."""

    jitted: Any  # of jax.jit
    args: tuple[Any, ...]


def parts(stage: Stage, what: str) -> dict[str, Callable[[], Program]]:
    """The programs of one part of a run, by name, on the mesh of the stage, which only those that
    are made need. None where the recipe has no such part.

    `what`: "student", "critic", "teacher", "stream", "vae" or "text".
    """
    return {
        "student": lambda: _updates(stage, "student"),
        "critic": lambda: _updates(stage, "critic"),
        "teacher": lambda: _teacher(stage),
        "stream": lambda: _streaming(stage) if stage.recipe.causal else {},
        "vae": lambda: _vae(stage),
        "text": lambda: {"text encoder": partial(_text_encoder, stage)},
    }[what]()


def place(tree: Any, shardings: Any) -> Any:
    """Shapes that also say where they lie. `shardings`: a tree of them, or one for all."""
    put = lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, jax.tree.broadcast(shardings, tree), tree)


def _weights(init: Callable, config: Any, dtype: DTypeLike, mesh: Mesh) -> Params:
    shapes = bench.shapes_of(init, config)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return place(tree, sharding.state_shardings(mesh, tree))


def _teacher_weights(recipe: Recipe, config: WanConfig, mesh: Mesh) -> Params:
    """A teacher in the dtype that it is kept in."""
    init = lambda: in_dtype(init_wan(jax.random.key(0), config), recipe.teacher.dtype)
    params = jax.eval_shape(init)
    return place(params, sharding.state_shardings(mesh, params))


def _updates(stage: Stage, learner: str) -> dict[str, Callable[[], Program]]:
    found = updates.programs(stage).items()
    return {
        updates.update_name(update): partial(_step, stage, update, draw)
        for update, draw in found
        if update.moves == learner
    }


def _step(stage: Stage, update: Update, draw: Draw | None) -> Program:
    """One update. `draw` has values, of which only shapes matter."""
    shapes, shardings = bench.forms(stage)
    over_batch, everywhere = shardings[2:]
    call = lambda: Call(jax.random.key(0), jnp.int32(0), jax.tree.map(jnp.asarray, draw))
    batch = place(jax.eval_shape(lambda: bench.random_batch(stage)), over_batch)
    rest = place(jax.eval_shape(call), everywhere)
    jitted = compile_step(stage, update, shardings)
    return Program(jitted, (*map(place, shapes, shardings[:2]), batch, rest))


def _teacher(stage: Stage) -> dict[str, Callable[[], Program]]:
    """One evaluation of the teacher's network on a batch, without guidance and without gradient.

    Of ODE regression: a batch of the causal teacher's trajectories.
    """
    recipe = stage.recipe
    if isinstance(stage, OdeRegression):
        return {"trajectories": partial(_trajectories, stage)}
    if recipe.teacher.kind != "network":
        return {}

    def forward() -> Program:
        mesh = _mesh(stage)
        network = denoiser_of(recipe, mesh, recipe.teacher_wan)
        cond = lambda: bench.random_cond(recipe, recipe.batch_size)
        clips = lambda: jnp.zeros((recipe.batch_size, *recipe.clip_shape))
        given = lambda: (clips(), jnp.zeros(recipe.batch_size), cond())
        args = place(jax.eval_shape(given), sharding.batch_sharding(mesh))
        jitted = jax.jit(lambda p, x, sigma, cond: network.denoise(p, x, sigma, cond).velocity)
        return Program(jitted, (_teacher_weights(recipe, recipe.teacher_wan, mesh), *args))

    return {"teacher forward": forward}


def _trajectories(stage: OdeRegression) -> Program:
    recipe, mesh = stage.recipe, _mesh(stage)
    params = _teacher_weights(recipe, recipe.wan, mesh)
    null = lambda: jnp.zeros((1, recipe.wan.text_length, recipe.wan.text_dim))
    batch = lambda: bench.random_batch(stage)._replace(states=None)
    rest = jax.eval_shape(lambda: (null(), batch(), jax.random.key(0)))
    null_text, *rest = place(rest, sharding.replicated(mesh))
    frozen = {"teacher": params, "null_text": null_text}
    return Program(jax.jit(stage.trajectory), (frozen, *rest))


def _mesh(stage: Stage) -> Mesh:
    assert stage.mesh is not None, "programs are for devices"
    return stage.mesh


def _streaming(stage: Stage) -> dict[str, Callable[[], Program]]:
    """Of `rollout.sampler.generate`: one video chunk by chunk, bfloat16 weights spread over all
    devices.
    """
    recipe = stage.recipe
    policy, shape, network = recipe.memory, recipe.clip_shape, stage.student
    put = lambda make, *args: place(jax.eval_shape(make, *args), sharding.replicated(_mesh(stage)))

    def given() -> tuple[Params, KVCache, Conditioning]:
        params = _weights(init_wan, recipe.wan, jnp.bfloat16, _mesh(stage))
        cache = put(lambda: network.empty_cache(1, policy.capacity(shape[0]), shape[1:]))
        words = (1, recipe.wan.text_length, recipe.wan.text_dim)
        return params, cache, put(lambda: Conditioning(jnp.zeros(words)))

    def read() -> Program:
        params, _, cond = given()
        return Program(sampler.read_prompt, (network, params, cond))

    def chunk(size: int) -> Program:
        params, cache, cond = given()
        cross = put(network.read, params, cond)
        levels = lambda: jnp.zeros(sampler.USUAL_STEPS + 1)
        steps = put(lambda: Steps(levels(), jnp.int32(0), recipe.sample.solver))
        call = put(lambda: (sampler.clip_keys(0, 1), jnp.int32(0)))
        spec = sampler.ChunkSpec(size, policy)
        return Program(sampler.make_chunk, (network, params, cache, cross, steps, call, spec))

    def again() -> Program:
        params, cache, cond = given()
        return Program(sampler.read_again, (network, params, cache, cond, policy))

    sizes = sorted(set(policy.sizes(shape[0])))
    chunks = {f"stream: chunk of {size}": partial(chunk, size=size) for size in sizes}
    return {"stream: read text": read, **chunks, "stream: new prompt": again}


def _vae(stage: Stage) -> dict[str, Callable[[], Program]]:
    """Of `rollout.pixels.stream_pixels`: one video, its first frame and then as many as come
    together.
    """
    recipe = stage.recipe
    config = VAE_PRESETS["tiny" if recipe.model.preset.endswith("tiny") else "wan2.1"]
    if recipe.wan.out_channels != config.z_dim:
        return {}
    frames, *picture = recipe.clip_shape
    sizes = recipe.memory.sizes(frames) if recipe.causal else (frames,)
    later = sorted({size - (not i) for i, size in enumerate(sizes)} - {0})

    def latents(size: int) -> tuple[Any, Any]:
        values = lambda: (init_vae(jax.random.key(0), config), jnp.zeros((1, size, *picture)))
        return place(jax.eval_shape(values), sharding.replicated(_mesh(stage)))

    def first() -> Program:
        return Program(pixels.decode_first_frame, (*latents(1), config, jnp.float32))

    def following(size: int) -> Program:
        decode = lambda params, one: decode_first(params, one, config, jnp.float32)
        _, memory = jax.eval_shape(decode, *latents(1))
        params, chunk = latents(size)
        memory = place(memory, sharding.replicated(_mesh(stage)))
        return Program(pixels.decode_more, (params, memory, chunk, config, jnp.float32))

    more = {f"VAE decode: {size} more": partial(following, size=size) for size in later}
    return {"VAE decode: first frame": first, **more}


def _text_encoder(stage: Stage) -> Program:
    """One prompt of full length."""
    recipe, mesh = stage.recipe, _mesh(stage)
    dtype, everywhere = recipe.compute.dtype, sharding.replicated(mesh)
    tokens = place(
        jax.eval_shape(lambda: jnp.ones((1, recipe.wan.text_length), jnp.int32)), everywhere
    )
    encode = jax.jit(partial(encode_text, config=recipe.text, dtype=dtype))
    return Program(encode, (_weights(init_text_encoder, recipe.text, dtype, mesh), tokens))
