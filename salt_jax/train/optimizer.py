"""The optimizer of student and critic."""

import optax

from salt_jax.train.recipe import Optimizer


def make_optimizer(o: Optimizer, updates: int) -> optax.GradientTransformation:
    """Clipped AdamW with linear warm-up, then constant or cosine over `updates`."""
    end = 0.0 if o.decay else o.learning_rate
    if o.decay:
        rate = optax.warmup_cosine_decay_schedule(0.0, o.learning_rate, o.warmup, updates, end)
    else:
        rate = optax.linear_schedule(0.0, o.learning_rate, o.warmup) if o.warmup else o.learning_rate
    adamw = optax.adamw(rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.clip), adamw)
