"""launch.encode as a user runs it, on a folder of small random weights; records equal what the
networks give.
"""

import dataclasses
import json
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.data import pipeline
from salt_jax.data.clips import read_clip
from salt_jax.data.latents import open_records
from salt_jax.io.model_folder import IMAGE, TEXT, VAE, WAN
from salt_jax.io.tensor_files import save_weights
from salt_jax.models import image_encoder, text_encoder, vae
from salt_jax.models.image_condition import condition_latents, image_clip, squash_for_clip
from salt_jax.models.presets import PRESETS
from salt_jax.moving_shapes.shapes import World
from tests.helpers import randomised, shapes_of
from tests.launch.programs import program as run_program
from tests.launch.programs import succeed as run

CONFIGS = {
    VAE: vae.PRESETS["tiny"],
    TEXT: text_encoder.PRESETS["wan-tiny"],
    IMAGE: image_encoder.PRESETS["tiny"],
    WAN: PRESETS["wan2.1-t2v-tiny"],
}
SIZE = ["--size=48x32", "--frames=9", "--dtype=float32"]


def program(*args):
    return run_program("encode", *args)


def succeed(*args):
    return run("encode", *args)


def random_tree(part, seed):
    """Weights drawn with numpy: compiling jax's draws takes a minute for the VAE."""
    return randomised(shapes_of(CONFIGS[part], part.init), seed)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as launch.convert_wan writes it, and what is in it."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    folder = tmp_path_factory.mktemp("weights")
    trees = {part: random_tree(part, seed) for seed, part in enumerate(CONFIGS)}
    for part, tree in trees.items():
        told = {"format": "salt_jax", "config": json.dumps(dataclasses.asdict(CONFIGS[part]))}
        save_weights(folder / part.file, tree, "float32", told)
    words = ["<pad>", "</s>", "<unk>", "A", "cat", "dog", "walks", "."]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, trees


IDS = {"A cat walks.": [3, 4, 6, 7, 1], "A dog.": [3, 5, 7, 1]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos that can be used, of other sizes and rates, and four that cannot."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, count, rate, size in (
        ("a", 12, 16, (60, 100)),
        ("b", 20, 25, (64, 64)),
        ("short", 5, 16, (32, 48)),
    ):
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(rate))
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for _ in range(count):
                picture = rng.integers(0, 255, (*size, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    (folder / "cut.mp4").write_bytes((folder / "b.mp4").read_bytes()[:300])
    (folder / "bare.mp4").write_bytes((folder / "b.mp4").read_bytes())
    for name, caption in {
        "a": "A cat walks.",
        "b": "A dog.",
        "short": "A cat.",
        "cut": "A dog.",
    }.items():
        (folder / f"{name}.txt").write_text(caption)
    return folder


def text_of(trees, caption):
    """The embedding by a plain call, without padding."""
    ids = np.array([IDS[caption]], np.int32)
    return np.asarray(text_encoder.encode_text(trees[TEXT], jnp.asarray(ids), CONFIGS[TEXT]))[0]


@pytest.mark.slow
def test_videos_become_what_the_networks_say_of_them(weights, videos, tmp_path):
    """Two processes, one after the other, then a third start that has nothing to do."""
    folder, trees = weights
    args = [
        f"--weights={folder}",
        f"--videos={videos}",
        f"--dst={tmp_path / 'data'}",
        *SIZE,
        "--image",
        "--per_part=2",
    ]
    assert "2 parts are left" in succeed(
        *args, "--process_index=1", "--process_count=3", "--batch=2"
    )
    for last in ("--process_count=1", "--process_index=0"):
        told = succeed(*args, last)
    for line in (
        "5 sources = 2 records + 3 left out\n",
        "bare.mp4: no caption: there is no bare.txt beside it",
        "cut.mp4: it cannot be decoded after 0 frames",
        "short.mp4: it gives 5 frames at 16 a second, --frames=9 are wanted",
    ):
        assert line in told
    encoded = open_records(tmp_path / "data", (3, 4, 6, 16), 512)
    to_latents = jax.jit(vae.encode_video, static_argnums=(2, 3))
    for record, name in zip(encoded.records, ("a", "b"), strict=True):
        clip = read_clip(videos / f"{name}.mp4", 9, 32, 48, 16)
        video = jnp.asarray(clip[None] / np.float32(127.5) - 1)
        picture = jnp.asarray(image_clip(clip[0], 9, 32, 48))[None]
        pixels = jnp.asarray(squash_for_clip(clip[0], 28))[None]
        condition = to_latents(trees[VAE], picture, CONFIGS[VAE], jnp.float32)
        wanted = {
            "video": to_latents(trees[VAE], video, CONFIGS[VAE], jnp.float32)[0],
            "condition": condition[0],
            "image": image_encoder.encode_image(trees[IMAGE], pixels, CONFIGS[IMAGE])[0],
            "text": text_of(trees, record["caption"]),
        }
        assert condition_latents(jnp.asarray(record["condition"])[None]).shape == (1, 3, 4, 6, 20)
        for key, value in wanted.items():
            np.testing.assert_allclose(
                record[key][: len(value)], value, rtol=2e-3, atol=2e-3, err_msg=key
            )
            assert not record[key][len(value) :].any()
    done = program(*args, "--negative_prompt=grey")
    assert done.returncode == 2 and "was begun with negative_prompt=" in done.stderr


@pytest.mark.slow
def test_prompts_become_texts(weights, tmp_path):
    folder, trees = weights
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("uuid,prompt\n1,A cat walks.\n2,\n3,A dog.\n")
    succeed(
        f"--weights={folder}",
        f"--prompts={prompts}",
        f"--dst={tmp_path / 'data'}",
        "--dtype=float32",
        "--negative_prompt=A dog.",
    )
    encoded = open_records(tmp_path / "data", (21, 60, 104, 16), 512)
    for record, caption in zip(encoded.records, ("A cat walks.", "A dog."), strict=True):
        wanted = text_of(trees, caption)
        assert record["caption"] == caption and record.keys() == {"caption", "text"}
        np.testing.assert_allclose(record["text"][: len(wanted)], wanted, rtol=2e-3, atol=2e-3)
        assert not record["text"][len(wanted) :].any()
    np.testing.assert_array_equal(encoded.null_text, encoded.records[1]["text"])


@pytest.mark.slow
def test_switch_prompts_become_texts_beside_their_prompts(weights, tmp_path):
    """A source whose prompts are not paired is left out, with the reason; an unpaired list is
    refused.
    """
    folder, trees = weights
    files = {"p.txt": "A cat walks.\nA dog.\nA dog.", "s.txt": "A dog.\n\nA cat walks."}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args = [f"--weights={folder}", f"--prompts={tmp_path / 'p.txt'}", "--dtype=float32"]
    args += [f"--switch_prompts={tmp_path / 's.txt'}"]
    told = succeed(*args, f"--dst={tmp_path / 'data'}", "--negative_prompt=A dog.")
    assert "prompt 2: line 2 of p.txt: it has no switch prompt" in told
    encoded = open_records(tmp_path / "data", (21, 60, 104, 16), 512)
    found = [record["caption"] for record in encoded.records]
    assert found == ["A cat walks.", "A dog."]
    for record, switch in zip(encoded.records, ("A dog.", "A cat walks."), strict=True):
        wanted = text_of(trees, switch)
        assert record.keys() == {"caption", "text", "switch"}
        np.testing.assert_allclose(record["switch"][: len(wanted)], wanted, rtol=2e-3, atol=2e-3)
        assert not record["switch"][len(wanted) :].any()
    (tmp_path / "s.txt").write_text("A dog.")
    done = program(*args, f"--dst={tmp_path / 'other'}")
    assert done.returncode == 2 and "p.txt has 3 prompts and" in done.stderr


@pytest.mark.slow
def test_a_teacher_makes_a_clip_of_each_prompt(weights, tmp_path):
    """Its noise is of the prompt's number: however prompts are grouped and parted, the clips are
    the same.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat walks.\nA dog.\nA cat walks.\n")
    args = [f"--weights={weights[0]}", f"--prompts={prompts}", "--teacher", "--num_steps=3", *SIZE]
    succeed(*args, f"--dst={tmp_path / 'one'}")
    succeed(*args, f"--dst={tmp_path / 'two'}", "--batch=2", "--per_part=2")
    one, two = (
        open_records(tmp_path / name, (3, 4, 6, 16), 512).records for name in ("one", "two")
    )
    for first, second in zip(one, two, strict=True):
        assert first["caption"] == second["caption"] and first["video"].std() > 0.1
        np.testing.assert_allclose(first["video"], second["video"], rtol=5e-3, atol=5e-3)
    assert np.abs(one[0]["video"] - one[2]["video"]).mean() > 0.1  # the same prompt, other noise
    settings = {"rows": np.arange(3), "encode_caption": str.split, "world": World()}
    batch = next(pipeline.batches(one, batch_size=3, seed=0, start=0, **settings))
    assert batch["video"].shape == (3, 3, 4, 6, 16) and batch["text"].shape == (3, 512, 32)


@pytest.mark.slow
def test_tiny_random_weights_need_no_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat.\n" + "x" * 600)
    told = succeed(
        "--preset_size=tiny", f"--prompts={tmp_path / 'prompts.txt'}", f"--dst={tmp_path / 'data'}"
    )
    assert "2 sources = 1 records + 1 left out" in told and "prompt 2: the text 'xxx" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, message",
    [
        (["--videos=/nowhere"], "name the weights"),
        (["--preset_size=tiny"], "give either --videos=DIR or --prompts=FILE"),
        (["--preset_size=tiny", "--videos=/nowhere"], "there is no folder /nowhere"),
        (["--preset_size=tiny", "--prompts=/nowhere"], "cannot read /nowhere"),
        (
            ["--preset_size=tiny", "--videos=/nowhere", "--teacher"],
            "--teacher makes clips of prompts",
        ),
        (
            ["--preset_size=tiny", "--videos=v", "--size=830x480"],
            "--size=830x480 is not WIDTHxHEIGHT",
        ),
        (["--preset_size=tiny", "--videos=v", "--frames=80"], "--frames=80 must be 4k + 1"),
        (["--preset_size=tiny", "--prompts=p", "--frames=-3"], "--frames=-3"),
        (["--preset_size=tiny", "--videos=v", "--size=0x0"], "--size=0x0 is not WIDTHxHEIGHT"),
        (
            ["--preset_size=tiny", "--prompts=p", "--teacher", "--guidance=nan"],
            "--guidance=nan must be a number",
        ),
        (
            ["--preset_size=tiny", "--prompts=p", "--teacher", "--shift=inf"],
            "--shift=inf must be more than 0",
        ),
        (
            ["--preset_size=tiny", "--prompts=p", "--process_index=2"],
            "--process_index=2 must be below",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, args, message):
    done = program(*args, f"--dst={tmp_path / 'data'}")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_every_source_is_a_record_or_a_reason(videos, tmp_path):
    """What the folder holds, counted by hand: see the fixture, and what is put beside it here."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for file in videos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("more.ts", "still.webp", "notes.xyz"):
        (folder / name).write_bytes(b"no video")
        (folder / name).with_suffix(".txt").write_text("A cat.")
    (folder / "alone.txt").write_bytes("A cat.".encode("utf-16"))
    (folder / "a.json").write_text("{}")
    told = succeed(
        "--preset_size=tiny",
        f"--videos={folder}",
        f"--dst={tmp_path / 'data'}",
        "--size=48x32",
        "--frames=9",
    )
    assert "9 sources = 2 records + 7 left out\n" in told
    rejected = [
        json.loads(line) for line in (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()
    ]
    assert [line["source"] for line in rejected] == [
        *("alone.txt", "bare.mp4", "cut.mp4", "more.ts", "notes.xyz", "short.mp4", "still.webp")
    ]
    assert all(line["reason"] for line in rejected)
    assert json.loads((tmp_path / "data" / "settings.json").read_text())["reader"] == 2
