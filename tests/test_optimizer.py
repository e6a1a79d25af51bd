"""AdamW as optax has it, without the moment that b1 = 0 has no use for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from salt_jax.config.sections import Optimizer
from salt_jax.optimizer import make_optimizer

HOW = dict(learning_rate=3e-2, eps=1e-8, weight_decay=0.1, clip=0.7)
SCHEDULES = {"constant": (0, False), "warm-up": (5, False), "cosine": (5, True)}
UPDATES = 40


def reference(o, updates):
    """The same from optax' own parts, first moment and all."""
    rates = {
        (0, False): o.learning_rate,
        (5, False): optax.linear_schedule(0.0, o.learning_rate, 5),
        (5, True): optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, 5, updates, 0.0),
    }
    adamw = optax.adamw(rates[o.warmup, o.decay], o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw)


def run(tx, jit):
    """Parameters after each of many updates, some of whose gradients are clipped, and the last
    state.
    """
    wave = lambda *shape: jnp.sin(jnp.arange(float(np.prod(shape)))).reshape(shape)
    params, seen = {"kernel": wave(7, 5), "bias": wave(5)}, []
    state = tx.init(params)

    def update(grads, state, params):
        change, state = tx.update(grads, state, params)
        return optax.apply_updates(params, change), state

    # Fused with what is around it, a sum of squares over several arrays is rounded otherwise in any
    # two programs.
    update = (
        jax.jit(update, compiler_options={"xla_disable_hlo_passes": "fusion"}) if jit else update
    )
    for key in jax.random.split(jax.random.key(0), UPDATES):
        size = jax.random.exponential(key)
        grads = jax.tree.map(
            lambda p, key=key, size=size: size * jax.random.normal(key, p.shape), params
        )
        params, state = update(grads, state, params)
        seen.append(jax.device_get(params))
    return seen, state


@pytest.mark.optimized
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_first_moment_every_bit_of_the_parameters_is_adamws(schedule, jit):
    warmup, decay = SCHEDULES[schedule]
    o = Optimizer(b1=0.0, b2=0.99, warmup=warmup, decay=decay, **HOW)
    found, state = run(make_optimizer(o, UPDATES), jit)
    wanted, full = run(reference(o, UPDATES), jit)
    chex.assert_trees_all_equal(found, wanted)
    assert not np.array_equal(found[0]["kernel"], found[-1]["kernel"])
    chex.assert_trees_all_equal(state[1][0].nu, full[1][0].nu)
    saved = {"kernel": (7, 5), "bias": (5,)}
    sizes = lambda tree: sum(np.size(x) for x in jax.tree.leaves(tree))
    assert sizes(full) - sizes(state) == sum(map(np.prod, saved.values()))


def test_where_b1_is_not_zero_the_moment_is_there():
    o = Optimizer(b1=0.9, b2=0.99, warmup=0, decay=False, **HOW)
    found, state = run(make_optimizer(o, UPDATES), True)
    wanted, full = run(reference(o, UPDATES), True)
    chex.assert_trees_all_equal((found, state), (wanted, full))


def test_the_configs_keep_none():
    assert base.get_config().student_optimizer.b1 == base.get_config().critic_optimizer.b1 == 0
