"""Causal ODE regression: from any of its few levels the student learns the end of the causal
teacher's trajectory, which is not the data's clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from salt_jax.config.schema import Recipe
from salt_jax.data.pipeline import collate
from salt_jax.data.trajectories import open_trajectories
from salt_jax.flow.transition import euler
from salt_jax.losses.regression import endpoint_loss
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.rollout.replay import plan_teacher_forcing
from salt_jax.sharding import batch_sharding, put_rows, replicated
from salt_jax.stages import causal, single
from salt_jax.stages.accumulate import in_turn
from salt_jax.stages.networks import denoiser_of
from salt_jax.stages.stage import (
    Aux,
    Batch,
    Frozen,
    Inputs,
    RecordSource,
    Update,
)
from salt_jax.types import Conditioning, Params, PRNGKey


@dataclass(frozen=True)
class OdeRegression:
    """Batches have trajectories of `trajectory`."""

    recipe: Recipe
    mesh: Mesh | None = None
    learners = single.LEARNERS
    needs = ("cond", "video", "states")
    contradictions = causal.ode_contradictions
    parts = causal.teacher_parts
    frozen = causal.frozen
    first_state = single.from_start
    updates = single.updates
    passes = single.passes
    mean_passes = causal.mean_passes
    memory = causal.memory

    @property
    def student(self) -> WanDenoiser:
        return denoiser_of(self.recipe, self.mesh)

    def noise(self, key: PRNGKey, batch: Batch) -> Int[Array, "b"]:
        """Which of the student's levels an example is at."""
        return jax.random.randint(key, (batch.size,), 0, self.recipe.schedule.train_levels)

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        batch, level, r = inputs.batch, inputs.noise, self.recipe
        levels = jnp.asarray(r.levels(r.schedule.train_levels)[:-1])
        x = jnp.take_along_axis(batch.states, level.reshape(-1, 1, 1, 1, 1, 1), axis=1)[:, 0]
        plan = plan_teacher_forcing(self.student, params, batch.video, batch.cond, r.memory)
        x0 = self.student.denoise(params, x, levels[level], batch.cond, plan).x0
        value = endpoint_loss(x0, batch.states[:, -1]).mean()
        return value, Aux({"ode_regression": value})

    def records(self, source: RecordSource) -> Sequence:
        """Trajectories of the clips, made where they are missing in the workdir."""
        mesh = self.mesh
        assert mesh is not None
        trajectory = jax.jit(self.trajectory, out_shardings=replicated(mesh))

        def make(records: Sequence, number: int) -> dict[str, np.ndarray]:
            arrays = collate(records, source.encode_caption, self.recipe.world)
            rows, where = np.arange(len(records)), batch_sharding(mesh)
            place = lambda x: put_rows(x, rows, len(rows), where)
            batch = Batch(Conditioning(place(arrays["text"])), video=place(arrays["video"]))
            key = jax.random.fold_in(jax.random.key(self.recipe.seed), number)
            states = np.asarray(trajectory(source.frozen, batch, key))
            return {"video": arrays["video"], "states": states}

        directory = source.workdir / "trajectories"
        return open_trajectories(directory, self.recipe, make, source.clips, source.files_may_move)

    def trajectory(self, frozen: Frozen, batch: Batch, key: PRNGKey) -> Float[Array, "b n f h w c"]:
        """The causal teacher's Euler trajectories of a batch of `video` and `cond`: its states at
        the student's levels, and its end.
        """
        r, network = self.recipe, self.student
        levels = causal.ode_levels(r)
        kept = np.flatnonzero(np.isin(levels, r.levels(r.schedule.train_levels)[:-1]))
        pairs = jnp.asarray(levels[:-1]), jnp.asarray(levels[1:])

        def run(part):
            x0, cond, noise = part
            velocity = causal.forced_velocity(
                network, frozen["teacher"], x0, cond, frozen["null_text"], r
            )

            def step(x, pair):
                sigma, after = (jnp.full(len(x), level) for level in pair)
                return euler(x, velocity(x, sigma), sigma, after), x

            x, states = jax.lax.scan(step, noise, pairs)
            return jnp.concatenate([jnp.moveaxis(states[kept], 0, 1), x[:, None]], axis=1)

        noise = jax.random.normal(key, batch.video.shape)
        return in_turn(run, (batch.video, batch.cond, noise), r.accumulate)
