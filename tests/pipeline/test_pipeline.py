"""The library: what makes videos, opened by name, by workdir and by file."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import save_file

import salt_jax
from configs import base, salt
from salt_jax.config.reading import read_recipe
from salt_jax.errors import UserError
from salt_jax.io import model_folder
from salt_jax.io.model_folder import Source
from salt_jax.io.shipped import located
from salt_jax.models.presets import PRESETS
from salt_jax.pipeline.parts import Video, decoded
from salt_jax.pipeline.shapes import sampler_of
from salt_jax.pipeline.wan import WanOptions, WanSource, wan_parts
from salt_jax.rollout.settings import RELEASED, Sampler, Switch
from salt_jax.workdir import export, open_exported
from tests.helpers import BLUE, RED


@pytest.fixture(scope="module")
def model():
    return salt_jax.load("shapes_causal")


def test_a_seed_makes_the_same_video_whole_and_as_it_comes(model):
    video = model.generate(RED, num_steps=2, seed=3)
    assert video.shape == (9, 12, 12, 3) and video.dtype == np.uint8
    chunks = list(model.stream(RED, num_steps=2, seed=3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 3]
    np.testing.assert_array_equal(np.concatenate(chunks), video)
    assert np.any(model.generate(RED, num_steps=2, seed=4) != video)


def test_the_first_chunk_may_take_steps_of_its_own(model):
    """It is that of as many steps in all; the next ones see it and take theirs."""
    more, both, few = (model.generate(RED, num_steps=k, frames=6) for k in (4, (4, 1), 1))
    np.testing.assert_array_equal(both[:3], more[:3])
    assert np.any(both[3:] != more[3:]) and np.any(both != few)
    chunks = list(model.stream(RED, num_steps=(4, 1), frames=6))
    np.testing.assert_array_equal(np.concatenate(chunks), both)
    for of, steps in ((model, (4, 2, 1)), (salt_jax.load("shapes_teacher"), (4, 1))):
        with pytest.raises(ValueError, match=r"must be one number, or of a model that works chunk"):
            of.generate(RED, num_steps=steps)


def test_a_prompt_holds_from_its_frame_on_and_the_video_goes_on_behind_it(model):
    memory = salt_jax.CachePolicy(window=9, sink=3, chunk=3)
    one = list(model.stream(RED, num_steps=2, memory=memory, frames=6))
    both = list(model.stream({0: RED, 3: BLUE}, num_steps=2, memory=memory, frames=6))
    np.testing.assert_array_equal(one[0], both[0])
    assert np.any(one[1] != both[1])
    assert sum(map(len, model.stream({0: RED, 9: BLUE}, num_steps=1))) == 18
    with pytest.raises(ValueError, match="starts of chunks"):
        list(model.stream({0: RED, 4: BLUE}, num_steps=2, memory=memory))


def test_what_is_exported_is_what_is_loaded(model, tmp_path):
    run = open_exported("shapes_causal")
    export(run, tmp_path / "again.safetensors")
    again = salt_jax.load(tmp_path / "again.safetensors")
    args = dict(num_steps=1, frames=3)
    np.testing.assert_array_equal(again.generate(RED, **args), model.generate(RED, **args))


def test_a_teacher_makes_whole_clips_of_many_guided_steps():
    teacher = salt_jax.load("shapes_teacher")
    assert teacher.sampler == Sampler(32, 12.0, "euler") and teacher.guidance == 2.0
    assert teacher.generate(RED, num_steps=2).shape == (9, 12, 12, 3)
    with pytest.raises(UserError, match="makes whole clips; call generate"):
        teacher.stream(RED)


@pytest.mark.parametrize("keeps", [False, True])
def test_the_text_encoder_stays_for_prompts_to_come_where_it_is_asked_to(keeps, monkeypatch):
    opened, read = [], model_folder.open_part
    monkeypatch.setattr(
        model_folder, "open_part", lambda part, *more: opened.append(part) or read(part, *more)
    )
    source = WanSource("tiny", Source(""), PRESETS["wan2.1-t2v-tiny"])
    parts = wan_parts(source, (6, 3), WanOptions("float32", keeps_text=keeps))
    for prompt in ("one", "two"):
        assert parts.read_texts([prompt])[prompt].shape == (1, 512, 32)
    assert opened == [model_folder.TEXT] * (1 if keeps else 2)


def test_nothing_is_read_before_it_is_needed(monkeypatch):
    """The text encoder comes and goes before the network's parameters are read."""
    model = salt_jax.load("shapes_causal")
    order, parts = [], model.parts
    monkeypatch.setattr(
        model,
        "parts",
        parts._replace(
            read_texts=lambda prompts: order.append("texts") or parts.read_texts(prompts),
            read_params=lambda: order.append("params") or parts.read_params(),
        ),
    )
    frames = model.stream(RED, num_steps=1)
    next(frames)
    assert order == ["texts", "params"]


def test_a_sampler_is_that_of_the_recipe():
    assert sampler_of(read_recipe(base.get_config())) == Sampler(4, 12.0)
    memory = salt_jax.CachePolicy(chunk=3)
    assert sampler_of(read_recipe(salt.get_config())) == Sampler(4, 5.0, memory=memory)
    assert RELEASED["causvid"].grid().tolist() == np.float32([1, 0.757, 0.522, 0]).tolist()


def test_what_is_not_there_is_told_in_one_sentence(bucket):
    for source in ("no_such_network", f"{bucket}/run", "gs://no-such-bucket-of-salt/run"):
        with pytest.raises(UserError, match=f"{source} is no workdir, no file") as error:
            salt_jax.load(source)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="s3:// cannot be read or written here"):
        salt_jax.load("s3://bucket/run")


def test_a_released_recipe_refuses_another_network_of_its_checkpoint(tmp_path):
    told = {"config": json.dumps(asdict(PRESETS["wan2.1-t2v-tiny"]))}
    told["source"] = json.dumps({"student": "generator_ema"})
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "wan.safetensors", told)
    with pytest.raises(UserError, match=r"salt_ll is sampled with generator; convert .*--key=gen"):
        salt_jax.load(tmp_path, released="salt_ll")


def test_a_network_in_a_bucket_is_the_same(model, bucket):
    """It is exported there, and read there."""
    export(open_exported("shapes_causal"), f"{bucket}/deep/student.safetensors")
    there = salt_jax.load(f"{bucket}/deep/student.safetensors")
    args = dict(num_steps=1, frames=3)
    np.testing.assert_array_equal(there.generate(RED, **args), model.generate(RED, **args))
    assert there.parts.source == f"{bucket}/deep/student.safetensors"


def test_a_shipped_network_is_found_by_its_name_alone():
    assert located("shapes_teacher").is_file()
    assert str(located("./shapes_teacher")) == "shapes_teacher" != str(located("shapes_teacher"))
    assert str(located("runs/shapes_teacher")) == "runs/shapes_teacher"


def test_a_video_is_a_value(model):
    """What `launch.sample` makes, from parts that a caller may take apart."""
    texts = model.read_texts([RED])
    sampler = model.sampler._replace(num_steps=1)
    video = Video({0: Switch(RED)}, sampler, model.shape, seed=1, number=2)
    latents = list(model.latents(video, texts))
    assert [x.shape for x in latents] == [(1, 3, 12, 12, 3)] * 3
    again = np.concatenate(list(decoded(model.parts, iter(latents))))
    other = video._replace(number=0)
    assert np.any(again != np.concatenate(list(decoded(model.parts, model.latents(other, texts)))))


def test_a_guidance_of_nothing_is_not_no_guidance():
    """0 leaves the null text alone, 1 the prompt."""
    found = [salt_jax.load("shapes_causal", guidance=w).guidance for w in (0.0, None, 3.0)]
    assert found == [0.0, 1.0, 3.0]
