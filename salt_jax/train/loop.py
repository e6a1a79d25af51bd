"""A run from its first iteration, or from where it stopped, to its last: the one place where time passes.

One iteration is one student update followed by the critic's. A batch, and everything random, is a function of
(seed, number of the update), so a run that is killed and started again does what it would have done.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from salt_jax.data import moving_shapes, shapes
from salt_jax.data.pipeline import batches
from salt_jax.errors import UserError
from salt_jax.models.closed_form import closed_form_denoiser, closed_form_params
from salt_jax.models.denoiser import guided, wan_denoiser
from salt_jax.models.text_encoder import encode_text, init_text_encoder
from salt_jax.models.tokenizer import byte_tokenize
from salt_jax.models.wan import init_wan
from salt_jax.models.weights import load_weights
from salt_jax.train import checkpoint, sharding
from salt_jax.train.recipe import Recipe, make_optimizer, to_json
from salt_jax.train.state import TrainState, init_learner, init_state
from salt_jax.train.step import Networks, compile_step, critic_step, denoising_step, student_step
from salt_jax.types import Params


class Run(NamedTuple):
    """Everything an iteration needs besides the state."""

    teacher: Params
    student_step: Callable
    critic_step: Callable
    critic_updates: int


def initial_weights(recipe: Recipe) -> Params:
    """{"wan", "text_encoder"}: from the file that the recipe names, or fresh."""
    k_wan, k_text = jax.random.split(jax.random.key(recipe.seed))

    def fresh():
        return {"wan": init_wan(k_wan, recipe.wan), "text_encoder": init_text_encoder(k_text, recipe.text)}

    if not recipe.weights:
        return jax.jit(fresh)()
    return load_weights(recipe.weights, jax.eval_shape(fresh))


def tokenize(recipe: Recipe, caption: str) -> np.ndarray:
    """A caption as int32 [T]."""
    return byte_tokenize(caption, recipe.wan.text_length)


def embed(recipe: Recipe, text_encoder: Params, captions: tuple[str, ...]) -> np.ndarray:
    """Captions as float32 [N, T, D], by the frozen text encoder."""
    tokens = np.stack([tokenize(recipe, c) for c in captions])
    encode = jax.jit(lambda p, t: encode_text(p, t, recipe.text))
    return np.asarray(encode(text_encoder, tokens))


def closed_form(recipe: Recipe, encode: Callable[[tuple[str, ...]], np.ndarray]) -> Params:
    """All clips of the world by caption, for the closed-form denoiser."""
    if recipe.world.pair:
        raise UserError("the pair world has too many clips for the closed form; set config.teacher.kind=network")
    scenes, modes = shapes.scenes(recipe.world), shapes.modes(recipe.world)
    clips = [[shapes.to_latent(shapes.render(s, m, recipe.world)) for m in modes] for s in scenes]
    return closed_form_params(np.array(clips), encode(tuple(map(shapes.caption, scenes))))


def prepare(recipe: Recipe, weights: Params) -> tuple[TrainState, Params, Networks, Callable[[str], np.ndarray]]:
    """Initial state, teacher parameters, apply functions, and how a caption enters a batch."""
    student = wan_denoiser(recipe.wan, recipe.compute)
    learner = lambda params, o, n: init_learner(params, make_optimizer(o, n))
    tokens = functools.partial(tokenize, recipe)
    if recipe.stage == "denoising":
        state = init_state(learner(weights, recipe.student_optimizer, recipe.updates), None)
        as_text = lambda captions: np.stack([tokens(c) for c in captions])[..., None].astype(np.float32)
        teacher = {} if recipe.teacher.kind == "data" else closed_form(recipe, as_text)
        return state, teacher, Networks(student, student, closed_form_denoiser), tokens
    if recipe.teacher.kind == "data":
        raise UserError("config.teacher.kind=data has no teacher to distil; choose network or closed_form")
    encode = functools.partial(embed, recipe, weights["text_encoder"])
    exact = recipe.teacher.kind == "closed_form"
    teacher, denoise = (closed_form(recipe, encode), closed_form_denoiser) if exact else (weights["wan"], student)
    teacher_net = guided(denoise, jnp.asarray(encode(("",))), recipe.teacher.guidance)
    critic_updates = recipe.updates * recipe.critic_updates
    state = init_state(
        learner(weights["wan"], recipe.student_optimizer, recipe.updates),
        learner(weights["wan"], recipe.critic_optimizer, critic_updates),
    )
    return state, teacher, Networks(student, student, teacher_net), lambda caption: encode((caption,))[0]


def iterate(state: TrainState, run: Run, feed: Iterator[Any], key: jax.Array, iteration: int) -> tuple[TrainState, Any]:
    """One student update, then the critic's; each update has its own batch and its own key."""
    first = iteration * (1 + run.critic_updates)
    index = lambda i: jnp.int32(first + i)
    state, metrics = run.student_step(state, run.teacher, next(feed), key, index(0))
    for i in range(run.critic_updates):
        state, more = run.critic_step(state, run.teacher, next(feed), key, index(1 + i))
        metrics = metrics | more
    return state, metrics


def train(recipe: Recipe, workdir: str | Path) -> TrainState:
    """Trains until `recipe.updates`, resuming what the workdir holds.

    The workdir gets config.json, TensorBoard events and checkpoints.

    Raises:
      UserError: weights or checkpoints do not fit the recipe, the workdir is not writable, or too many updates in a
        row were not finite (the term is named).
    """
    mesh = sharding.make_mesh(dataclasses.asdict(recipe.mesh))
    state, teacher, nets, encode_caption = prepare(recipe, initial_weights(recipe))
    abstract = jax.eval_shape(lambda: state)
    shard_state, shard_teacher = (sharding.state_shardings(mesh, t) for t in (abstract, teacher))
    everywhere, over_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    shardings = (shard_state, shard_teacher, over_batch, everywhere)
    train_source, _ = moving_shapes.build(recipe.data.dir, recipe.world, **_data(recipe))
    with checkpoint.open_checkpoints(workdir, recipe.keep) as manager:
        (Path(workdir) / "config.json").write_text(to_json(recipe))
        wanted = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shard_state
        )
        restored = checkpoint.restore(manager, wanted)
        state = restored[0] if restored else sharding.place(state, shard_state)
        denoising = recipe.stage == "denoising"
        run = Run(
            sharding.place(teacher, shard_teacher),
            compile_step(denoising_step if denoising else student_step, nets, recipe, shardings),
            compile_step(critic_step, nets, recipe, shardings),
            0 if denoising else recipe.critic_updates,
        )
        start = int(state.step)
        feed = batches(
            train_source,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            start=start * (1 + run.critic_updates),
            encode_caption=encode_caption,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        feed = (to_device(b, over_batch) for b in feed)
        key = jax.device_put(jax.random.key(recipe.seed + 1), everywhere)
        meta = {"config": to_json(recipe), "mesh": dict(mesh.shape)}
        with SummaryWriter(str(workdir)) as writer:
            bar = tqdm(range(start, recipe.updates), initial=start, total=recipe.updates, desc=recipe.stage, mininterval=1)
            for iteration in bar:
                state, metrics = iterate(state, run, feed, key, iteration)
                done = iteration + 1
                if done % recipe.log_every == 0 or done == recipe.updates:
                    values = {name: float(v) for name, v in jax.device_get(metrics).items()}
                    report(values, done, writer, bar)
                    stop_if_stuck(values, recipe.max_skipped, done)
                if done % recipe.save_every == 0 or done == recipe.updates:
                    checkpoint.save(manager, state, meta)
    return state


def to_device(batch: dict[str, np.ndarray], over_batch: Any) -> dict[str, jax.Array]:
    """This process's share of a batch -> global arrays."""
    place = functools.partial(jax.make_array_from_process_local_data, over_batch)
    return {name: place(batch[name]) for name in ("video", "text")}


def report(values: dict[str, float], step: int, writer: SummaryWriter, bar: tqdm) -> None:
    """Scalars to TensorBoard, the losses to the bar."""
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()
    bar.set_postfix({k: f"{v:.4g}" for k, v in values.items() if not k.endswith(("skipped", "row", "norm"))})


def stop_if_stuck(values: dict[str, float], limit: int, step: int) -> None:
    """Raises UserError, naming the terms that are not finite, once `limit` updates in a row were skipped."""
    for who in ("student", "critic"):
        if values.get(f"{who}_skipped_in_a_row", 0) >= limit:
            bad = [k for k, v in values.items() if not np.isfinite(v)] or ["the gradient"]
            raise UserError(
                f"{values[f'{who}_skipped_in_a_row']:.0f} {who} updates in a row were not finite at update {step} "
                f"({', '.join(bad)}); lower the learning rate, or restart from an earlier checkpoint"
            )
        if values.get(f"{who}_skipped", 0):
            logging.warning("%d %s updates skipped so far: not finite", values[f"{who}_skipped"], who)


def _data(recipe: Recipe) -> dict[str, int]:
    return {"num_train": recipe.data.num_train, "num_test": recipe.data.num_test, "seed": recipe.data.seed}
