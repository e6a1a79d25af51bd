"""How every test sees JAX: float32 for real on 8 virtual CPU devices, nothing broadcast by
accident.

A test runs on the first device unless it builds a mesh from `jax.devices()`.
`JAX_PLATFORMS=cuda pytest -m gpu` runs the tests that need a GPU.
"""

import os
from pathlib import Path

import jax
import pytest

from tests import buckets

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "salt_jax" / "jax_tests"

# Also of the programs that tests start: with the compilers for TPU installed, jax would look for
# one and say so.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# also for what a file makes when it is read
jax.config.update("jax_disable_most_optimizations", True)
# A collective on virtual devices blocks a thread, and XLA takes no more threads than there are
# devices: where a program has collectives that may go in any order, all threads may wait for one
# that none is left to run.
os.environ["NPROC"] = "32"
jax.devices()
del os.environ["NPROC"]
# Compiled programs are kept between runs, outside the repository: they fit the CPU they were made
# on.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
# the programs of launch would choose their own
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# The files that take longest begin first: one that is alone at the end leaves a core idle. Those of
# the compilers take much memory, and do not stand beside each other.
LONGEST = (
    "compile/test_for_tpu.py",
    "test_configs.py",
    "launch/test_processes.py",
    "compile/test_for_gpu.py",
    "launch/test_bucket.py",
    "launch/test_bench.py",
    "launch/test_shared_work.py",
    "launch/test_measure.py",
    "train/test_resume.py",
    "planning/test_memory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    rank = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    if gone := [str(path) for path in rank if not path.is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names {gone[0]}, which is not there")
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Paths of a config that are there become absolute, and a checkout may have been trained in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def service():
    """Google Cloud Storage on this machine."""
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name)
    with buckets.emulator() as address:
        yield address


@pytest.fixture
def bucket(service):
    """The address of an empty folder in a bucket."""
    return buckets.new_folder()


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What a file compiled is of no use to the next one, and would be gigabytes at the end."""
    yield
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` run where the default backend is a GPU and say so elsewhere.

    What most tests compile runs for milliseconds: half the effort of compiling it is enough.
    """
    jax.config.update(
        "jax_disable_most_optimizations", item.get_closest_marker("optimized") is None
    )
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: run with JAX_PLATFORMS=cuda")
