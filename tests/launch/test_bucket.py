"""Everything in a bucket, by the programs as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import salt_jax
from salt_jax.checkpoint import restore_params
from salt_jax.convert.writing import open_wan
from salt_jax.io import files
from salt_jax.io.files import as_path, below, write_whole
from salt_jax.io.model_folder import WAN, Source, open_part
from salt_jax.io.video import write_video
from salt_jax.models.presets import PRESETS
from salt_jax.sharding import all_devices
from tests.helpers import ROOT, same_bits
from tests.launch.programs import frames, succeed
from tests.launch.releases import ONE_ITERATION, release

TINY = [
    "--config=configs/sc_dmd.py",
    "--config.weights=",
    "--config.teacher.kind=closed_form",
    "--config.data.num_train=64",
    "--config.batch_size=4",
    "--config.critic_ratio=1",
    "--config.iterations=5",
    "--config.save_every=1",
    "--config.keep=5",
]


def names(folder):
    return {str(f.relative_to(as_path(folder))) for f in below(as_path(folder))}


def upload(folder, address):
    for file in below(folder):
        write_whole(as_path(address) / file.relative_to(folder), file.read_bytes())


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on_to_what_it_would_have_been(
    bucket, tmp_path, monkeypatch
):
    """Rendered, trained, killed, resumed, sampled, evaluated and exported there; an unbroken run on
    a disk has the same bits.
    """
    run, data = f"{bucket}/run", f"{bucket}/data"
    there = [f"--workdir={run}", f"--config.data.dir={data}"]
    here = [f"--workdir={tmp_path / 'run'}", f"--config.data.dir={tmp_path / 'data'}"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/cache")
    command = [sys.executable, "-m", "launch.train", *TINY, *there]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=output) as process,
    ):
        second = as_path(run) / "checkpoints" / "2" / "commit_success.txt"
        while not second.exists():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert any(name.startswith("cache/jit_") for name in names(bucket))
    assert "5" not in {path.name for path in (as_path(run) / "checkpoints").iterdir()}
    succeed("train", *TINY, *there)
    assert {"config.json", "roles.json"} <= names(run) and "lock.json" not in names(run)
    assert sum("tfevents" in name for name in names(run)) == 2
    monkeypatch.undo()
    succeed("train", *TINY, *here)
    for what in ("ema", "student"):
        one, other = (restore_params(w, what, all_devices(), 5) for w in (run, tmp_path / "run"))
        same_bits(*(jax.tree.map(np.asarray, params) for params in (one, other)))

    # to read a network takes nothing of its optimizer
    for file in below(as_path(run)):
        if "_opt/" in str(file) and "/5/" in str(file) and file.name != "commit_success.txt":
            file.unlink()
    args = ["sample", f"--workdir={run}", "--num_steps=2", "--count=2"]
    assert succeed(*args).startswith("2 videos made")
    assert succeed(*args).startswith("0 videos made")
    assert succeed(*args, "--seed=1").startswith("2 videos made")
    assert names(f"{run}/samples") == {
        "2_000.gif",
        "2_000.mp4",
        "2_001.gif",
        "2_001.mp4",
        "2_sheet.png",
        "samples.jsonl",
    }
    succeed("evaluate", f"--workdir={run}", "--count=2", "--teacher_steps=2")
    assert json.loads((as_path(run) / "evaluation.json").read_text())["student"]
    assert (as_path(run) / "report.html").read_text().startswith("<!DOCTYPE html>")
    succeed("export", f"--workdir={run}", f"--dst={bucket}/out/student.safetensors")
    model = salt_jax.load(f"{bucket}/out/student.safetensors")
    assert model.generate("A red circle moves left.", num_steps=1).shape == (9, 12, 12, 3)
    start = ["--config.iterations=1", f"--config.init_from={bucket}/out/student.safetensors"]
    succeed("train", *TINY, f"--workdir={bucket}/next", f"--config.data.dir={data}", *start)
    assert f"{bucket}/out/student.safetensors" in (as_path(bucket) / "next/roles.json").read_text()
    assert not Path(ROOT, "gs:").exists()


@pytest.mark.slow
def test_wan_goes_in_through_data_and_training_and_out_in_a_bucket(bucket, tmp_path):
    config, run = PRESETS["wan2.1-t2v-tiny"], f"{bucket}/run"
    upload(release(tmp_path / "release", "official", config), f"{bucket}/release")
    weights = f"--weights={bucket}/weights"
    succeed("convert_wan", f"--src={bucket}/release", f"--dst={bucket}/weights")
    parts = {"wan.safetensors", "vae.safetensors", "text_encoder.safetensors", "tokenizer.json"}
    assert names(f"{bucket}/weights") == parts
    write_whole(as_path(bucket) / "prompts.txt", "A cat walks.\nA dog runs.\n")
    small = ["--size=32x32", "--frames=9"]
    picture = ["--count=1", "--num_steps=2", f"--out={bucket}/clips"]
    succeed("sample", weights, *small, "--prompt=A cat walks.", *picture)
    with files.on_disk(as_path(f"{bucket}/clips/2_000.mp4")) as file:
        assert frames(file)[0].shape == (9, 32, 32, 3)
    for name in ("a", "deep/b"):
        clip = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
        write_video(f"{bucket}/videos/{name}.mp4", clip)
        write_whole(as_path(f"{bucket}/videos/{name}.txt"), "Noise.")
    write_whole(as_path(f"{bucket}/videos/c.txt"), "Alone.")
    made = succeed("encode", weights, *small, f"--videos={bucket}/videos", f"--dst={bucket}/data")
    assert "3 sources = 2 records + 1 left out" in made
    made = succeed("encode", weights, f"--prompts={bucket}/prompts.txt", f"--dst={bucket}/texts")
    assert "2 sources = 2 records + 0 left out" in made
    train = [
        "train",
        "--config=configs/sc_dmd.py:wan",
        f"--workdir={run}",
        f"--config.data.dir={bucket}/data",
        f"--config.weights={bucket}/weights",
        "--config.model.preset=wan2.1-t2v-tiny",
        *ONE_ITERATION,
    ]
    succeed(*train)
    succeed("sample", f"--workdir={run}", "--num_steps=2", "--prompt=A cat", "--count=1")
    assert "2_000.mp4" in names(f"{run}/samples")
    succeed("convert_wan", "--to=diffusers", f"--src={run}", f"--dst={bucket}/diffusers")
    assert names(f"{bucket}/diffusers") == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    succeed("convert_wan", f"--src={bucket}/diffusers", f"--dst={bucket}/back")
    found, tree = open_part(WAN, Source(f"{bucket}/back"))
    student = restore_params(run, "ema", all_devices())
    assert found == config == open_wan(f"{bucket}/back").config
    same_bits(*(jax.tree.map(np.asarray, params) for params in (tree, student)))
    assert not Path(ROOT, "gs:").exists()
