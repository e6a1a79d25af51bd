"""The machine that programs are compiled for, by name.

No jax in here: a wrong name is refused at once.
"""

import math
import re
from typing import NamedTuple

from salt_jax.errors import UserError

GIB = 2**30
# Of a GPU's memory a program may fill: no compiler refuses there, and others need some of it too.
GPU_SHARE = 0.9


class Tpu(NamedTuple):
    """A TPU chip."""

    axes: int  # of its torus
    # bytes that a program may use: what the compiler of libtpu 0.0.50.1 calls "available HBM"
    memory: int
    accelerator: str  # a machine of such chips, in the words of TPU_ACCELERATOR_TYPE
    flops: float  # a second at best, in bfloat16: Google's data sheets
    # Bytes a second that it sends along one axis of the torus, both ways: half of the
    # "bidirectional inter-chip interconnect bandwidth per chip" of docs.cloud.google.com/tpu/docs,
    # by the axes
    link: float
    network: float  # the same to another slice: 50 Gbit/s, which are published for v5p alone


class Gpu(NamedTuple):
    """A GPU."""

    name: str  # as its driver says it
    memory: int  # bytes: 81,008 and 143,771 MiB in nvidia-smi
    bandwidth: int  # of its memory, bytes a second: NVIDIA's data sheets
    flops: float  # a second at best, in bfloat16 and without sparsity: the same
    # Bytes a second that it sends to others of its host, half of NVLink's 900 GB/s: the same
    link: float
    network: float  # the same to other hosts, 400 Gbit/s for each GPU: DGX H100's data sheet


TPUS = {
    "v5e": Tpu(2, round(15.75 * GIB), "v5litepod-8", 197e12, 100e9, 0.0),
    "v5p": Tpu(3, round(95.73 * GIB), "v5p-8", 459e12, 200e9, 6.25e9),
    "v6e": Tpu(2, round(31.24 * GIB), "v6e-8", 918e12, 200e9, 0.0),
}
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, 989e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 150_754_820_096, 4_800_000_000_000, 989e12, 450e9, 50e9),
}
FORM = (
    f"it must be here, tpu:CHIP:AxB of {', '.join(c for c in TPUS if TPUS[c].axes == 2)}, "
    "tpu:CHIP:AxBxC of "
    f"{', '.join(c for c in TPUS if TPUS[c].axes == 3)}, or gpu:CHIP:DEVICES or "
    "gpu:CHIP:HOSTSxDEVICES of "
    f"{', '.join(GPUS)}"
)


class Target(NamedTuple):
    """Devices that are described, or those of this machine."""

    platform: str  # "tpu", "gpu" or "here"
    chip: str  # a key of TPUS or GPUS; "" here
    grid: tuple[int, ...]  # chips along each axis of a TPU, hosts and devices of each; () here

    @property
    def devices(self) -> int:
        """How many are described; 1 here, where they are not counted yet."""
        return math.prod(self.grid)

    @property
    def near(self) -> int:
        """How many are on one host of GPUs, or in one slice of TPUs."""
        return self.grid[-1] if self.platform == "gpu" else self.devices

    @property
    def memory(self) -> int | None:
        """Bytes of one device; None here, where it is asked."""
        return self.described and self.described.memory

    @property
    def described(self) -> Tpu | Gpu | None:
        """One device; None here."""
        return {"tpu": TPUS, "gpu": GPUS, "here": {"": None}}[self.platform][self.chip]


def read_target(name: str) -> Target:
    """ "tpu:v5p:2x2x4", "gpu:h100:8", "gpu:h200:2x8" or "here" -> the target.

    Raises:
      UserError: it is none of these.
    """
    if name == "here":
        return Target("here", "", ())
    platform, chip, grid = [*name.split(":"), "", ""][:3]
    if name.count(":") != 2 or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
        raise UserError(f"--target={name} is no machine; {FORM}")
    sizes = tuple(map(int, grid.split("x")))
    if platform == "tpu" and chip in TPUS and len(sizes) == TPUS[chip].axes:
        return Target(platform, chip, sizes)
    if platform == "gpu" and chip in GPUS and len(sizes) <= 2:
        return Target(platform, chip, (1, *sizes)[-2:])
    raise UserError(f"--target={name} is no machine; {FORM}")
