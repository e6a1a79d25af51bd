"""Stage denoising: a teacher-to-be and its text encoder, on toys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.moving_shapes.exact import closed_form_params
from salt_jax.stages.stage import Inputs, Update
from salt_jax.train.step import Call, compile_step
from tests.helpers import bits, host, layout, traced
from tests.placing import place
from tests.stages.toys import captioned, denoising, denoising_params, denoising_state, tokens


def loss_of(stage, params, frozen, batch):
    """Of an update, with what is drawn from its key."""
    noise = stage.noise(jax.random.key(5), batch)
    inputs = Inputs(denoising_state(), frozen, batch, noise, None)
    return stage.loss(params, inputs, Update("student"))[0]


def test_a_teacher_to_be_learns_and_so_does_its_text_encoder():
    batch, before = captioned(tokens(8)), host(denoising_params())
    shardings = layout(denoising_state(), {})
    state = place(denoising_state(), shardings[0])
    step = compile_step(traced(denoising("data", 0.0), 1), Update("student"), shardings)
    call = Call(jax.random.key(7), jnp.int32(0), None)
    losses = []
    for _ in range(20):
        state, metrics = step(state, {}, batch, call)
        losses.append(float(metrics["denoising"]))
    assert losses[-1] < 0.8 * losses[0], losses
    assert set(state.learners) == {"student"}
    assert int(state.iteration) == 20
    student = state.learners["student"]
    moments = student.opt_state[1][0].nu
    for path, nu in jax.tree_util.tree_leaves_with_path(moments["text_encoder"]):
        assert float(nu.max()) > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"
    assert bits(student.params["text_encoder"]) != bits(before["text_encoder"])


def test_the_closed_form_of_one_clip_a_caption_is_that_clip():
    """Its conditional mean is the clip, so the loss against the teacher's velocity is the loss
    against the data's.
    """
    batch = captioned(tokens(8))
    captions = np.asarray(batch.tokens, np.float32)[..., None]
    frozen = {"teacher": closed_form_params({"clips": np.asarray(batch.video)[:, None]}, captions)}

    def losses(p):
        cases = ("closed_form", 0.0), ("data", 0.0), ("closed_form", 1.0), ("data", 1.0)
        return [loss_of(denoising(*case), p, frozen, batch) for case in cases]

    exact, data, exact_empty, data_empty = jax.jit(losses)(denoising_params())
    np.testing.assert_allclose(exact, data, rtol=1e-4)
    # The empty caption leaves all clips in: the mean is another and the loss lower than against a
    # single clip.
    assert exact_empty < 0.99 * data_empty


def test_a_dropped_caption_is_the_empty_caption():
    empty = jnp.zeros((8, 8), jnp.int32).at[:, 0].set(1)

    def losses(p):
        cases = (tokens(8), 1.0), (empty, 0.0), (tokens(8), 0.0)
        return [
            loss_of(denoising("data", dropout), p, {}, captioned(captions))
            for captions, dropout in cases
        ]

    dropped, empty, kept = map(float, jax.jit(losses)(denoising_params()))
    assert dropped == pytest.approx(empty, rel=1e-6) and kept != pytest.approx(empty, rel=1e-3)
