"""What is drawn at each step: pure functions of a key, so every host draws the same without a broadcast."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from salt_jax.flow.schedule import draw_triple, grid, triples
from salt_jax.types import PRNGKey


class Plan(NamedTuple):
    """One triple of Salt Eq. 9 per example. Without a triple the three levels are equal (and `exists` False)."""

    sigma_s: Float[Array, "b"]
    sigma_m: Float[Array, "b"]
    sigma_e: Float[Array, "b"]
    exists: Bool[Array, "b"]


def draw_plan(key: PRNGKey, batch: int, train_updates: int, anchor_updates: int, shift: float) -> Plan:
    """sigma_s uniform on the non-zero levels of T_train, then (sigma_m, sigma_e) as `flow.schedule.triples` says."""
    k_start, k_triple = jax.random.split(key)
    levels = jnp.asarray(grid(train_updates, shift))
    start = jax.random.randint(k_start, (batch,), 0, train_updates)
    middle, end, exists = draw_triple(k_triple, start, triples(train_updates, anchor_updates))
    return Plan(levels[start], levels[middle], levels[end], exists)
