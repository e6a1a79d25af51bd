"""The stages before distillation: a teacher from data, and a bidirectional network made causal, in
three ways.

| stage           | the student learns                                                  | as in    |
|-----------------|---------------------------------------------------------------------|----------|
| denoising       | a teacher and its text encoder, on whole clips                      | -        |
| teacher_forcing | to denoise each chunk given the clean chunks before it              | stage 1  |
| ode_regression  | the end of the causal teacher's trajectory from any of its levels   | stage 2a |
| consistency     | without trajectories: to agree with itself one teacher update later | stage 2b |

Stages 1, 2a and 2b are those of Causal Forcing. The causal teacher of the last two is the network
they start from. Self-Forcing and CausVid start from an ODE regression whose teacher is
bidirectional; Causal Forcing argues that a causal student cannot follow its trajectories.
"""

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.config.schema import Recipe
from salt_jax.flow.draws import draw_renoise_sigma
from salt_jax.flow.prediction import add_noise, guide
from salt_jax.flow.schedule import grid
from salt_jax.flow.transition import euler
from salt_jax.losses.flow_matching import flow_matching_loss, midlevel_weight
from salt_jax.losses.regression import endpoint_loss
from salt_jax.models.denoiser import Network
from salt_jax.models.text_encoder import encode_text
from salt_jax.rollout.causal import teacher_forcing
from salt_jax.state import TrainState, fetched
from salt_jax.train.accumulate import in_turn
from salt_jax.train.begin import Batch, draw_renoise
from salt_jax.train.step import Frozen, Metrics, Networks, move_student
from salt_jax.types import Params, PRNGKey


def stage_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: PRNGKey,
    draw: None,
    nets: Networks,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One update of the network that the stage trains, and of its EMA."""
    loss = {
        "denoising": denoising_loss,
        "teacher_forcing": teacher_forcing_loss,
        "ode_regression": ode_regression_loss,
        "consistency": consistency_loss,
    }[recipe.stage]

    ema = fetched(state.ema, recipe.host_state)

    def named(params, batch, noise, stream):
        value = loss(params, ema, frozen, batch, noise, nets, recipe)
        return value, ({recipe.stage: value}, None)

    return move_student(state, named, batch, draw_stage(key, batch, recipe), recipe)


def draw_stage(key: PRNGKey, batch: Batch, recipe: Recipe) -> dict[str, jax.Array]:
    """What is random in an update, of the whole batch: what its stage's loss reads as `noise`."""
    x0, renoise = batch["video"], recipe.renoise
    if recipe.stage == "denoising":
        k_drop, k_renoise = jax.random.split(key)
        drop = jax.random.bernoulli(k_drop, recipe.caption_dropout, (len(x0), 1))
        return {"drop": drop} | dict(
            zip(("noise", "sigma"), draw_renoise(k_renoise, x0.shape, recipe), strict=True)
        )
    if recipe.stage == "ode_regression":
        return {"level": jax.random.randint(key, (len(x0),), 0, recipe.schedule.train_levels)}
    if recipe.stage == "consistency":
        k_level, k_noise = jax.random.split(key)
        level = jax.random.randint(k_level, (len(x0),), 0, len(ode_levels(recipe)) - 1)
        return {"level": level, "noise": jax.random.normal(k_noise, x0.shape)}
    k_drop, k_sigma, k_noise = jax.random.split(key, 3)
    sizes = recipe.memory.sizes(recipe.clip_shape[0])
    drop = jax.random.bernoulli(k_drop, recipe.caption_dropout, (len(x0), 1, 1))
    levels = draw_renoise_sigma(
        k_sigma, len(x0) * len(sizes), renoise.shift, renoise.lowest, renoise.highest
    )
    sigma = jnp.repeat(
        levels.reshape(len(x0), -1), np.array(sizes), axis=1, total_repeat_length=sum(sizes)
    )
    return {"drop": drop, "sigma": sigma, "noise": jax.random.normal(k_noise, x0.shape)}


def denoising_loss(
    params: Params,
    ema: Params,
    frozen: Frozen,
    batch: Batch,
    noise: dict,
    nets: Networks,
    recipe: Recipe,
) -> jax.Array:
    """Flow matching for a teacher-to-be and its text encoder together; some examples see the empty
    caption.

    The target is the data's velocity, or, where there is a teacher already, its velocity: for the
    closed form that is the conditional mean of the former, so the minimiser is the same and the
    gradient has less variance.
    """
    x0, tokens, fresh, sigma = batch["video"], batch["text"], noise["noise"], noise["sigma"]
    null = jnp.zeros_like(tokens).at[:, 0].set(1)  # the empty caption: only the end token
    tokens = jnp.where(noise["drop"], null, tokens)
    text = encode_text(params["text_encoder"], tokens, recipe.text)
    x = add_noise(x0, fresh, sigma)
    velocity = nets.student.denoise(params["wan"], x, sigma, text).velocity
    if recipe.teacher.kind != "data":
        target = nets.teacher(
            frozen["teacher"], x, sigma, tokens[..., None].astype(jnp.float32)
        ).velocity
        x0 = fresh - target
    return flow_matching_loss(velocity, x0, fresh).mean()


def teacher_forcing_loss(
    params: Params,
    ema: Params,
    frozen: Frozen,
    batch: Batch,
    noise: dict,
    nets: Networks,
    recipe: Recipe,
) -> jax.Array:
    """Flow matching with a level for each chunk, every chunk seeing the clean ones before it."""
    x0, sigma, fresh = batch["video"], noise["sigma"], noise["noise"]
    text = jnp.where(noise["drop"], frozen["null_text"], batch["text"])
    sight = teacher_forcing(nets.student, params, x0, text, recipe.memory)
    velocity = nets.student.denoise(
        params, add_noise(x0, fresh, sigma), sigma, text, sight
    ).velocity
    return flow_matching_loss(
        velocity, x0, fresh, midlevel_weight(sigma, recipe.renoise.shift)
    ).mean()


def ode_regression_loss(
    params: Params,
    ema: Params,
    frozen: Frozen,
    batch: Batch,
    noise: dict,
    nets: Networks,
    recipe: Recipe,
) -> jax.Array:
    """From a stored state at one of the student's levels to the end of its trajectory, which is not
    the data's clip.
    """
    levels, level = recipe.levels(recipe.schedule.train_levels)[:-1], noise["level"]
    x = jnp.take_along_axis(batch["states"], level.reshape(-1, 1, 1, 1, 1, 1), axis=1)[:, 0]
    sight = teacher_forcing(nets.student, params, batch["video"], batch["text"], recipe.memory)
    x0 = nets.student.denoise(params, x, jnp.asarray(levels)[level], batch["text"], sight).x0
    return endpoint_loss(x0, batch["states"][:, -1]).mean()


def consistency_loss(
    params: Params,
    ema: Params,
    frozen: Frozen,
    batch: Batch,
    noise: dict,
    nets: Networks,
    recipe: Recipe,
) -> jax.Array:
    """The student at one level against its average at the next, which one guided update of the
    teacher leads to.

    The grid is exact, in float32, and ends at 0, where the average's estimate is the state itself:
    the boundary.
    """
    x0, text, levels = batch["video"], batch["text"], jnp.asarray(ode_levels(recipe))
    sigma, after = levels[noise["level"]], levels[noise["level"] + 1]
    x = add_noise(x0, noise["noise"], sigma)
    step = forced_velocity(nets.student, frozen["teacher"], x0, text, frozen["null_text"], recipe)
    x_after = euler(x, step(x, sigma), sigma, after)
    at = lambda p, x, sigma: (
        nets.student.denoise(
            p, x, sigma, text, teacher_forcing(nets.student, p, x0, text, recipe.memory)
        ).x0
    )
    return endpoint_loss(at(params, x, sigma), at(ema, x_after, after)).mean()


def ode_levels(recipe: Recipe) -> np.ndarray:
    """Levels of the causal teacher's steps, falling to 0: those of `config.ode.num_steps`, and the
    student's.
    """
    student, teacher = (
        recipe.levels(recipe.schedule.train_levels),
        grid(recipe.ode.num_steps, recipe.schedule.shift),
    )
    return np.union1d(student, teacher)[::-1]


def forced_velocity(network: Network, params: Params, x0, text, null_text, recipe: Recipe):
    """(x, sigma) -> the guided velocity of all chunks at once, each given the clean chunks before
    it.
    """
    texts = text, jnp.broadcast_to(null_text, text.shape)
    sights = [teacher_forcing(network, params, x0, t, recipe.memory) for t in texts]

    def velocity(x, sigma):
        conditional, unconditional = (
            network.denoise(params, x, sigma, t, s) for t, s in zip(texts, sights, strict=True)
        )
        return guide(conditional, unconditional, recipe.ode.guidance).velocity

    return velocity


def trajectory(
    network: Network, params: Params, batch: Batch, null_text, key: PRNGKey, recipe: Recipe
) -> jax.Array:
    """The causal teacher's Euler trajectories, at the student's levels and at the end:
    [B, n + 1, F, H, W, C].
    """
    levels = ode_levels(recipe)
    kept = np.flatnonzero(np.isin(levels, recipe.levels(recipe.schedule.train_levels)[:-1]))
    pairs = jnp.asarray(levels[:-1]), jnp.asarray(levels[1:])

    def run(part):
        x0, text, noise = part
        step = forced_velocity(network, params, x0, text, null_text, recipe)

        def update(x, pair):
            sigma, after = (jnp.full(len(x), level) for level in pair)
            return euler(x, step(x, sigma), sigma, after), x

        x, states = jax.lax.scan(update, noise, pairs)
        return jnp.concatenate([jnp.moveaxis(states[kept], 0, 1), x[:, None]], axis=1)

    noise = jax.random.normal(key, batch["video"].shape)
    return in_turn(run, (batch["video"], batch["text"], noise), recipe.accumulate)
