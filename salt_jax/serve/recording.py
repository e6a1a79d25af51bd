"""The videos of a server on disk, growing MP4 files that can be downloaded at any time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import BoundedSemaphore

import numpy as np

from salt_jax.io.video import written_mp4

BEHIND = 64  # chunks that may wait for the disk before the generator does


class Recorder:
    """Writes videos in a thread of its own; nothing is left out."""

    def __init__(self, folder: Path, fps: int, scale: int):
        self.folder, self.fps, self.scale = folder, fps, scale
        self._open: dict[str, tuple[ExitStack, Callable[[np.ndarray], None]]] = {}
        self._thread = ThreadPoolExecutor(1, "recorder")
        self._room = BoundedSemaphore(BEHIND)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.mp4"

    def write(self, name: str, pixels: np.ndarray) -> None:
        """The next frames of a video, uint8 [t, H, W, 3]."""
        self._room.acquire()
        self._thread.submit(self._write, name, pixels)

    def close(self, name: str) -> None:
        """The video is complete."""
        self._thread.submit(self._close, name)

    def remove(self, name: str) -> None:
        self.close(name)
        self._thread.submit(self.file(name).unlink, missing_ok=True)

    def stop(self) -> None:
        """Completes all."""
        for name in list(self._open):
            self.close(name)
        self._thread.shutdown()

    def _write(self, name: str, pixels: np.ndarray) -> None:
        try:
            if name not in self._open:
                stack = ExitStack()
                file = written_mp4(self.file(name), self.fps, self.scale, growing=True)
                self._open[name] = stack, stack.enter_context(file)
            self._open[name][1](pixels)
        finally:
            self._room.release()

    def _close(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name)[0].close()


def whole_fragments(data: bytes) -> bytes:
    """The part of a growing MP4 file that is complete: up to its last whole fragment."""
    at = end = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if size < 8 or at + size > len(data):
            break
        at += size
        if kind in (b"moov", b"mdat", b"mfra"):
            end = at
    return data[:end]
