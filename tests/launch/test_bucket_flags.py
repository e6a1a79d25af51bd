"""Every flag that names a file takes one in a bucket; a bucket out of reach, or in use by another
run, ends a program with a sentence.
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from salt_jax.io import lock
from salt_jax.io.files import as_path, below, write_whole
from salt_jax.io.video import encode_mp4
from tests import buckets
from tests.convert.networks import T2V as SIZES
from tests.convert.networks import lora_file, official, save_torch
from tests.helpers import randomised, shapes_of
from tests.launch import processes
from tests.launch.programs import WAN_TINY, program, succeed

T2V = ["--preset_size=tiny", "--model=wan2.1-t2v-1.3b", "--size=32x32", "--num_steps=1"]
I2V = ["--preset_size=tiny", "--model=wan2.1-i2v-14b", "--size=32x32", "--num_steps=1"]


def put(address, content):
    write_whole(as_path(address), content)
    return address


def names(folder):
    return {str(f.relative_to(as_path(folder))) for f in below(as_path(folder))}


@pytest.mark.slow
def test_pictures_clips_and_lists_are_read_from_a_bucket(bucket, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "picture.png")
    picture = put(f"{bucket}/picture.png", (tmp_path / "picture.png").read_bytes())
    one = ["--prompt=A cat", "--count=1"]
    succeed("sample", *I2V, *one, "--frames=5", f"--image={picture}", f"--out={bucket}/picture")
    clip = put(f"{bucket}/clip.mp4", encode_mp4(pixels, 16, 1))
    chunks = ["--chunk=1", "--frames=13", f"--prefix={clip}", f"--out={bucket}/prefix"]
    succeed("sample", *T2V, *one, *chunks)
    told = [{"prompt_en": "a cat", "dimension": ["scene"]}]
    info = put(f"{bucket}/info.json", json.dumps(told))
    extended = put(f"{bucket}/extended.txt", "A cat on a long and sunny wall.\n")
    out = f"{bucket}/videos"
    vbench = [f"--vbench={info}", f"--extended={extended}", "--frames=5", f"--out={out}"]
    assert "5 videos made" in succeed("sample", *T2V, *vbench)
    assert names(out) == {f"a cat-{i}.mp4" for i in range(5)}
    assert {"videos.seeds.json", "videos.samples.jsonl"} <= names(bucket)


@pytest.mark.slow
def test_numbers_are_written_to_a_bucket(bucket):
    file = f"--json={bucket}/numbers/plan.json"
    succeed("plan", "--config=configs/sc_dmd.py:wan", "--mesh=fsdp:8", file)
    small = ["--preset=wan2.1-t2v-tiny", "--frames=3", "--height=4", "--width=4", "--vae=tiny"]
    file = f"--json={bucket}/numbers/bench.json"
    succeed("bench", *small, "--runs=1", "--what=teacher_forward", "--matmul=64", file)
    file = f"--json={bucket}/numbers/compile.json"
    alone = ["--what=text", "--config.mesh.fsdp=1", "--config.batch_size=1"]
    succeed("compile", *WAN_TINY, *alone, file)
    for name in ("plan", "bench", "compile"):
        assert json.loads((as_path(bucket) / f"numbers/{name}.json").read_text())


@pytest.mark.slow
def test_a_lora_is_read_from_a_bucket(bucket, tmp_path):
    pytest.importorskip("torch")
    params = randomised(shapes_of(SIZES), 1)
    put(f"{bucket}/config.json", '{"num_heads": 2}')
    base = save_torch(tmp_path / "base.pt", {"generator": official(params, SIZES)})
    lora, _ = lora_file(tmp_path / "lora.pt", params, 4)
    there = [put(f"{bucket}/{file.name}", file.read_bytes()) for file in (base, lora)]
    told = succeed("convert_wan", f"--src={there[0]}", f"--lora={there[1]}", f"--dst={bucket}/out")
    assert "rank 4, alpha 4, 20 matrices" in told and names(f"{bucket}/out") == {"wan.safetensors"}


def options(bucket, **more):
    found = {"weights": "", "teacher.kind": "closed_form", "batch_size": 2, "critic_ratio": 1}
    return found | {"data.num_train": 24, "data.num_test": 1, "data.dir": f"{bucket}/data"} | more


@pytest.mark.slow
def test_the_second_of_two_runs_in_a_bucket_is_refused(bucket, tmp_path, monkeypatch):
    run, logs = f"{bucket}/run", tmp_path / "first"
    keys = options(bucket, iterations=100000, save_every=100000)
    args = ["--config=configs/base.py", f"--workdir={run}"]
    args += [f"--config.{key}={value}" for key, value in keys.items()]
    (first,) = processes.launch("train", [args], logs)
    try:
        processes.until((as_path(run) / "config.json").exists, [first], logs)
        second = program("train", *args)
        assert second.returncode == 2 and first.poll() is None
        assert f"the workdir {run} is in use by another run (process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()
    monkeypatch.setattr(lock, "_host", lambda: "elsewhere 1")
    write_whole(as_path(f"{bucket}/other/note"), "")
    with lock.locked(f"{bucket}/other"):
        other = program("train", args[0], f"--workdir={bucket}/other", *args[2:])
    assert other.returncode == 2
    assert "in use by another run (process" in other.stderr and "on elsewhere" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sample"])
def test_a_bucket_out_of_reach_ends_a_program_with_a_sentence(name, service):
    with buckets.service_at(f"http://localhost:{processes.free_port()}"):
        begun = time.monotonic()
        more = ["--config=configs/base.py"] if name == "train" else []
        done = program(name, "--workdir=gs://salt-tests/run", *more)
    assert done.returncode == 2 and time.monotonic() - begun < 300
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ") and "Connect call failed" in line
