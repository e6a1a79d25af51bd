"""Videos without end, as values."""

import json
from dataclasses import asdict
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import salt_jax
from salt_jax.errors import UserError
from salt_jax.io.model_folder import TEXT, WAN, Source
from salt_jax.io.tensor_files import save_weights
from salt_jax.models.cache_policy import MAX_FRAMES
from salt_jax.models.presets import PRESETS
from salt_jax.pipeline.live import fork
from salt_jax.pipeline.model import Model
from salt_jax.pipeline.wan import WanOptions, WanSource, wan_parts
from salt_jax.rollout import sampler as sampling
from salt_jax.rollout.settings import Sampler
from tests.convert.networks import save_torch
from tests.helpers import BLUE, RED, randomised, shapes_of
from tests.models.taehv import arrays_of

FORGETS = salt_jax.CachePolicy(chunk=3, window=9, sink=3, positions="relative")


@pytest.fixture(scope="module")
def shapes():
    return salt_jax.load("shapes_causal")


@pytest.fixture(scope="module")
def wan():
    """Small and random, with its VAE, whose decoder remembers."""
    preset = PRESETS["wan2.1-t2v-tiny"]
    parts = wan_parts(WanSource("tiny", Source(""), preset), (6, 3), WanOptions("float32"))
    model = Model(parts, Sampler(2, 5.0, memory=FORGETS), (6, 4, 6, preset.out_channels))
    model.params = randomised(model.params, 0)  # the last layer of a new network is 0
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """From a folder without a VAE, and the file of a tiny decoder, which remembers too."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in (WAN, TEXT):
        told = {"config": json.dumps(asdict(part.tiny))}
        params = randomised(shapes_of(part.tiny, part.init), 0)
        save_weights(folder / part.file, params, "float32", told)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "A": 3, "red": 4, "blue": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    file = save_torch(folder / "taew2_1.pth", arrays_of(dtype=np.float16))
    model = salt_jax.load(folder, released="longlive", tiny_decoder=file)
    model.shape = (6, 4, 6, model.shape[-1])
    return model


def go_on(model, live, chunks, prompt=None):
    """The next frames of a video, and the video with them."""
    frames = []
    for _ in range(chunks):
        made, live = model.advance(live, prompt)
        frames.append(model.parts.to_bytes(made.decoded))
    return np.concatenate(frames), live


def test_a_video_has_no_end_and_one_program(shapes):
    """Whatever the number of steps, and whatever prompts come."""
    finite = np.concatenate(list(shapes.stream(RED, memory=FORGETS, num_steps=2, frames=30)))
    programs = sampling.make_chunk.jitted._cache_size(), sampling.read_again.jitted._cache_size()
    endless = shapes.stream(RED, memory=FORGETS, num_steps=2)
    np.testing.assert_array_equal(np.concatenate(list(islice(endless, 10))), finite)
    for steps in (2, 4, 8):
        prompts = {0: RED, 12: BLUE, 24: RED}
        many = shapes.stream(prompts, memory=FORGETS, num_steps=steps)
        sizes = {chunk.shape for chunk in islice(many, 12)}
        assert sizes == {(3, 12, 12, 3)}
    now = sampling.make_chunk.jitted._cache_size(), sampling.read_again.jitted._cache_size()
    assert now == (programs[0], programs[1] + 1)


def test_the_first_chunk_is_of_the_program_of_the_others(shapes, tmp_path):
    """And those of a video that was saved."""
    memory = salt_jax.CachePolicy(chunk=3, window=12, sink=3)
    programs = sampling.make_chunk.jitted._cache_size
    before = programs()
    _, live = go_on(shapes, shapes.begin(RED, memory=memory), 3)
    shapes.save(live, tmp_path / "video.safetensors")
    go_on(shapes, fork(live), 2)
    go_on(shapes, shapes.resume(tmp_path / "video.safetensors"), 2)
    assert programs() == before + 1


def test_memory_stays_what_it_is(shapes):
    live = shapes.begin(RED, memory=FORGETS, num_steps=1)
    _, live = go_on(shapes, live, 4)
    before = sum(x.nbytes for x in jax.live_arrays())
    _, live = go_on(shapes, live, 20)
    assert sum(x.nbytes for x in jax.live_arrays()) <= before


def test_the_prompt_of_each_chunk_may_be_asked_for(shapes):
    wanted, asked = {0: RED, 6: BLUE}, []

    def prompt_of(frame):
        asked.append(frame)
        return BLUE if frame >= 6 else RED

    kwargs = dict(memory=FORGETS, num_steps=2)
    listed = list(islice(shapes.stream(wanted, **kwargs), 4))
    answered = list(islice(shapes.stream(prompt_of, **kwargs), 4))
    np.testing.assert_array_equal(np.concatenate(answered), np.concatenate(listed))
    assert asked == [0, 0, 3, 6, 9, 12]


@pytest.mark.parametrize("world", ["shapes", "wan"])
def test_a_copy_goes_its_own_way(world, request):
    model = request.getfixturevalue(world)
    _, live = go_on(model, model.begin(RED, memory=FORGETS, seed=3), 3)
    copy = fork(live)
    straight, live = go_on(model, live, 3)
    turned, _ = go_on(model, fork(copy), 3, BLUE)
    again, _ = go_on(model, copy, 3)
    np.testing.assert_array_equal(again, straight)
    assert np.any(turned[-4:] != straight[-4:])


@pytest.mark.parametrize("world", ["shapes", "wan", pytest.param("tiny", marks=pytest.mark.slow)])
def test_a_saved_video_goes_on_bit_for_bit(world, request, tmp_path):
    model = request.getfixturevalue(world)
    _, live = go_on(model, model.begin(RED, memory=FORGETS, num_steps=2, seed=3), 2)
    _, live = go_on(model, live, 2, BLUE)
    model.save(live, tmp_path / "video.safetensors")
    straight, _ = go_on(model, live, 2)
    back = model.resume(tmp_path / "video.safetensors")
    assert (back.prompt, back.frames, back.sampler) == (BLUE, 12, live.sampler)
    again, _ = go_on(model, back, 2)
    np.testing.assert_array_equal(again, straight)


def test_what_is_no_video_under_way_is_told(shapes, wan, tmp_path):
    file = tmp_path / "video.safetensors"
    for content in (None, b"no tensors"):
        if content:
            file.write_bytes(content)
        with pytest.raises(UserError, match="is no video under way"):
            shapes.resume(file)
    shapes.save(shapes.begin(RED, memory=FORGETS), file)
    with pytest.raises(UserError, match="of another network than tiny"):
        wan.resume(file)


def test_a_tiny_decoder_stands_for_the_vae(tiny):
    weights = tiny.parts.made_with["weights"]
    assert set(weights) == {"text_encoder.safetensors", "tokenizer.json", "tiny_decoder"}
    decoded, memory = tiny.parts.decode(None, jnp.zeros((1, 2, 1, 2, 16)))
    assert tiny.parts.to_bytes(decoded).shape == (5, 8, 16, 3) and memory
    with pytest.raises(UserError, match=r"there is no .*vae\.safetensors"):
        tiny.generate(RED, image=np.zeros((32, 48, 3), np.uint8))


def test_a_tiny_decoder_is_of_wan_alone():
    with pytest.raises(UserError, match="shapes_causal makes Moving Shapes"):
        salt_jax.load("shapes_causal", tiny_decoder="taew2_1.pth")


def test_absolute_positions_have_an_end(shapes):
    memory = salt_jax.CachePolicy(chunk=3, window=6, sink=0)
    live = shapes.begin(RED, memory=memory, num_steps=1)
    session = live.session._replace(frames=MAX_FRAMES - 1)
    with pytest.raises(ValueError, match="set positions to relative"):
        shapes.advance(live._replace(session=session))
    everything = shapes.begin(RED, num_steps=1)
    _, full = go_on(shapes, everything, 3)
    with pytest.raises(ValueError, match="set a window"):
        shapes.advance(full)
