"""What replaying all exit steps at once saves, by XLA's own account of the compiled programs.

`pytest tests/rollout/test_cache_policy.py -m slow -s` prints the numbers of docs/results.md.
"""

import jax
import jax.numpy as jnp
import pytest

from salt_jax.flow.schedule import grid
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.models.denoiser import wan_denoiser
from salt_jax.models.kv_cache import plan_next_chunk
from salt_jax.models.presets import Compute, WanConfig
from salt_jax.rollout.causal import Origin, Steps, commit, generate_chunk, rollout
from salt_jax.rollout.replay import replay
from salt_jax.types import Conditioning
from tests.helpers import shapes_of

CONFIG = WanConfig(192, 4, 6, 768, 16, 16, (1, 2, 2), 32, 16, 64, 0, 1e-6)
NETWORK = wan_denoiser(CONFIG, Compute(remat="all"), 21, 3)
POLICY = CachePolicy(3, 3, 0, 0, "absolute")
SHAPE, CLIPS = (21, 16, 16, 16), 2
LEVELS = jnp.asarray(grid(4, 5.0))


def at_once(params, cond, keys, exit_step):
    steps = Steps(LEVELS, exit_step, "cm")
    trajectory = rollout(NETWORK, params, Origin(cond), steps, keys, SHAPE, POLICY)
    return (replay(NETWORK, params, trajectory, cond, POLICY).x0 ** 2).mean()


def one_after_the_other(params, cond, keys, exit_step):
    """The same loss with the gradient taken where each chunk is made: its cache has to wait for the
    backward pass.
    """
    stopped, steps = jax.lax.stop_gradient(params), Steps(LEVELS, exit_step, "cm")
    cache, total = NETWORK.empty_cache(CLIPS, SHAPE[0], SHAPE[1:]), 0.0
    for size in POLICY.sizes(SHAPE[0]):
        plan = plan_next_chunk(cache, POLICY, size)
        x, x0, _ = generate_chunk(NETWORK, stopped, plan, cond, steps, keys, SHAPE[1:])
        sigma = jnp.full(CLIPS, LEVELS[exit_step])
        total += (
            NETWORK.denoise(params, jax.lax.stop_gradient(x), sigma, cond, plan).x0 ** 2
        ).mean()
        cache = jax.lax.stop_gradient(commit(NETWORK, stopped, cache, x0, cond, POLICY))
    return total / len(POLICY.sizes(SHAPE[0]))


def temporary_bytes(loss):
    shapes = shapes_of(CONFIG)
    cond = Conditioning(jax.ShapeDtypeStruct((CLIPS, 16, 32), jnp.float32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), CLIPS))
    exit_step = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(shapes, cond, keys, exit_step).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.optimized
def test_one_replay_of_seven_chunks_needs_less_memory_than_seven_graphs():
    ours, theirs = temporary_bytes(at_once), temporary_bytes(one_after_the_other)
    cache = 2 * CONFIG.num_layers * CLIPS * SHAPE[0] * 64 * CONFIG.dim * 4
    print(
        f"\nstudent gradient, 7 chunks of 3 frames: replay {ours / 2**20:.0f} MiB, one chunk after "
        "the other "
        f"{theirs / 2**20:.0f} MiB, of which one cache is {cache / 2**20:.0f} MiB"
    )
    assert ours < 0.8 * theirs
