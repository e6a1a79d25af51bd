"""A window of a video under way as teacher and critic see it: its first latent encodes one frame,
as that of a video does.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import longlive
from salt_jax.config.reading import read_recipe
from salt_jax.models.vae import PRESETS, decode_video, encode_video
from salt_jax.rollout.draws import Terms, draw_rollout
from salt_jax.stages import make_stage, weights
from salt_jax.stages.stage import Batch, Inputs, Update
from salt_jax.train.step import Call, compile_step
from salt_jax.types import Conditioning
from tests.helpers import layout, mesh_of, randomised
from tests.placing import place

TINY = {"model.preset": "wan2.1-t2v-tiny", "teacher.preset": "wan2.1-t2v-tiny", "weights": ""}
TINY |= {"teacher.weights": "", "text_encoder": "wan-tiny", "model.dtype": "float32"}
TINY |= {"teacher.dtype": "float32", "init_from": "", "init_critic": False, "batch_size": 4}
TINY |= {"data.clip": (6, 4, 4), "memory.chunk": 1, "memory.first": 1, "memory.window": 4}
TINY |= {"memory.sink": 1, "stream.max_frames": 18, "stream.overlap": 2, "stream.reencode": 4}
NEW, ON = Terms(sequence="new"), Terms(sequence="on")


@functools.cache
def recipe(**changes):
    config = longlive.get_config("wan")
    config.update_from_flattened_dict(TINY | {k.replace("__", "."): v for k, v in changes.items()})
    return read_recipe(config)


@functools.cache
def start(**changes):
    """A stage, its first state and what is frozen; no two networks are equal."""
    stage = make_stage(recipe(**changes))
    like = jax.eval_shape(lambda: weights.fresh(stage))
    drawn = randomised({n: t for n, t in like._asdict().items() if t is not None}, 0, 0.1)
    loaded = like._replace(**jax.tree.map(jnp.asarray, drawn))
    return stage, stage.first_state(loaded), stage.frozen(loaded)


def batch(seed, size=4):
    text = jax.random.normal(jax.random.key(seed), (size, 512, recipe().wan.text_dim))
    return Batch(Conditioning(text))


def drawn():
    draws = (draw_rollout(recipe(), 0, call)[1] for call in range(100))
    return next(d for d in draws if d.exit_step == 1)._replace(switch=np.bool_(False))


def updated(state, frozen, terms, index, sizes=(), stage=None):
    """State and metrics of a critic's update, on one device or on a mesh of these sizes."""
    stage = stage or start()[0]
    if sizes:
        stage = type(stage)(stage.recipe, mesh_of(**dict(sizes)))
    shardings = layout(state, frozen, sizes)
    step = compile_step(stage, Update("critic", terms), shardings)
    call = Call(jax.random.key(7), jnp.int32(index), drawn())
    args = (state, frozen, batch(index), call)
    return step(*(place(*pair) for pair in zip(args, shardings, strict=True)))


@functools.cache
def under_way():
    """After the first clip of six frames."""
    _, state, frozen = start()
    return updated(state, frozen, NEW, 0)[0]


def first_by_hand(vae, past):
    """Of a window whose first latent is the last of `past`."""
    pixels = decode_video(vae, past, PRESETS["tiny"], jnp.float32)
    return encode_video(vae, pixels[:, -1:], PRESETS["tiny"], jnp.float32)


def inputs(state, frozen, index):
    stage, given = start()[0], batch(index)
    noise = stage.noise(jax.random.fold_in(jax.random.key(7), index), given)
    return Inputs(state, frozen, given, noise, jax.tree.map(jnp.asarray, drawn()))


def seen(params, state, frozen, index, terms=ON):
    """The frames before the new ones, and the new ones."""
    stage, given = start()[0], inputs(state, frozen, index)
    origin = stage.origin(params, given, terms)
    begun = stage.start(params, origin, given, given.draw)
    return begun.overlap, begun.trajectory.x0


@pytest.mark.slow
def test_a_stream_keeps_the_frames_that_are_decoded():
    """The last 3 + 2: three before the window, and its overlap."""
    _, state, frozen = start()
    assert state.stream.past.shape == (4, 5, 4, 4, 16)
    one = under_way()
    np.testing.assert_array_equal(one.stream.past[:, -2:], one.stream.cache.x0[:, 1:])
    two, _ = updated(one, frozen, ON, 1)
    _, new = jax.jit(seen, static_argnums=3)(one.learners["student"].params, one, frozen, 1)
    wanted = np.concatenate([one.stream.past, new], axis=1)[:, -5:]
    np.testing.assert_allclose(two.stream.past, wanted, atol=1e-4)


@pytest.mark.slow
def test_the_windows_first_latent_encodes_one_frame_and_the_others_are_as_they_were():
    _, _, frozen = start()
    state = under_way()
    params = state.learners["student"].params
    overlap, _ = jax.jit(seen, static_argnums=3)(params, state, frozen, 1)
    past = state.stream.past
    np.testing.assert_array_equal(overlap[:, 1:], past[:, -1:])
    wanted = first_by_hand(frozen["vae"], past[:, :4])
    np.testing.assert_allclose(overlap[:, :1], wanted, atol=1e-4)
    assert np.abs(overlap[:, :1] - past[:, 3:4]).max() > 0.1
    slope = jax.jit(jax.grad(lambda p: seen(p, state, frozen, 1)[0].sum()))(params)
    assert not any(np.any(x) for x in jax.tree.leaves(slope))


@pytest.mark.slow
def test_the_critic_judges_that_window_and_learns_from_its_new_frames():
    stage, _, frozen = start()
    state = under_way()
    after, metrics = updated(state, frozen, ON, 1)
    given = inputs(state, frozen, 1)
    past, (noise, sigma) = state.stream.past, given.noise.renoised
    level = sigma[:, None, None, None, None]

    @jax.jit
    def by_hand(params, critic, first):
        _, x0 = seen(params, state, frozen, 1)
        window = jnp.concatenate([first, past[:, 4:], x0], axis=1)
        view = (1 - level) * window + level * noise
        cond = Conditioning(state.stream.text)
        velocity = stage.critic.denoise(critic, view, sigma, cond).velocity
        return ((velocity[:, 2:] - (noise[:, 2:] - x0)) ** 2).mean()

    both = state.learners["student"].params, state.learners["critic"].params
    wanted = by_hand(*both, first_by_hand(frozen["vae"], past[:, :4]))
    np.testing.assert_allclose(metrics["critic"], wanted, rtol=1e-4)
    assert abs(by_hand(*both, past[:, 3:4]) - wanted) > 1e-5, "it makes no difference"
    assert int(after.learners["critic"].skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(("fsdp", 4),), (("data", 2), ("tensor", 2))])
def test_on_many_devices_it_is_the_same(sizes):
    """Each decodes for its clips alone; the VAE is whole everywhere."""
    _, _, frozen = start()
    (one, metrics), (many, there) = (updated(under_way(), frozen, ON, 1, s) for s in ((), sizes))
    np.testing.assert_allclose(there["critic"], metrics["critic"], rtol=1e-4)
    np.testing.assert_allclose(many.stream.past, one.stream.past, atol=1e-3)
    _, of_frozen, *_ = layout(under_way(), frozen, sizes)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(of_frozen["vae"]))


@pytest.mark.slow
def test_in_portions_it_is_the_same():
    _, _, frozen = start()
    stage = make_stage(replace(recipe(), accumulate=2))
    (one, metrics), (two, there) = (
        updated(under_way(), frozen, ON, 1, stage=s) for s in (None, stage)
    )
    np.testing.assert_allclose(there["critic"], metrics["critic"], rtol=1e-4)
    np.testing.assert_allclose(two.stream.past, one.stream.past, atol=1e-3)


def test_where_latents_are_frames_nothing_is_kept_and_no_vae_is_read():
    stage = make_stage(read_recipe(longlive.get_config("")))
    assert not stage.recipe.reencodes and ("VAE", stage.recipe.weights) not in stage.parts()
    loaded = jax.eval_shape(lambda: weights.fresh(stage))
    assert loaded.vae is None and "vae" not in stage.frozen(loaded)
    assert jax.eval_shape(stage.first_state, loaded).stream.past is None


def test_longlives_frames_are_kept_at_full_size():
    """Its last 21 latents, of which with 18 new ones all but 20 are decoded."""
    stage = make_stage(read_recipe(longlive.get_config("wan")))
    loaded = jax.eval_shape(lambda: weights.fresh(stage))
    stream = jax.eval_shape(stage.first_state, loaded).stream
    assert stream.past.shape == (64, 21, 60, 104, 16) and stage.recipe.stream.reencode == 19
    assert ("VAE", stage.recipe.weights) in stage.parts()
