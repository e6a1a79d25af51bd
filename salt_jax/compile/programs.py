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

from salt_jax import sample, sharding
from salt_jax.config.schema import Recipe
from salt_jax.models.presets import WanConfig
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.models.vae import init_vae
from salt_jax.models.wan import init_wan
from salt_jax.moving_shapes.exact import closed_form_denoiser
from salt_jax.planning import bench
from salt_jax.rollout.draws import Choice
from salt_jax.train.setup import make_network
from salt_jax.train.stages import stage_step, trajectory
from salt_jax.train.start import in_dtype
from salt_jax.train.step import Networks, compile_step


class Program(NamedTuple):
    """A jitted function and what it is called with."""

    jitted: Any  # of jax.jit
    args: tuple[Any, ...]


def programs(recipe: Recipe, what: str) -> dict[str, Callable[[Mesh], Program]]:
    """Of one part of a run: name -> the program on a mesh. None where the recipe has no such part.

    `what`: "student", "critic", "teacher", "stream", "vae" or "text".
    """
    updates = partial(_updates, recipe)
    return {
        "student": lambda: updates("student"),
        "critic": lambda: updates("critic") if recipe.stage == "distil" else {},
        "teacher": lambda: _teacher(recipe),
        "stream": lambda: _streaming(recipe) if recipe.causal else {},
        "vae": lambda: _vae(recipe),
        "text": lambda: {"text encoder": partial(_text_encoder, recipe)},
    }[what]()


def place(tree: Any, shardings: Any) -> Any:
    """Shapes that also say where they lie. `shardings`: a tree of them, or one for all."""
    put = lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, jax.tree.broadcast(shardings, tree), tree)


def _weights(init: Callable, config: Any, dtype: Any, mesh: Mesh) -> Any:
    shapes = bench.shapes_of(init, config)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return place(tree, sharding.state_shardings(mesh, tree))


def _teacher_weights(recipe: Recipe, config: WanConfig, mesh: Mesh) -> Any:
    """A teacher in the dtype that it is kept in."""
    params = jax.eval_shape(
        lambda: in_dtype(init_wan(jax.random.key(0), config), recipe.teacher.dtype)
    )
    return place(params, sharding.state_shardings(mesh, params))


def _batch(recipe: Recipe) -> dict[str, Any]:
    told = bench.random_told(recipe, recipe.batch_size)
    batch = {"video": jnp.zeros((recipe.batch_size, *recipe.clip_shape)), "text": told}
    if recipe.stage == "denoising":
        batch["text"] = jnp.zeros((recipe.batch_size, recipe.wan.text_length), jnp.int32)
    if recipe.stage == "ode_regression":
        steps = recipe.schedule.train_levels + 1
        batch["states"] = jnp.zeros((recipe.batch_size, steps, *recipe.clip_shape))
    return batch


def _updates(recipe: Recipe, who: str) -> dict[str, Callable[[Mesh], Program]]:
    if recipe.stage != "distil":
        return {f"{recipe.stage} step": lambda mesh: _step(recipe, mesh, stage_step, None)}
    made = lambda mesh, choice, draw: _step(recipe, mesh, bench.STEPS[who], draw, choice=choice)
    return {
        bench.step_name(who, choice): partial(made, choice=choice, draw=draw)
        for choice, draw in bench.programs(recipe, who).items()
    }


def _step(recipe: Recipe, mesh: Mesh, step: Callable, draw: Any, **static: Choice) -> Program:
    """One update. `draw` has values, of which only shapes matter."""
    shapes, shardings = bench.forms(recipe, mesh)
    over_batch, everywhere = shardings[2:]
    if recipe.stage == "distil":
        nets = bench.networks(recipe, mesh)
    else:
        network = make_network(recipe, mesh)
        judge = closed_form_denoiser if recipe.stage == "denoising" else network.denoise
        nets = Networks(network, network.denoise, judge)
    jitted = compile_step(step, nets, recipe, shardings, **static)
    rest = jax.eval_shape(
        lambda: (jax.random.key(0), jnp.int32(0), jax.tree.map(jnp.asarray, draw))
    )
    batch = place(jax.eval_shape(lambda: _batch(recipe)), over_batch)
    return Program(jitted, (*map(place, shapes, shardings[:2]), batch, *place(rest, everywhere)))


def _teacher(recipe: Recipe) -> dict[str, Callable[[Mesh], Program]]:
    """One evaluation of the teacher's network on a batch, without guidance and without gradient.

    Of ODE regression: a batch of the causal teacher's trajectories, as `make_trajectories` makes
    them.
    """
    if recipe.stage == "ode_regression":
        return {"trajectories": partial(_trajectories, recipe)}
    if recipe.teacher.kind != "network":
        return {}

    def forward(mesh: Mesh) -> Program:
        network = make_network(recipe, mesh, recipe.teacher_wan)
        batch = place(jax.eval_shape(lambda: _batch(recipe)), sharding.batch_sharding(mesh))
        sigma = place(
            jax.eval_shape(lambda: jnp.zeros(recipe.batch_size)), sharding.batch_sharding(mesh)
        )
        jitted = jax.jit(lambda p, x, sigma, told: network.denoise(p, x, sigma, told).velocity)
        params = _teacher_weights(recipe, recipe.teacher_wan, mesh)
        return Program(jitted, (params, batch["video"], sigma, batch["text"]))

    return {"teacher forward": forward}


def _trajectories(recipe: Recipe, mesh: Mesh) -> Program:
    network, everywhere = make_network(recipe, mesh), sharding.replicated(mesh)
    params = _teacher_weights(recipe, recipe.wan, mesh)
    null = lambda: jnp.zeros((1, recipe.wan.text_length, recipe.wan.text_dim))
    rest = lambda: (
        {name: _batch(recipe)[name] for name in ("video", "text")},
        null(),
        jax.random.key(0),
    )
    make = jax.jit(lambda p, batch, null, key: trajectory(network, p, batch, null, key, recipe))
    return Program(make, (params, *place(jax.eval_shape(rest), everywhere)))


def _streaming(recipe: Recipe) -> dict[str, Callable[[Mesh], Program]]:
    """Of `sample.stream_chunks`: one video chunk by chunk, bfloat16 weights spread over all
    devices.
    """
    policy, solver, shape = recipe.memory, recipe.sample.solver, recipe.clip_shape

    def parts(mesh: Mesh) -> tuple[Any, ...]:
        network, everywhere = make_network(recipe, mesh), sharding.replicated(mesh)
        params = _weights(init_wan, recipe.wan, jnp.bfloat16, mesh)
        slots = policy.capacity(shape[0])
        like = jnp.zeros((1, 0, *shape[1:]))
        cache = place(jax.eval_shape(lambda: network.empty_cache(like, slots)), everywhere)
        words = jax.eval_shape(lambda: jnp.zeros((1, recipe.wan.text_length, recipe.wan.text_dim)))
        return network, params, cache, place(words, everywhere), everywhere

    def read_text(mesh: Mesh) -> Program:
        network, params, _, words, _ = parts(mesh)
        return Program(sample._read_text, (network, params, words))

    def chunk(mesh: Mesh, size: int) -> Program:
        network, params, cache, words, everywhere = parts(mesh)
        text = place(jax.eval_shape(network.read_text, params, words), everywhere)
        values = lambda: (
            jnp.zeros(sample.USUAL_STEPS + 1),
            jnp.int32(0),
            sample.clip_keys(0, 1),
            jnp.int32(0),
        )
        levels, last, keys, jump = place(jax.eval_shape(values), everywhere)
        args = (network, params, cache, text, levels, last, solver, keys, size, policy, jump)
        return Program(sample._next_chunk, args)

    def again(mesh: Mesh) -> Program:
        network, params, cache, words, _ = parts(mesh)
        return Program(sample._recache, (network, params, cache, words, policy))

    sizes = sorted(set(policy.sizes(shape[0])))
    chunks = {f"stream: chunk of {size}": partial(chunk, size=size) for size in sizes}
    return {"stream: read text": read_text, **chunks, "stream: new prompt": again}


def _vae(recipe: Recipe) -> dict[str, Callable[[Mesh], Program]]:
    """Of `sample.stream_pixels`: one video, its first frame and then as many as come together."""
    config = VAE_PRESETS["tiny" if recipe.model.preset.endswith("tiny") else "wan2.1"]
    if recipe.wan.out_channels != config.z_dim:
        return {}
    frames, *picture = recipe.clip_shape
    sizes = recipe.memory.sizes(frames) if recipe.causal else (frames,)
    later = sorted({size - (not i) for i, size in enumerate(sizes)} - {0})

    def latents(mesh: Mesh, size: int) -> tuple[Any, Any]:
        values = lambda: (init_vae(jax.random.key(0), config), jnp.zeros((1, size, *picture)))
        return place(jax.eval_shape(values), sharding.replicated(mesh))

    def first(mesh: Mesh) -> Program:
        return Program(sample._decode_first, (*latents(mesh, 1), config, jnp.float32))

    def following(mesh: Mesh, size: int) -> Program:
        decode = lambda params, one: sample.decode_first(params, one, config, jnp.float32)
        _, memory = jax.eval_shape(decode, *latents(mesh, 1))
        params, chunk = latents(mesh, size)
        memory = place(memory, sharding.replicated(mesh))
        return Program(sample._decode_next, (params, memory, chunk, config, jnp.float32))

    more = {f"VAE decode: {size} more": partial(following, size=size) for size in later}
    return {"VAE decode: first frame": first, **more}


def _text_encoder(recipe: Recipe, mesh: Mesh) -> Program:
    """One prompt of full length."""
    dtype, everywhere = recipe.compute.dtype, sharding.replicated(mesh)
    tokens = place(
        jax.eval_shape(lambda: jnp.ones((1, recipe.wan.text_length), jnp.int32)), everywhere
    )
    encode = jax.jit(partial(encode_text, config=recipe.text, dtype=dtype))
    return Program(encode, (_weights(init_text_encoder, recipe.text, dtype, mesh), tokens))
