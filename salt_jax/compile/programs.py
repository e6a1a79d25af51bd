"""The programs of a run, by name, each with arguments that have shapes and places and no values.

Nothing is allocated: a program at full size can be named, and compiled for devices that are not
there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Wrapped
from jax.typing import DTypeLike

from salt_jax import sharding
from salt_jax.config.schema import Recipe
from salt_jax.models.kv_cache import KVCache
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.vae import decode_first, init_vae
from salt_jax.models.wan import init_wan
from salt_jax.planning import bench, updates
from salt_jax.rollout import pixels, sampler
from salt_jax.rollout.causal import ChunkSpec, Steps
from salt_jax.rollout.draws import Draw
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.ode_regression import OdeRegression
from salt_jax.stages.stage import ABSENT, Batch, Stage, Update
from salt_jax.stages.weights import in_dtype, vae_sizes
from salt_jax.train.step import Call, compile_step
from salt_jax.types import Conditioning, Latent, Params, PRNGKey, Sigma, TextEmb

T = TypeVar("T")


class Program(NamedTuple):
    """A jitted function and what it is called with."""

    jitted: Wrapped  # of jax.jit
    args: tuple[object, ...]


def parts(stage: Stage, what: str) -> dict[str, Callable[[], Program]]:
    """The programs of one part of a run, by name, on the mesh of the stage, which only those that
    are made need. None where the recipe has no such part.

    `what`: "student", "critic", "teacher", "stream", "vae" or "text".
    """
    if what in ("student", "critic"):
        return _updates(stage, what)
    if what == "text":
        return {"text encoder": partial(_text_encoder, stage)}
    return {"teacher": _teacher, "stream": _streaming, "vae": _vae}[what](stage)


def place(tree: T, shardings: object) -> T:
    """Shapes that also say where they lie. `shardings`: a tree of them, or one for all."""
    return sharding.laid_out(tree, jax.tree.broadcast(shardings, tree))


def _weights(
    init: Callable[[PRNGKey, T], Params], config: T, dtype: DTypeLike, mesh: Mesh
) -> Params:
    shapes = bench.shapes_of(init, config)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return place(tree, sharding.state_shardings(mesh, tree))


def _teacher_weights(recipe: Recipe, config: WanConfig, mesh: Mesh) -> Params:
    """A teacher in the dtype that it is kept in."""

    def init() -> Params:
        return in_dtype(init_wan(jax.random.key(0), config), recipe.teacher.dtype)

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

    def call() -> Call:
        return Call(jax.random.key(0), jnp.int32(0), jax.tree.map(jnp.asarray, draw))

    batch = place(jax.eval_shape(partial(bench.random_batch, stage)), over_batch)
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

    return {"teacher forward": partial(_teacher_forward, stage)}


def _teacher_forward(stage: Stage) -> Program:
    recipe, mesh = stage.recipe, _mesh(stage)
    network = denoiser_of(recipe, mesh, recipe.teacher_wan)

    def given() -> tuple[Latent, Sigma, Conditioning]:
        size = recipe.batch_size
        clips = jnp.zeros((size, *recipe.clip_shape))
        return clips, jnp.zeros(size), bench.random_cond(recipe, size)

    args = place(jax.eval_shape(given), sharding.batch_sharding(mesh))
    jitted = jax.jit(lambda p, x, sigma, cond: network.denoise(p, x, sigma, cond).velocity)
    return Program(jitted, (_teacher_weights(recipe, recipe.teacher_wan, mesh), *args))


def _trajectories(stage: OdeRegression) -> Program:
    recipe, mesh = stage.recipe, _mesh(stage)
    params = _teacher_weights(recipe, recipe.wan, mesh)

    def given() -> tuple[TextEmb, Batch, PRNGKey]:
        null = jnp.zeros((1, recipe.wan.text_length, recipe.wan.text_dim))
        return null, bench.random_batch(stage)._replace(states=ABSENT), jax.random.key(0)

    null_text, *rest = place(jax.eval_shape(given), sharding.replicated(mesh))
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
    if not recipe.causal:
        return {}
    policy, shape, network = recipe.memory, recipe.clip_shape, stage.student

    def put(make: Callable[..., T], *args: object) -> T:
        return place(jax.eval_shape(make, *args), sharding.replicated(_mesh(stage)))

    def given() -> tuple[Params, KVCache, Conditioning]:
        params = _weights(init_wan, recipe.wan, jnp.bfloat16, _mesh(stage))
        cache = put(partial(network.empty_cache, 1, policy.capacity(shape[0]), shape[1:]))
        words = (1, recipe.wan.text_length, recipe.wan.text_dim)
        return params, cache, put(lambda: Conditioning(jnp.zeros(words)))

    def read() -> Program:
        params, _, cond = given()
        return Program(sampler.read_prompt.jitted, (network, params, cond))

    def chunk(size: int) -> Program:
        params, cache, cond = given()
        cross = put(network.read, params, cond)
        steps = put(
            lambda: Steps(jnp.zeros(sampler.USUAL_STEPS + 1), jnp.int32(0), recipe.sample.solver)
        )
        call = put(lambda: (sampler.clip_keys(0, 1), jnp.int32(0)))
        spec = ChunkSpec(size, policy)
        return Program(
            sampler.make_chunk.jitted, (network, params, cache, cross, steps, call, spec)
        )

    def again() -> Program:
        params, cache, cond = given()
        return Program(sampler.read_again.jitted, (network, params, cache, cond, policy))

    sizes = sorted(set(policy.sizes(shape[0])))
    chunks = {f"stream: chunk of {size}": partial(chunk, size=size) for size in sizes}
    return {"stream: read text": read, **chunks, "stream: new prompt": again}


def _vae(stage: Stage) -> dict[str, Callable[[], Program]]:
    """Of `rollout.pixels.stream_pixels`: one video, its first frame and then as many as come
    together.
    """
    recipe = stage.recipe
    config = vae_sizes(recipe)
    if recipe.wan.out_channels != config.z_dim:
        return {}
    frames, *picture = recipe.clip_shape
    sizes = recipe.memory.sizes(frames) if recipe.causal else (frames,)
    later = sorted({size - (not i) for i, size in enumerate(sizes)} - {0})

    def given(size: int) -> tuple[Params, Latent]:
        values = lambda: (init_vae(jax.random.key(0), config), jnp.zeros((1, size, *picture)))
        return place(jax.eval_shape(values), sharding.replicated(_mesh(stage)))

    def first() -> Program:
        return Program(pixels.decode_first_frame, (*given(1), config, jnp.float32))

    def following(size: int) -> Program:
        decode = partial(decode_first, config=config, dtype=jnp.float32)
        _, cache = jax.eval_shape(decode, *given(1))
        params, chunk = given(size)
        cache = place(cache, sharding.replicated(_mesh(stage)))
        return Program(pixels.decode_more, (params, cache, chunk, config, jnp.float32))

    more = {f"VAE decode: {size} more": partial(following, size=size) for size in later}
    return {"VAE decode: first frame": first, **more}


def _text_encoder(stage: Stage) -> Program:
    """One prompt of full length."""
    recipe, mesh = stage.recipe, _mesh(stage)
    dtype, everywhere = recipe.compute.dtype, sharding.replicated(mesh)
    shape = (1, recipe.wan.text_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)
    encode = jax.jit(partial(encode_text, config=recipe.text, dtype=dtype))
    return Program(encode, (_weights(init_text_encoder, recipe.text, dtype, mesh), tokens))
