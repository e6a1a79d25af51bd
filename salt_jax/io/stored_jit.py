"""Compiled programs on disk, which a later process neither traces nor compiles again: for a CPU,
where a small model's second start is little else.

JAX's own compilation cache is asked with the program that was traced and lowered. Here one asks
with what decides that program: the source code, versions, processor, settings, static arguments,
and the forms of the others.
"""

import hashlib
import logging
import os
import pickle
import platform
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from salt_jax.io.cache import cache_home
from salt_jax.io.files import write_whole
from salt_jax.types import Leaf

log = logging.getLogger(__name__)
MOST = 64  # files; the oldest go
Program = Callable[..., Any]


class StoredJit:
    """`jax.jit`, whose programs are stored where `folder` is set: those of the first device. All
    arguments by position.

    A file is a pickle with machine code: whoever can write to the folder can run code here, as with
    JAX's cache.
    """

    folder: ClassVar[Path | None] = None  # of the process, as JAX's cache is
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, function: Program, static: tuple[int, ...] = (), donated: int | None = None):
        self.jitted = jax.jit(function, static_argnums=static, donate_argnums=donated)
        self.name, self.static = function.__name__, static
        self._found: dict[Hashable, Program] = {}

    def __call__(self, *args):
        if self.folder is None:
            return self.jitted(*args)
        fixed = tuple(args[i] for i in self.static)
        rest = [arg for i, arg in enumerate(args) if i not in self.static]
        leaves, tree = jax.tree.flatten(rest)
        call = fixed, tree, tuple(map(_form, leaves))
        if call not in self._found:
            with self.lock:
                if call not in self._found:  # another thread may have made it meanwhile
                    self._found[call] = self._load(self.folder, call, args)
        return self._found[call](*rest)

    def _load(self, folder: Path, call: Hashable, args: tuple[object, ...]) -> Program:
        key = hashlib.sha256(f"{_circumstances()} {self.name} {call}".encode()).hexdigest()
        file = folder / f"{self.name}-{key}"
        try:
            stored = pickle.loads(file.read_bytes())
            return deserialize_and_load(*stored, execution_devices=jax.devices()[:1])
        except FileNotFoundError:
            pass
        except Exception as error:  # there is no telling what a damaged file does
            log.warning("%s is made again: %s", file, error)
        with _without_jax_cache():
            program = self.jitted.lower(*args).compile()
        try:
            write_whole(file, pickle.dumps(serialize(program)))
            for old in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not stored: %s", file, error)
        return program


def _form(x: Leaf) -> Hashable:
    return x.shape, x.dtype, getattr(x, "weak_type", False), getattr(x, "sharding", None)


def store_programs() -> None:
    """From here on, if this process computes on one CPU: compiling for others takes so long that
    what comes before does not count.
    """
    if jax.default_backend() == "cpu" and len(jax.devices()) == 1:
        StoredJit.folder = cache_home() / "programs"


@contextmanager
def _without_jax_cache() -> Iterator[None]:
    """What a CPU has from JAX's cache loses its functions when it is stored (jax 0.10.2)."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@cache
def _circumstances() -> str:
    """All that decides a program but its arguments."""
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(file.read_bytes())
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    flags = os.environ.get("XLA_FLAGS")
    settings = sorted(jax.config.values.items())
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
    machine = platform.machine(), sorted(processor)
    return f"{sources.hexdigest()} {sys.version} {versions} {machine} {flags} {settings}"
