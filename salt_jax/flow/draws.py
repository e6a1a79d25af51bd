"""Noise levels drawn in training: shortcut triples of Salt Eq. 9, and levels at which teacher and
critic judge.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from salt_jax.flow.schedule import Triples, grid, shift
from salt_jax.types import PRNGKey


def draw_triple(
    key: PRNGKey, start: Int[Array, "b"], table: Triples
) -> tuple[Int[Array, "b"], Int[Array, "b"], Bool[Array, "b"]]:
    """Draws (middle, end) levels for each start level. The third result is False where no triple
    exists; the levels are then equal to the start, so that every difference of noise levels is
    zero.
    """
    probability = jnp.asarray(table.probability)[start]
    exists = probability.sum(-1) > 0
    column = jax.random.categorical(
        key, jnp.log(jnp.where(exists[:, None], probability, 1.0)), axis=-1
    )
    middle, end = (
        jnp.take_along_axis(jnp.asarray(options)[start], column[:, None], axis=1)[:, 0]
        for options in (table.middle, table.end)
    )
    return jnp.where(exists, middle, start), jnp.where(exists, end, start), exists


def nearest(sigma: Float[Array, "b"], shift_amount: float) -> Float[Array, "b"]:
    """The nearest level of the peers' table, which has 1,000 and ends at 4.98e-3 for shift 5."""
    table = jnp.asarray(grid(1000, shift_amount)[:-1])
    return table[jnp.argmin(jnp.abs(table[None] - sigma[:, None]), axis=1)]


def draw_renoise_sigma(
    key: PRNGKey,
    batch: int,
    shift_amount: float,
    lowest: float,
    highest: float,
    u_highest: float = 1.0,
) -> Float[Array, "b"]:
    """Noise levels at which teacher and critic judge a video: u uniform in [0, u_highest], shifted,
    then clamped.

    The peers clamp to [0.02, 0.98] at shift 5, so 9.3 % of the draws sit exactly on 0.98.
    """
    return jnp.clip(
        shift(u_highest * jax.random.uniform(key, (batch,)), shift_amount), lowest, highest
    )
