"""One program through a compiler: its memory on a device, its collectives and kernels, or why there
is none.
"""

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from salt_jax.compile.buffers import largest
from salt_jax.compile.gpu_description import describe
from salt_jax.compile.hlo import read
from salt_jax.compile.programs import Program
from salt_jax.compile.surroundings import version
from salt_jax.compile.target import GIB, GPU_SHARE, GPUS, Target
from salt_jax.errors import UserError
from salt_jax.keys import Json

SHOWN = 4  # largest buffers of a program


def devices_of(target: Target) -> Sequence:
    """Each a jax.Device, for a mesh: described ones, which run nothing, or those that are here.

    Raises:
      UserError: there is no such machine.
    """
    if target.platform == "here":
        return jax.devices()
    grid = "x".join(map(str, target.grid))
    if target.platform == "gpu":
        gpu = GPUS[target.chip]
        config = describe(gpu, version("nvidia-cudnn-cu13"), version("jax"))
        more = {"target_config": config, "topology": f"1x{grid}"}
        return topologies.get_topology_desc(target.chip, platform="cuda", **more).devices
    try:
        return topologies.get_topology_desc(f"{target.chip}:{grid}", platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--target=tpu:{target.chip}:{grid} cannot be built: {one_line(error)}"
        ) from error


def compile_program(program: Program, platform: str, memory: int | None, dump: Path) -> Json:
    """Everything that is found of a program. `problem` is a sentence's end, or None.

    Args:
      platform: of the devices: "cpu", "gpu" or "tpu".
      memory: bytes of a device.
      dump: where XLA writes (`buffers.dump_flags`).
    """
    start = time.perf_counter()
    row: Json = {"problem": None, "memory_bytes": memory}
    try:
        lowered = program.jitted.lower(*program.args)
        row["trace_seconds"], start = time.perf_counter() - start, time.perf_counter()
        compiled = lowered.compile()
    # whatever it is, the program does not compile, and that is what is asked
    except Exception as error:
        return row | refusal(error, dump)
    row["compile_seconds"] = time.perf_counter() - start
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats and text, "XLA's compilers give both"
    row |= memory_row(stats, platform)
    row["beside_bytes"] = max(0, bytes_given(program) - row["argument_bytes"])
    found = read(text, mesh_of(program))
    row["collectives"] = {kind: moved._asdict() for kind, moved in found.collectives.items()}
    row |= {"kernels": found.kernels, "open_loops": found.open_loops}
    row["largest"] = [buffer._asdict() for buffer in largest(dump, SHOWN)]
    needed = row["peak_bytes"] + row["beside_bytes"]
    row["share"] = memory and needed / memory
    limit = memory and (GPU_SHARE if platform == "gpu" else 1.0) * memory
    if limit and needed > limit:
        row["problem"] = f"does not fit: {gib(needed)} at its peak, {gib(limit)} may be filled"
    return row


def mesh_of(program: Program) -> dict[str, int]:
    """The size of each axis of the mesh that a program's arguments lie on."""
    for leaf in jax.tree.leaves(program.args):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding):
            return dict(place.mesh.shape)
    raise ValueError("no argument of the program lies on a mesh")


def bytes_given(program: Program) -> int:
    """Bytes on one device of everything that the program is called with, read by it or not.

    A compiled program takes what it reads. The rest of the state and of what is frozen waits on the
    device meanwhile.
    """
    leaves = (x for x in jax.tree.leaves(program.args) if getattr(x, "sharding", None))
    numbers = (x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended))
    here = (x for x in numbers if x.sharding.memory_kind in (None, "device"))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)


@runtime_checkable
class MemoryStats(Protocol):
    """What `jax.stages.Compiled.memory_analysis` gives: bytes on one device."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    alias_size_in_bytes: int
    generated_code_size_in_bytes: int
    peak_memory_in_bytes: int


def memory_row(m: MemoryStats, platform: str) -> Json:
    """What XLA plans for one device. Its own peak is what a TPU's compiler refuses by, and the sum
    elsewhere.

    For TPU (libtpu 0.0.42 and 0.0.50) temporaries have the arguments in them, and other memories
    than HBM, so a sum says nothing there.
    """
    parts = {"argument": m.argument_size_in_bytes, "output": m.output_size_in_bytes}
    parts |= {"temporary": m.temp_size_in_bytes, "alias": m.alias_size_in_bytes}
    peak = getattr(m, "total_allocation_bytes", 0) or (
        m.peak_memory_in_bytes if platform == "tpu" else 0
    )
    row: Json = {f"{name}_bytes": size for name, size in parts.items()}
    row["peak_bytes"] = peak or sum(parts.values()) - 2 * parts["alias"]
    row["peak_is"] = "the compiler's own" if peak else "arguments + outputs + temporaries - aliases"
    return row | {"code_bytes": m.generated_code_size_in_bytes}


def refusal(error: Exception, dump: Path) -> Json:
    """Why there is no program: too large for a TPU, or else what the error begins with."""
    message = one_line(error)
    match = re.search(r"\(?([\d.]+)G\)? exceeds available HBM \(([\d.]+)G\)", message)
    match = match or re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message)
    if not match:
        return {"problem": f"does not compile: {type(error).__name__}: {message[:500]}"}
    needed, there = (float(n) * GIB for n in match.groups())
    buffers = [buffer._asdict() for buffer in largest(dump, SHOWN)]
    row = {
        "peak_bytes": round(needed),
        "peak_is": "the compiler's",
        "share": needed / there,
        "largest": buffers,
    }
    return row | {"problem": f"does not fit: {gib(needed)} at its peak, {gib(there)} may be filled"}


def one_line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def gib(size: int | float) -> str:
    return f"{size / GIB:.2f} GiB"
