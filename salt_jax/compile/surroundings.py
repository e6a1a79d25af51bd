"""What the compilers of an absent TPU or GPU need around them: packages, a driver, environment
variables.

No jax in here. It is about processes that are not started yet: whoever compiles must find all this
when it begins. What differs between releases of jax stands here and in `gpu_description`, nowhere
else.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from salt_jax.compile.target import TPUS, Target
from salt_jax.errors import UserError

TPU_PACKAGES = ("libtpu",)
GPU_PACKAGES = (
    *(
        "jax-cuda13-plugin",
        "jax-cuda13-pjrt",
        "nvidia-cudnn-cu13",
        "nvidia-cublas",
        "nvidia-cuda-nvcc",
    ),
    *("nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc"),
)
# first and last release of cuDNN that plans for a GPU which is only described
CUDNN = ((9, 23), (9, 26))
STUB = Path(__file__).with_name("libcuda_stub.c")


def version(package: str) -> tuple[int, ...]:
    """The numbers of an installed package's version. Raises PackageNotFoundError."""
    return tuple(map(int, re.findall(r"\d+", metadata.version(package))))


def refuse_absent(target: Target) -> None:
    """Raises UserError where a package that the target's compiler is made of is not there, or of
    another release.
    """
    packages, file = (
        (GPU_PACKAGES, "gpu-compile") if target.platform == "gpu" else (TPU_PACKAGES, "tpu")
    )
    absent = [name for name in packages if not _installed(name)]
    install = f"pip install --no-deps -r requirements-{file}.txt"
    if absent:
        raise UserError(
            f"compiling for {target.platform} needs {', '.join(absent)}, not installed; {install}"
        )
    if target.platform == "tpu":
        return
    if version("jax-cuda13-plugin") != version("jax"):
        raise UserError(
            f"jax-cuda13-plugin {metadata.version('jax-cuda13-plugin')} does not go with jax "
            f"{metadata.version('jax')}; {install}"
        )
    first, last = CUDNN
    if not first <= version("nvidia-cudnn-cu13")[:2] <= last:
        raise UserError(
            f"nvidia-cudnn-cu13 {metadata.version('nvidia-cudnn-cu13')} cannot plan for a GPU that "
            "is not there, "
            f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))} can; {install}"
        )


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def build_driver(cache: Path) -> Path:
    """Compiles the driver without a device, once; the folder that has it.

    Raises:
      UserError: there is no C compiler, or it fails.
    """
    folder = cache / f"driver-{hashlib.sha256(STUB.read_bytes()).hexdigest()[:12]}"
    library = folder / "libcuda.so.1"
    if library.exists():
        return folder
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise UserError(
            "compiling for an absent GPU needs a C compiler, cc or gcc; install one (Debian: gcc)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    draft = library.with_suffix(f".{os.getpid()}")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(draft),
        str(STUB),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{' '.join(command)} failed: {last_line(done.stderr)}; install a C compiler that works"
        )
    draft.replace(library)
    return folder


def last_line(text: str) -> str:
    """Where a log ends, or the reason that it says it ended for, where a compiler aborted."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    return (fatal or lines or ["it said nothing"])[-1][:500]


def surroundings(target: Target, cache: Path, around: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles for the target; `around` is that of this one, and
    is kept.

    Raises:
      UserError: something is absent that this needs.
    """
    if target.platform == "here":
        return dict(around)
    refuse_absent(target)
    # No device is touched, whatever this machine has: it must be set before jax is imported.
    settings = {**around, "JAX_PLATFORMS": "cpu"}
    if target.platform == "tpu":
        return settings | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": TPUS[target.chip].accelerator,
            # others of this machine may be at it too; no chip is involved
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    # Triton's products are chosen by timing them; without the device they get tiles that nobody
    # measured. cuBLASLt's are those that a run mostly has, and compile in a half to a third of the
    # time.
    options = ["--xla_gpu_enable_triton_gemm=false"]
    # Without it cuDNN's calls are compiled unplanned; before jax 0.12 it ends the process.
    if version("jax") >= (0, 12):
        options.append(
            "--xla_gpu_cudnn_deviceless_compilation_mode=CUDNN_DEVICELESS_COMPILATION_ALWAYS"
        )
    libraries = [str(build_driver(cache)), *filter(None, [around.get("LD_LIBRARY_PATH")])]
    return settings | {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "XLA_FLAGS": " ".join([around.get("XLA_FLAGS", ""), *options]).strip(),
    }
