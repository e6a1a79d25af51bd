"""Updates move what is finite and nothing else; the EMA is the textbook average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salt_jax.state import apply_gradients, init_learner, init_state, update_ema
from tests.helpers import bits, same_bits, without_type_checks

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01))


def params():
    return {"q": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.1, -0.0])}}


def moved_once():
    """A learner whose moments are not zero any more."""
    learner = init_learner(params(), TX)
    return apply_gradients(
        learner, jax.tree.map(jnp.ones_like, learner.params), jnp.float32(1.0), TX
    )


def test_a_finite_update_is_the_optimizers_own():
    learner = moved_once()
    grads = jax.tree.map(lambda x: 0.3 * x + 1, learner.params)
    updates, opt_state = TX.update(grads, learner.opt_state, learner.params)
    after = apply_gradients(learner, grads, jnp.float32(2.0), TX)
    same_bits(after.params, optax.apply_updates(learner.params, updates))
    same_bits(after.opt_state, opt_state)
    assert bits(after.params) != bits(learner.params)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (0, 0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("bad_gradient", "loss"),
    [(np.nan, 1.0), (np.inf, 1.0), (0.0, np.nan), (0.0, -np.inf), (0.0, [1.0, np.nan])],
)
def test_an_update_that_is_not_finite_leaves_every_bit_and_is_counted(bad_gradient, loss, jit):
    move = lambda learner, grads, loss: apply_gradients(learner, grads, loss, TX)
    move = jax.jit(move) if jit else move
    learner = moved_once()
    good = jax.tree.map(jnp.ones_like, learner.params)
    bad = {
        "q": {"kernel": good["q"]["kernel"].at[1, 0].add(bad_gradient), "bias": good["q"]["bias"]}
    }
    once = move(learner, bad, jnp.float32(loss))
    twice = move(once, bad, jnp.float32(loss))
    same_bits(twice.params, learner.params)
    same_bits(twice.opt_state, learner.opt_state)
    assert (int(once.skipped), int(once.skipped_in_a_row)) == (1, 1)
    assert (int(twice.skipped), int(twice.skipped_in_a_row)) == (2, 2)

    recovered = move(twice, good, jnp.float32(1.0))
    same_bits(recovered.params, move(learner, good, jnp.float32(1.0)).params)
    assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (2, 0)


OTHER = {
    "an array that would broadcast": {"q": {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}},
    "one array less": {"q": {"kernel": jnp.ones((2, 2))}},
}


@pytest.mark.parametrize("name", OTHER)
def test_gradients_and_averages_of_another_network_are_refused(name):
    learner = init_learner(params(), TX)
    with without_type_checks():
        with pytest.raises(AssertionError):
            jax.eval_shape(lambda g: apply_gradients(learner, g, jnp.float32(0), TX), OTHER[name])
        with pytest.raises(AssertionError):
            jax.eval_shape(lambda p: update_ema(params(), p, 0.5, 0, 0), OTHER[name])


def test_ema_copies_before_its_start_and_averages_from_there_on():
    ema, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    np.testing.assert_array_equal(update_ema(ema, new, 0.75, jnp.int32(4), 5)["w"], [3.0, -2.0])
    np.testing.assert_allclose(
        update_ema(ema, new, 0.75, jnp.int32(5), 5)["w"], [1.5, 1.0], rtol=1e-7
    )
    np.testing.assert_allclose(update_ema(ema, new, 0.75, 0, 0)["w"], [1.5, 1.0], rtol=1e-7)


def test_ema_does_not_lose_small_steps_of_bfloat16_parameters():
    ema = init_state({"student": init_learner({"w": jnp.ones(3, jnp.bfloat16)}, TX)}).ema
    ema = update_ema(ema, {"w": jnp.full(3, 2.0, jnp.bfloat16)}, 0.9999, 0, 0)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], 1.0001, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_donating_a_new_state_frees_neither_the_teacher_nor_a_part_of_itself(jit):
    def make(teacher):
        return init_state({name: init_learner(teacher, TX) for name in ("student", "critic")})

    teacher = params()
    state = (jax.jit(make) if jit else make)(teacher)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, teacher))]
    assert len(set(pointers)) == len(pointers)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.learners["student"].params))
    np.testing.assert_array_equal(teacher["q"]["kernel"], params()["q"]["kernel"])
