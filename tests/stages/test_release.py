"""The terms of the authors' code (docs/algorithm.md 9, "release"), each computed once more from its
formula, with what was drawn handed in.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import self_forcing
from salt_jax.config.reading import read_recipe
from salt_jax.flow.prediction import guide
from salt_jax.models.kv_cache import plan_next_chunk
from salt_jax.rollout.causal import Origin, commit
from salt_jax.rollout.causal import rollout as roll
from salt_jax.rollout.draws import Terms
from salt_jax.rollout.parallel import noise_at
from salt_jax.rollout.replay import plan_replay, replay
from salt_jax.stages import make_stage
from salt_jax.stages.stage import Update, Weights
from salt_jax.stages.start import as_steps
from salt_jax.train.step import compile_step
from tests.helpers import close, layout, with_networks
from tests.stages import small
from tests.stages.small import BATCH, CLIP, CRITIC, KEY, NETWORK, NULL, STUDENT, Judge

RELEASE = read_recipe(self_forcing.get_config("salt,release"))
RECIPE = replace(
    small.RECIPE,
    schedule=replace(RELEASE.schedule, shift=2.0),
    rollout=RELEASE.rollout,
    loss=replace(RELEASE.loss, self_consistency=1e4),
    align=replace(RELEASE.align, weight=20.0, margin=0.001, layers=1, start=0),
)
# The release's self-consistency is gentle: 6e-6 beside 1.3 of DMD here. Now each term is felt.
WEIGHTS = {"self_consistency": 1e4, "alignment": 20.0}
TEACHER = small.wan(7)
FROZEN = {"teacher": TEACHER, "null_text": NULL}
FRAMES, *PICTURE = CLIP


def test_the_recipe_is_the_authors():
    """RELEASE: what their config and code say, value by value."""
    r = read_recipe(self_forcing.get_config("wan,salt"))
    assert (r.loss.self_consistency, r.loss.level_weight) == (0.2, "one_minus_sigma")
    assert r.loss.stop_gradient == "composed"
    assert (r.schedule.train_levels, r.schedule.anchor_levels, r.schedule.nearest_ends) == (8, 4, 2)
    assert r.rollout.num_steps == (2, 4, 8) and r.rollout.probabilities == (0.2, 0.4, 0.4)
    a = r.align
    assert (a.weight, a.margin, a.network, a.layers, a.highest) == (0.1, 0.1, "teacher", 21, 0.2)
    assert (a.num_steps, a.lowest_exit, a.probability) == ((2,), 1, 1.0)
    assert a.start * r.critic_ratio == 1000
    assert (a.reference_exit, a.reference_noise) == ("student", "own")


@cache
def stage(noise="own", **changes):
    align = replace(RECIPE.align, reference_noise=noise)
    recipe = replace(RECIPE, align=align, **changes)
    return with_networks(make_stage(recipe), student=NETWORK, critic=Judge(), teacher=NETWORK)


def state(stage):
    return stage.first_state(Weights(CRITIC, None, STUDENT, TEACHER, NULL))


def sequential(params, cond, levels, steps, noises, alone=None):
    """x0 of every chunk, made one after the other.

    Args:
      noises: [(B, F, H, W, C)], one for each level that is arrived at; None: by an Euler step.
      alone: the same three of the first chunk, where it has its own.
    """
    cache = NETWORK.empty_cache(BATCH, FRAMES, tuple(PICTURE))
    made, others = [], (levels, steps, noises)
    for first in range(0, FRAMES, 2):
        levels, steps, noises = others if first or alone is None else alone
        plan, own = plan_next_chunk(cache, RECIPE.memory, 2), slice(first, first + 2)
        x = noises[0][:, own]
        for i in range(steps):
            said = NETWORK.denoise(params, x, jnp.full(BATCH, levels[i]), cond, plan)
            if i + 1 < steps and noises[i + 1] is None:
                x = x + (levels[i + 1] - levels[i]) * said.velocity
            elif i + 1 < steps:
                x = (1 - levels[i + 1]) * said.x0 + levels[i + 1] * noises[i + 1][:, own]
        made.append(said.x0)
        cache = commit(NETWORK, params, cache, said.x0, cond, RECIPE.memory)
    return jnp.concatenate(made, axis=1)


def reference_noises(keys, levels, kind):
    others = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    shared, own = (
        [noise_at(k, level, np.arange(FRAMES), tuple(PICTURE)) for level in levels]
        for k in (keys, others)
    )
    return {
        "shared": shared,
        "own": [shared[0], *own[1:]],
        "euler_between": [shared[0], None, shared[2], None],
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shared", "own", "euler_between"])
def test_the_reference_is_a_slow_loop_on_the_noises_it_is_told(kind):
    """T(4) up to the level at which the student, of T(2), stops."""
    draw, keys = (
        jax.tree.map(jnp.asarray, small.drawn(2, 1, RECIPE)),
        jax.random.split(jax.random.key(3), BATCH),
    )
    s, batch = stage(kind), small.batch_of(0)
    inputs = small.Inputs(state(s), FROZEN, batch, s.noise(KEY, batch)._replace(keys=keys), draw)
    found = s.reference(STUDENT, Origin(batch.cond), inputs)
    levels = jnp.array([1, 6 / 7, 2 / 3, 0.4, 0], jnp.float32)  # T(4) at shift 2
    noises = reference_noises(keys, levels[:4], kind)
    wanted = sequential(STUDENT, batch.cond, levels, 3, noises)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "euler_between"])
def test_a_first_chunk_with_steps_of_its_own_has_the_references_noise_too(kind):
    """It takes the student's steps: of its own noise they are other noise, and no level of them is
    between the student's, so that none is arrived at by an Euler step.
    """
    changes = dict(
        rollout=replace(RECIPE.rollout, first_steps=3),
        loss=replace(RECIPE.loss, self_consistency=0.0),
    )
    s, batch = stage(kind, **changes), small.batch_of(0)
    draw = small.drawn(2, 1, s.recipe)._replace(first_exit=np.int32(2))
    keys = jax.random.split(jax.random.key(3), BATCH)
    noise = s.noise(KEY, batch)._replace(keys=keys)
    inputs = small.Inputs(state(s), FROZEN, batch, noise, jax.tree.map(jnp.asarray, draw))
    found = s.reference(STUDENT, Origin(batch.cond), inputs)
    levels = jnp.array([1, 6 / 7, 2 / 3, 0.4, 0], jnp.float32)  # T(4) at shift 2
    first = jnp.array([1, 0.8, 0.5, 0], jnp.float32)  # T(3)
    of_first = reference_noises(
        keys, jnp.pad(first[:3], (0, 1)), "own" if kind == "own" else "shared"
    )
    wanted = sequential(
        STUDENT,
        batch.cond,
        levels,
        3,
        reference_noises(keys, levels[:4], kind),
        (first, 3, of_first[:3]),
    )
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_levels_of_the_features_are_low_and_clipped():
    """u uniform in [0, .2), shift 5, then [.02, .98]: the share below sigma is u(sigma) / .2."""
    s = stage()
    many = jax.vmap(lambda key: s.noise(key, small.batch_of(0)).aligned.sigma)
    sigma = np.sort(np.asarray(many(jax.random.split(jax.random.key(0), 500))).ravel())
    assert sigma[0] == np.float32(0.02) and sigma[-1] < 1 / 1.8
    clipped = np.mean(sigma == sigma[0])
    assert clipped == pytest.approx(0.02 / (5 - 4 * 0.02) / 0.2, abs=0.01)
    for level in (0.1, 0.3, 0.5):
        assert np.mean(sigma < level) == pytest.approx(level / (5 - 4 * level) / 0.2, abs=0.03)


def relations(z):
    unit = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    return jnp.einsum("bfid,bfjd->bfij", unit, unit)


def by_hand(params, draw, terms, kind):
    """Value, terms and gradient of the release's student loss."""
    s, batch = stage(kind), small.batch_of(0)
    cond, drawn = batch.cond, s.noise(KEY, batch)
    made = roll(
        NETWORK,
        params,
        Origin(batch.cond),
        as_steps(draw, RECIPE),
        drawn.keys,
        CLIP,
        s.recipe.memory,
    )
    sigma = float(draw.levels[draw.exit_step])
    wide = lambda level: level.reshape(-1, 1, 1, 1, 1)
    noise, t = drawn.renoised.noise, drawn.renoised.sigma
    judge = Judge().denoise

    def loss(p):
        video = replay(NETWORK, p, made, cond, s.recipe.memory)
        held = jax.lax.stop_gradient(video)
        # DMD, Eq. 4
        view = (1 - wide(t)) * held.x0 + wide(t) * noise
        null = cond._replace(text=NULL.repeat(BATCH, 0))
        guided = guide(*(NETWORK.denoise(TEACHER, view, t, c) for c in (cond, null)), 2.0).x0
        gap = judge(CRITIC, view, t, cond).x0 - guided
        gap /= jnp.abs(held.x0 - guided).mean((1, 2, 3, 4), keepdims=True)
        found = {"dmd": 0.5 * jnp.square(video.x0 - (held.x0 - gap)).mean()}
        if terms.self_consistency:
            m, e = float(draw.sigma_m), float(draw.sigma_e)
            x_m = made.x - (sigma - m) * held.velocity
            level = jnp.full(made.x.shape[:2], m)
            v_m = NETWORK.denoise(params, x_m, level, cond, plan_replay(made, s.recipe.memory))
            direct = made.x - (sigma - e) * video.velocity
            composed = x_m - (m - e) * v_m.velocity
            square = jnp.square(direct - composed).mean()
            found["self_consistency"] = (1 - sigma) * square
        if terms.alignment:
            levels = jnp.array([1, 6 / 7, 2 / 3, 0.4, 0], jnp.float32)
            noises = reference_noises(drawn.keys, levels[:4], kind)
            reference = sequential(params, cond, levels, 3, noises)
            f, low = drawn.aligned

            def seen(x0):
                x = (1 - wide(low)) * x0 + wide(low) * f
                return relations(NETWORK.features(TEACHER, x, low, cond, 1))

            off = jnp.abs(seen(video.x0) - seen(jax.lax.stop_gradient(reference)))
            found["alignment"] = jnp.maximum(off - s.recipe.align.margin, 0).mean()

        return sum(WEIGHTS.get(name, 1.0) * term for name, term in found.items()), found

    (_, found), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return found, slope


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "steps", "kind"),
    [
        (Terms(self_consistency=True), (8, 2), "own"),
        (Terms(alignment=True), (2, 1), "own"),
        (Terms(alignment=True), (2, 1), "euler_between"),
    ],
)
def test_a_student_step_follows_the_released_formulas(terms, steps, kind):
    s, draw = stage(kind), jax.tree.map(jnp.asarray, small.drawn(*steps, RECIPE))
    step = compile_step(s, Update("student", terms), layout(state(s), FROZEN))
    after, metrics = small.run(step, state(s), small.batch_of(0), draw, FROZEN)
    found, slope = by_hand(STUDENT, draw, terms, kind)
    for name, value in found.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)
        weighted = WEIGHTS.get(name, 1.0) * value
        assert weighted > 0.02 * found["dmd"], f"too little {name} to be tested"
    slope, _ = small.clipped(slope)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    close(small.gradient(after.learners["student"]), slope, rtol=1e-3, atol=3e-4 * largest)
