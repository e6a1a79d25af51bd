"""A distillation whose networks are two matrices: its updates compile in a second."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from salt_jax.config.reading import read_recipe
from salt_jax.flow.prediction import from_velocity
from salt_jax.models.text_encoder import init_text_encoder
from salt_jax.rollout.draws import Terms
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Batch, Update
from salt_jax.state import first_state
from salt_jax.train.step import Call, compile_step
from salt_jax.types import Conditioning
from tests.helpers import layout, with_networks

CLIPS = (8, 2, 4, 4, 3)  # B F H W C
TEXT = 4  # width of the text that the toy reads

RECIPE = read_recipe(base.get_config())
# eps: a gradient of almost zero would turn the rounding of a sharded sum into a whole step of Adam.
OPTIMIZER = replace(RECIPE.student_optimizer, learning_rate=1e-2, eps=1e-3)
RECIPE = replace(
    RECIPE,
    world=replace(RECIPE.world, frames=CLIPS[1], size=CLIPS[2]),
    student_optimizer=OPTIMIZER,
    critic_optimizer=OPTIMIZER,
    ema=replace(RECIPE.ema, decay=0.9, start=0),
    # levels far apart: self-consistency has something to say
    schedule=replace(RECIPE.schedule, shift=2.0),
    critic_ratio=2,
)
# of a whole clip's student and critic
UPDATES = {
    "student": Update("student", Terms(self_consistency=True)),
    "critic": Update("critic"),
}


@dataclass(frozen=True)
class Toy:
    """Velocity = out tanh(in [x, sigma, mean text]), per pixel."""

    def denoise(self, params, x, sigma, cond, plan=None):
        per_pixel = lambda z: jnp.broadcast_to(
            z.reshape(z.shape[0], 1, 1, 1, -1), (*x.shape[:-1], z.size // z.shape[0])
        )
        h = jnp.concatenate([x, per_pixel(sigma), per_pixel(cond.text.mean(1))], axis=-1)
        velocity = jnp.tanh(h @ params["in"]["kernel"]) @ params["out"]["kernel"]
        return from_velocity(x, velocity, sigma)


def toy_params(seed, text_dim=TEXT):
    k_in, k_out = jax.random.split(jax.random.key(seed))
    inner = jax.random.normal(k_in, (3 + 1 + text_dim, 16))
    return {"in": {"kernel": inner}, "out": {"kernel": 0.5 * jax.random.normal(k_out, (16, 3))}}


TEACHER = toy_params(2)
FROZEN = {"teacher": TEACHER, "null_text": jax.random.normal(jax.random.key(5), (1, 3, TEXT))}


def stage_of(recipe=RECIPE, mesh=None, student=Toy()):
    """Under a toy as critic and as teacher."""
    return with_networks(make_stage(recipe, mesh), student=student, critic=Toy(), teacher=Toy())


def toy_state(recipe=RECIPE):
    """Moments and EMA as in the middle of a run: no two trees are equal."""
    state = first_state(recipe, {"student": toy_params(0), "critic": toy_params(1)})
    return replace(state, iteration=jnp.int32(3), ema=toy_params(4))


def batch_of(seed, shape=CLIPS, text=(3, TEXT)):
    k_video, k_text = jax.random.split(jax.random.key(seed))
    video = jax.random.uniform(k_video, shape, minval=-1.0)
    return Batch(Conditioning(jax.random.normal(k_text, (shape[0], *text))), video=video)


@functools.cache
def compiled(who, recipe=RECIPE):
    """An update on one device, compiled once for all tests."""
    return compile_step(stage_of(recipe), UPDATES[who], layout(toy_state(), FROZEN))


def run_toy(who, state, batch, index=0):
    """One update of the student or the critic; `state` is given up."""
    call = Call(jax.random.key(7), jnp.int32(index), None)
    return compiled(who)(state, FROZEN, batch, call)


# Stage denoising: a teacher-to-be and its text encoder.

WIDE = 64  # width of the tiny text encoder


def denoising(kind, dropout, accumulate=1):
    teacher = replace(RECIPE.teacher, kind=kind)
    recipe = replace(RECIPE, stage="denoising", teacher=teacher, caption_dropout=dropout)
    return with_networks(make_stage(replace(recipe, accumulate=accumulate)), student=Toy())


def tokens(count):
    """A different caption for each clip: end token 1, padding 0."""
    ids = np.arange(count)[:, None] * 7 + np.arange(5)[None] + 10
    return jnp.asarray(
        np.concatenate([ids, np.ones((count, 1)), np.zeros((count, 2))], axis=1), jnp.int32
    )


def captioned(captions):
    return Batch(tokens=captions, video=batch_of(0).video)


@functools.cache
def denoising_params():
    make = jax.jit(init_text_encoder, static_argnums=1)
    return {"wan": toy_params(0, WIDE), "text_encoder": make(jax.random.key(3), RECIPE.text)}


def denoising_state():
    return first_state(RECIPE, {"student": denoising_params()})
