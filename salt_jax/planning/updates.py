"""The programs of a run: each kind of optimizer call with the first draw that asks for it."""

from salt_jax.rollout.draws import Draw
from salt_jax.stages.stage import Stage, Update

ITERATIONS = 300  # of a run, among whose optimizer calls the kinds are found


def programs(stage: Stage) -> dict[Update, Draw | None]:
    """In the order in which they come, once cache alignment has begun."""
    found: dict[Update, Draw | None] = {}
    for i in range(ITERATIONS):
        for update, draw in stage.updates(stage.recipe.iterations + i):
            found.setdefault(update, draw)
    return found


def update_name(update: Update) -> str:
    """What it is called in tables."""
    terms = [name for name in ("self_consistency", "alignment") if getattr(update.terms, name)]
    sequence = update.terms.sequence
    return " + ".join([f"{update.moves} step", *terms, *[sequence] * (sequence != "new")])
