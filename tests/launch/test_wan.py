"""From weights to a video, to data, to a student, and out again: Wan 2.1 in form, small, with random weights."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.launch.test_programs import frames, program, succeed

SMALL = ["--size=32x32", "--frames=9"]
TINY = ["--preset_size=tiny", "--model=wan2.1-t2v-1.3b", *SMALL]
TRAIN = [
    "--config.weights=",
    "--config.text_encoder=wan-tiny",
    "--config.model.dtype=float32",
    "--config.data.clip=(3,4,4)",
    "--config.batch_size=2",
    "--config.updates=1",
    "--config.critic_updates=1",
    "--config.mesh.fsdp=1",
]


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
    """The noise is the seed's, the solver matters, and a second call makes only what is missing."""
    args = ["sample", *TINY, f"--prompts_file={prompts}", "--num_updates=2", f"--out={tmp_path}"]
    succeed(*args)
    clip, fps = frames(tmp_path / "2_001.mp4")
    assert clip.shape == (9, 32, 32, 3) and fps == 16
    before = [(tmp_path / f"2_{i:03d}.mp4").read_bytes() for i in range(2)]
    assert before[0] != before[1]
    (tmp_path / "2_000.mp4").unlink()
    (tmp_path / "2_001.mp4").write_bytes(b"mine")
    succeed(*args)
    assert (tmp_path / "2_000.mp4").read_bytes() == before[0]
    assert (tmp_path / "2_001.mp4").read_bytes() == b"mine"


@pytest.mark.slow
def test_vbench_gets_its_names_and_the_seeds_lie_beside(tmp_path):
    told = [{"prompt_en": "a cat", "dimension": ["scene"]}]
    (tmp_path / "info.json").write_text(json.dumps(told))
    (tmp_path / "extended.txt").write_text("A cat on a long and sunny wall.\n")
    out = tmp_path / "videos"
    args = [f"--vbench={tmp_path / 'info.json'}", f"--extended={tmp_path / 'extended.txt'}", f"--out={out}"]
    succeed("sample", *TINY, "--num_updates=1", *args)
    assert sorted(path.name for path in out.iterdir()) == [f"a cat-{i}.mp4" for i in range(5)]
    seeds = json.loads((tmp_path / "videos.seeds.json").read_text())
    assert set(seeds) == {f"a cat-{i}.mp4" for i in range(5)} and len(set(seeds.values())) == 5


@pytest.mark.slow
def test_a_student_goes_on_from_a_picture_chunk_by_chunk(tmp_path, picture):
    args = ["--chunk=2", f"--image={picture}", "--prompt=A cat", "--count=1", "--num_updates=2"]
    succeed("sample", *TINY, *args, "--frames=17", f"--out={tmp_path}")
    clip, _ = frames(tmp_path / "2_000.mp4")
    assert clip.shape[0] == 17 and clip.shape[1] < clip.shape[2]  # the picture is wider than high


@pytest.mark.slow
def test_from_prompts_to_a_student_and_its_video(tmp_path, prompts):
    """Text to video: a teacher's clips as data, one update of student and critic, and a video of the student."""
    data, run = tmp_path / "data", tmp_path / "run"
    succeed(
        "encode",
        "--preset_size=tiny",
        *SMALL,
        f"--prompts={prompts}",
        "--teacher",
        "--updates=2",
        f"--dst={data}",
    )
    preset = "--config.model.preset=wan2.1-t2v-tiny"
    succeed(
        "train",
        "--config=configs/wan_t2v.py",
        f"--workdir={run}",
        f"--config.data.dir={data}",
        preset,
        *TRAIN,
    )
    succeed("sample", f"--workdir={run}", "--num_updates=2", "--prompt=A cat", "--count=1")
    assert frames(run / "samples" / "2_000.mp4")[0].shape == (9, 32, 32, 3)


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
    succeed("train", "--config=configs/wan_causal_self_forcing.py:salt", f"--workdir={run}", *TRAIN, *changes)
    succeed("sample", f"--workdir={run}", "--num_updates=2", "--prompt=A cat", "--count=1", "--frames=9")
    assert frames(run / "samples" / "2_000.mp4")[0].shape == (9, 32, 32, 3)


@pytest.mark.slow
def test_from_videos_to_a_student_that_reads_pictures(tmp_path, picture):
    """Image to video: a user's clips as data, one update, and a video from a picture; without one it is refused."""
    from salt_jax.video import write_mp4

    videos, data, run = tmp_path / "videos", tmp_path / "data", tmp_path / "run"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_mp4(videos / f"{name}.mp4", rng.integers(0, 256, (9, 32, 48, 3), np.uint8), 1)
        (videos / f"{name}.txt").write_text(f"Noise {name}.")
    succeed("encode", "--preset_size=tiny", *SMALL, f"--videos={videos}", "--image", f"--dst={data}")
    preset = "--config.model.preset=wan2.1-i2v-tiny"
    succeed(
        "train",
        "--config=configs/wan_i2v.py",
        f"--workdir={run}",
        f"--config.data.dir={data}",
        preset,
        *TRAIN,
    )
    args = ["sample", f"--workdir={run}", "--num_updates=2", "--prompt=A cat", "--count=1"]
    succeed(*args, f"--image={picture}")
    assert frames(run / "samples" / "2_000.mp4")[0].shape == (9, 32, 32, 3)
    done = program(*args)
    assert done.returncode == 2 and "--image" in done.stderr and done.stderr.count("\n") == 1


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
        ([*TINY, "--image=nowhere.png"], "--image"),
        ([*TINY, "--num_updates=0"], "--num_updates"),
        (["--weights=nowhere"], "nowhere"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(tmp_path, args, told):
    done = program("sample", "--prompt=A cat", f"--out={tmp_path}", *args)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
