"""From weights to a video, to data, to a student, and out again: Wan 2.1 in form, small, with
random weights.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from salt_jax.checkpoint import restore_params
from salt_jax.data.clips import read_ending
from salt_jax.io.model_folder import VAE, WAN, Source, open_part
from salt_jax.io.video import write_video
from salt_jax.models import vae
from salt_jax.models.presets import PRESETS
from salt_jax.rollout.pixels import to_bytes
from salt_jax.sharding import all_devices
from tests.convert.networks import save_torch
from tests.helpers import same_bits
from tests.launch.programs import frames, program, succeed
from tests.launch.releases import ONE_ITERATION, release
from tests.models.taehv import arrays_of

SMALL = ["--size=32x32", "--frames=9"]
TINY = ["--preset_size=tiny", "--model=wan2.1-t2v-1.3b", *SMALL]
TRAIN = ["--config.weights=", *ONE_ITERATION]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("A cat walks.\nA dog runs.\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(ramp).save(file)
    return file


@pytest.mark.slow
def test_a_teacher_makes_a_video_of_each_prompt_and_leaves_what_is_there(tmp_path, prompts):
    """The noise is the seed's.

    A second call makes only what is missing; another prompt is another video.
    """
    args = ["sample", *TINY, "--num_steps=2", f"--out={tmp_path}"]
    assert "2 videos made" in succeed(*args, f"--prompts_file={prompts}")
    clip, fps = frames(tmp_path / "2_001.mp4")
    assert clip.shape == (9, 32, 32, 3) and fps == 16
    before = [(tmp_path / f"2_{i:03d}.mp4").read_bytes() for i in range(2)]
    assert before[0] != before[1]
    (tmp_path / "2_000.mp4").unlink()
    assert "1 videos made" in succeed(*args, f"--prompts_file={prompts}")
    assert [(tmp_path / f"2_{i:03d}.mp4").read_bytes() for i in range(2)] == before
    other = [*args, "--prompt=A dog runs.", "--count=1"]
    tiny = save_torch(tmp_path / "taew2_1.pth", arrays_of(dtype=np.float16))
    tiny = [f"--tiny_decoder={tiny}"]
    for more in ([], tiny, ["--guidance=2"], ["--guidance=2", "--seed=1"]):
        assert "1 videos made" in succeed(*other, *more)
        assert "0 videos made" in succeed(*other, *more)
    assert (tmp_path / "2_000.mp4").read_bytes() != before[
        0
    ]  # the seed's; fresh weights say the same of all prompts
    told = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert (
        told[-1]["made_with"]["prompt"] == "A dog runs." and told[-1]["made_with"]["guidance"] == 2
    )
    assert len({line["made_with"]["weights"].get("tiny_decoder") for line in told}) == 2
    (tmp_path / "2_001.mp4").write_bytes(b"mine")
    done = program(*args, f"--prompts_file={prompts}")
    assert (
        done.returncode == 2
        and "2_001.mp4 is there" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert (tmp_path / "2_001.mp4").read_bytes() == b"mine"


@pytest.mark.slow
def test_vbench_gets_its_names_and_records_lie_beside(tmp_path):
    told = [{"prompt_en": "a cat", "dimension": ["scene"]}]
    (tmp_path / "info.json").write_text(json.dumps(told))
    (tmp_path / "extended.txt").write_text("A cat on a long and sunny wall.\n")
    out = tmp_path / "videos"
    args = [
        f"--vbench={tmp_path / 'info.json'}",
        f"--extended={tmp_path / 'extended.txt'}",
        f"--out={out}",
    ]
    assert "5 videos made" in succeed("sample", *TINY, "--num_steps=1", *args)
    assert sorted(path.name for path in out.iterdir()) == [f"a cat-{i}.mp4" for i in range(5)]
    seeds = json.loads((tmp_path / "videos.seeds.json").read_text())
    assert set(seeds) == {f"a cat-{i}.mp4" for i in range(5)} and len(set(seeds.values())) == 5
    lines = [
        json.loads(line) for line in (tmp_path / "videos.samples.jsonl").read_text().splitlines()
    ]
    assert {line["file"]: line["made_with"]["seed"] for line in lines} == seeds
    (out / "a cat-3.mp4").unlink()
    assert "1 videos made" in succeed("sample", *TINY, "--num_steps=1", *args)
    # not those of one update
    assert "5 videos made" in succeed("sample", *TINY, "--num_steps=2", *args)


@pytest.mark.slow
def test_a_student_goes_on_from_a_picture_chunk_by_chunk(tmp_path, picture):
    args = ["--chunk=2", f"--image={picture}", "--prompt=A cat", "--count=1", "--num_steps=2"]
    succeed("sample", *TINY, *args, "--frames=17", f"--out={tmp_path}")
    clip, _ = frames(tmp_path / "2_000.mp4")
    assert clip.shape[0] == 17 and clip.shape[1] < clip.shape[2]  # the picture is wider than high


@pytest.mark.slow
def test_from_prompts_alone_to_a_causal_student(tmp_path, prompts):
    """Salt chunk by chunk needs no videos; its teacher is another network."""
    data, run = tmp_path / "data", tmp_path / "run"
    succeed("encode", "--preset_size=tiny", f"--prompts={prompts}", f"--dst={data}")
    changes = ["--config.model.preset=wan2.1-t2v-tiny", "--config.teacher.preset=wan2.1-t2v-tiny"]
    changes += [
        "--config.teacher.weights=",
        "--config.init_from=",
        "--config.align.layers=1",
        "--config.memory.chunk=1",
    ]
    changes += ["--config.memory.first=1", f"--config.data.dir={data}"]
    succeed(
        "train", "--config=configs/self_forcing.py:wan,salt", f"--workdir={run}", *TRAIN, *changes
    )
    succeed(
        "sample", f"--workdir={run}", "--num_steps=2", "--prompt=A cat", "--count=1", "--frames=9"
    )
    assert frames(run / "samples" / "2_000.mp4")[0].shape == (9, 32, 32, 3)
    # What is measured of it
    long = ["--long=2", "--memory=2:1:relative", "--solvers=euler,cm", "--dtype=float32"]
    table = succeed("evaluate", f"--workdir={run}", f"--prompts_file={prompts}", *long)
    assert "motion, pixels" in table and "semigroup defect, cm" in table
    assert (run / "report.html").stat().st_size > 10_000
    numbers = json.loads((run / "evaluation.json").read_text())
    assert set(numbers["student"]) == {"euler", "cm"} and numbers["clips"] == "2"
    for result in numbers["student"].values():
        assert len(result["defect"]["per_interval"]) == 4
        for kind in ("latents", "pixels"):
            assert set(result["cross_step"][kind]) == {"2-4", "2-8", "4-8"}
        assert set(result["videos"]) == {"2", "4", "8"}
        for found in result["videos"].values():
            assert len(found["drift"]) == len(found["looks"]) == 3 and found["drift"][0] == 0
            assert set(found["motion"]) == {"latents", "pixels"}
    assert len(numbers["long"]["2:1:relative"]["drift"]) == 6
    for flag, told in (("--count=3", "--count is for"), ("--long=2", "give --prompts_file")):
        done = program("evaluate", f"--workdir={run}", flag)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_clip_is_continued_under_guidance_and_other_prompts(tmp_path):
    """What is written begins with the clip, through the VAE; a switch changes only what follows."""
    weights = tmp_path / "w"
    succeed(
        "convert_wan",
        f"--src={release(tmp_path / 'r', 'official', PRESETS['wan2.1-t2v-tiny'])}",
        f"--dst={weights}",
    )
    chunks = [
        f"--weights={weights}",
        "--size=32x32",
        "--chunk=3",
        "--count=1",
        "--num_steps=2",
        "--dtype=float32",
    ]
    succeed("sample", *chunks, "--frames=21", "--prompt=A cat walks.", f"--out={tmp_path / 'a'}")
    more = [f"--prefix={tmp_path / 'a' / '2_000.mp4'}", "--prompt=A dog runs.", "--frames=45"]
    succeed("sample", *chunks, *more, "--guidance=3", f"--out={tmp_path / 'b'}")
    succeed(
        "sample",
        *chunks,
        *more,
        "--guidance=3",
        "--switch=33:A cat walks.",
        f"--out={tmp_path / 'c'}",
    )
    succeed("sample", *chunks, *more, f"--out={tmp_path / 'd'}")
    a, b, c, d = (frames(tmp_path / name / "2_000.mp4")[0].astype(int) for name in "abcd")
    assert a.shape[0] == 21 and b.shape[0] == c.shape[0] == d.shape[0] == 45
    config, params = open_part(VAE, Source(str(weights)))
    clip = read_ending(tmp_path / "a" / "2_000.mp4", 99, 32, 32, 16)
    latents = vae.encode_video(
        params, jnp.asarray(clip[None] / 127.5 - 1, jnp.float32), config, jnp.float32
    )
    again = to_bytes(vae.decode_video(params, latents, config, jnp.float32))[0]
    write_video(tmp_path / "again.mp4", again)  # mp4 is lossy
    assert np.abs(b[:21] - frames(tmp_path / "again.mp4")[0].astype(int)).mean() < 6
    assert np.abs(b[:33] - c[:33]).mean() < 3 < np.abs(b[33:] - c[33:]).max()
    assert np.abs(b[21:] - d[21:]).max() > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "kind"),
    [("official", "i2v"), pytest.param("diffusers", "t2v", marks=pytest.mark.parity)],
)
def test_a_release_goes_in_makes_a_video_and_a_student_that_goes_out_again(
    tmp_path, layout, kind, prompts, picture
):
    """Its student, after an update, is the same bits whichever layout it went out and came in."""
    config, weights, data, run = (
        PRESETS[f"wan2.1-{kind}-tiny"],
        tmp_path / "w",
        tmp_path / "data",
        tmp_path / "run",
    )
    succeed(
        "convert_wan", f"--src={release(tmp_path / 'release', layout, config)}", f"--dst={weights}"
    )
    look = [f"--image={picture}"] if kind == "i2v" else []
    succeed("sample", f"--weights={weights}", *SMALL, "--prompt=A cat walks.", "--count=1",
            "--num_steps=2",
            f"--out={tmp_path}", *look)  # fmt: skip
    assert frames(tmp_path / "2_000.mp4")[0].shape[0] == 9
    if kind == "i2v":
        rng = np.random.default_rng(0)
        for name in ("a", "b"):
            write_video(
                tmp_path / "videos" / f"{name}.mp4", rng.integers(0, 256, (9, 32, 48, 3), np.uint8)
            )
            (tmp_path / "videos" / f"{name}.txt").write_text("Noise.")
        source = [f"--videos={tmp_path / 'videos'}", "--image"]
    else:
        source = [f"--prompts={prompts}", "--teacher", "--num_steps=2"]
    succeed("encode", f"--weights={weights}", *SMALL, *source, f"--dst={data}")
    changes = [*TRAIN, f"--config.weights={weights}", f"--config.model.preset=wan2.1-{kind}-tiny"]
    succeed(
        "train",
        f"--config=configs/sc_dmd.py:wan{',i2v' * (kind == 'i2v')}",
        f"--workdir={run}",
        f"--config.data.dir={data}",
        *changes,
    )
    succeed("sample", f"--workdir={run}", "--num_steps=2", "--prompt=A cat", "--count=1", *look)
    assert frames(run / "samples" / "2_000.mp4")[0].shape == (9, 32, 32, 3)
    student = jax.tree.map(np.asarray, restore_params(run, "ema", all_devices()))
    before = open_part(WAN, Source(str(weights)))[1]
    assert not np.array_equal(
        student["blocks"]["ffn_in"]["kernel"], before["blocks"]["ffn_in"]["kernel"]
    )
    for out in ("official", "diffusers"):
        succeed("convert_wan", f"--to={out}", f"--src={run}", f"--dst={tmp_path / out}")
        succeed("convert_wan", f"--src={tmp_path / out}", f"--dst={tmp_path / f'{out} back'}")
        found, tree = open_part(WAN, Source(str(tmp_path / f"{out} back")))
        assert found == config
        same_bits(jax.tree.map(np.asarray, tree), student)
    if kind == "i2v":
        done = program("sample", f"--workdir={run}", "--num_steps=2", "--prompt=A cat")
        assert done.returncode == 2 and "--image" in done.stderr and done.stderr.count("\n") == 1
        done = program("evaluate", f"--workdir={run}", f"--prompts_file={prompts}")
        assert done.returncode == 2 and "makes videos of pictures" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "--weights=DIR"),
        (["--preset_size=tiny"], "--model"),
        (["--preset_size=tiny", "--model=dall-e"], "dall-e"),
        ([*TINY, "--size=30x32"], "--size=30x32"),
        ([*TINY, "--frames=10"], "--frames=10"),
        ([*TINY, "--solver=cm"], "unipc"),
        ([*TINY, "--image=nowhere.png"], "nowhere.png"),
        ([*TINY, "--num_steps=0"], "--num_steps"),
        (["--weights=nowhere"], "nowhere"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(tmp_path, args, told):
    done = program("sample", "--prompt=A cat", f"--out={tmp_path}", *args)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
