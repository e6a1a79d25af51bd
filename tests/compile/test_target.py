"""Machines by name, and what their compilers need around them."""

import ctypes
import re
import shutil
from importlib import metadata
from types import SimpleNamespace

import pytest

from salt_jax.compile import surroundings as s
from salt_jax.compile.gpu_description import describe
from salt_jax.compile.target import GPUS, Target, read_target
from salt_jax.errors import UserError
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("told", "target", "devices"),
    [
        ("here", Target("here", "", ()), 1),
        ("tpu:v5p:2x2x4", Target("tpu", "v5p", (2, 2, 4)), 16),
        ("tpu:v6e:4x8", Target("tpu", "v6e", (4, 8)), 32),
        ("gpu:h200:1", Target("gpu", "h200", (1, 1)), 1),
        ("gpu:h100:2x8", Target("gpu", "h100", (2, 8)), 16),
    ],
)
def test_a_machine_has_a_name(told, target, devices):
    assert read_target(told) == target and target.devices == devices


@pytest.mark.parametrize(
    "told",
    [
        *(
            "",
            "tpu",
            "tpu:v5p",
            "tpu:v5p:",
            "tpu:v5p:2x2",
            "tpu:v6e:2x2x2",
            "tpu:v9:2x2",
            "tpu:h100:8",
        ),
        *(
            "gpu:h100:0",
            "gpu:h100:-1",
            "gpu:h100:8x",
            "gpu:h100:1x2x8",
            "gpu:a100:8",
            "gpu:h100:8:8",
            "cpu:x:1",
        ),
    ],
)
def test_what_is_no_machine_is_told_in_one_sentence(told):
    with pytest.raises(
        UserError, match=re.escape(f"--target={told} is no machine; it must be here, tpu:CHIP")
    ):
        read_target(told)


def test_memory_is_what_nvidia_smi_and_libtpu_say():
    mib = {"gpu:h100:8": 81_008, "gpu:h200:1": 143_771}
    for told, size in mib.items():
        assert read_target(told).memory == pytest.approx(size * 2**20, rel=1e-5)
    assert read_target("tpu:v5p:2x2x4").memory == pytest.approx(95.73 * 2**30)
    assert read_target("here").memory is None


def test_a_gpu_is_described_in_words_that_each_jax_knows():
    new, old = (
        describe(GPUS["h200"], (9, 25, 1, 1), version) for version in ((0, 12, 0), (0, 10, 2))
    )
    assert new.count("{") == new.count("}") and 'name: "NVIDIA H200"' in new
    assert "device_memory_size: 150754820096" in new and 'dnn_version: "9.25.1"' in new
    assert "collective_memory_granularity" in new and "collective_memory_granularity" not in old


AROUND = {"XLA_FLAGS": "--xla_mine=1", "LD_LIBRARY_PATH": "/mine", "HOME": "/home"}


def environment(monkeypatch, tmp_path, target, **versions):
    """Around a process that compiles, where these packages are installed."""

    def version(name):
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(s.metadata, "version", version)
    return s.surroundings(read_target(target), tmp_path, AROUND)


def wheels(jax="0.12.0.1", **more):
    return {name.replace("-", "_"): "1" for name in s.GPU_PACKAGES} | dict(
        jax=jax, jax_cuda13_plugin=jax, nvidia_cudnn_cu13="9.25.1.1", **more
    )


def test_here_nothing_changes(monkeypatch, tmp_path):
    assert environment(monkeypatch, tmp_path, "here") == AROUND


def test_a_tpu_is_never_looked_for(monkeypatch, tmp_path):
    around = environment(monkeypatch, tmp_path, "tpu:v6e:4x4", libtpu="0.0.50.1")
    assert around["JAX_PLATFORMS"] == "cpu" and around["TPU_SKIP_MDS_QUERY"] == "1"
    assert around["TPU_ACCELERATOR_TYPE"] == "v6e-8" and around["XLA_FLAGS"] == "--xla_mine=1"


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize(("jax", "plans"), [("0.12.0.1", True), ("0.10.2", False)])
def test_a_gpu_gets_a_driver_and_the_flags_that_its_jax_knows(monkeypatch, tmp_path, jax, plans):
    around = environment(monkeypatch, tmp_path, "gpu:h100:8", **wheels(jax))
    flags = around["XLA_FLAGS"].split()
    assert flags[0] == "--xla_mine=1" and "--xla_gpu_enable_triton_gemm=false" in flags
    assert any("cudnn_deviceless" in flag for flag in flags) == plans
    folder, mine = around["LD_LIBRARY_PATH"].split(":")
    assert mine == "/mine" and around["HOME"] == "/home"
    driver, count = ctypes.CDLL(f"{folder}/libcuda.so.1"), ctypes.c_int(7)
    assert (
        driver.cuInit(0) == 100
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value == 0
    )
    written = (tmp_path / folder / "libcuda.so.1").stat().st_mtime_ns
    environment(monkeypatch, tmp_path, "gpu:h100:8", **wheels(jax))
    assert (tmp_path / folder / "libcuda.so.1").stat().st_mtime_ns == written  # made once


@pytest.mark.parametrize(
    ("target", "there", "told"),
    [
        (
            "tpu:v6e:4x4",
            {},
            "needs libtpu, not installed; pip install --no-deps -r requirements-tpu.txt",
        ),
        ("gpu:h100:8", {}, "needs jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cudnn-cu13"),
        (
            "gpu:h100:8",
            wheels() | {"jax": "0.12.1"},
            "jax-cuda13-plugin 0.12.0.1 does not go with jax 0.12.1",
        ),
        (
            "gpu:h100:8",
            wheels() | {"nvidia_cudnn_cu13": "9.27.0.1"},
            "9.27.0.1 cannot plan .* 9.23 to 9.26 can",
        ),
    ],
)
def test_each_absent_part_is_one_sentence(monkeypatch, tmp_path, target, there, told):
    with pytest.raises(UserError, match=told):
        environment(monkeypatch, tmp_path, target, **there)


def test_no_c_compiler_and_one_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(s.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C compiler, cc or gcc"):
        s.build_driver(tmp_path)
    monkeypatch.setattr(s.shutil, "which", lambda name: "cc")
    broken = lambda *args, **kwargs: SimpleNamespace(returncode=1, stderr="note\nno linker\n")
    monkeypatch.setattr(s.subprocess, "run", broken)
    with pytest.raises(UserError, match="failed: no linker"):
        s.build_driver(tmp_path)


def test_the_requirement_files_hold_what_is_asked_for():
    for packages, file in ((s.GPU_PACKAGES, "gpu-compile"), (s.TPU_PACKAGES, "tpu")):
        lines = (ROOT / f"requirements-{file}.txt").read_text().splitlines()
        named = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
        assert named - {"jax", "jaxlib"} == set(packages)


def test_a_log_ends_with_its_reason():
    assert s.last_line("a\n\nb \n\n") == "b" and s.last_line("") == "it said nothing"
    log = (
        "W0101 x\nF1125 03:00:00 1 fusion.cc:3] Check failed: padded\n"
        "*** Check failure stack trace: ***\n  @ main\n"
    )
    assert s.last_line(log) == "F1125 03:00:00 1 fusion.cc:3] Check failed: padded"
