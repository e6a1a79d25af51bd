"""launch.sample --stream: a video that is written while it is made."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import ROOT
from tests.launch.programs import frames, program, succeed

TINY = [
    *("--preset_size=tiny", "--model=wan2.1-t2v-1.3b", "--chunk=3", "--memory=12:3:relative"),
    *("--size=64x64", "--num_steps=2", "--prompt=A cat walks.", "--dtype=float32"),
]


@pytest.mark.slow
def test_it_is_the_video_that_is_made_otherwise_and_says_how_fast(tmp_path):
    asked = [*TINY, "--frames=93", "--switch=45:A dog runs."]
    told = succeed("sample", *asked, "--stream", f"--out={tmp_path / 'stream'}")
    assert re.search(r"93 frames, 5\.8 s of video, in [\d.]+ s; the first after [\d.]+ s", told)
    shares = re.search(
        r"transformer ([\d.]+)%, decoder ([\d.]+)%, writing ([\d.]+)%.* ([\d.]+)%", told
    )
    assert shares and sum(map(float, shares.groups())) == pytest.approx(100, abs=0.3)
    succeed("sample", *asked, "--count=1", f"--out={tmp_path / 'whole'}")
    (streamed, _), (whole, _) = (frames(tmp_path / d / "2_000.mp4") for d in ("stream", "whole"))
    assert np.abs(streamed.astype(int) - whole).mean() < 5  # both are lossy, of noise
    again = succeed("sample", *asked, "--stream", f"--out={tmp_path / 'stream'}")
    assert "is there already" in again


@pytest.mark.slow
def test_stopped_by_hand_it_keeps_what_was_made(tmp_path):
    asked = [*TINY, "--seconds=600", "--stream", f"--out={tmp_path}"]
    running = subprocess.Popen(
        [sys.executable, "-m", "launch.sample", *asked],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not that of a job
    )
    partial = tmp_path / "2_000.mp4.partial"
    until = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 50_000) and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    told, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and "stopped by hand" in told
    made = len(frames(tmp_path / "2_000.mp4")[0])
    line = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[-1])
    assert line["made_with"]["stopped_at_frame"] == made < 9600


@pytest.mark.parametrize("flag", ["--count=2", "--prompts_file=x", "--prefix=x"])
def test_it_makes_one_video(flag, tmp_path):
    done = program("sample", *TINY[:-2], "--stream", flag, f"--out={tmp_path}")
    assert done.returncode == 2 and "exclude each other" in done.stderr
