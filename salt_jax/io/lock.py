"""One run at a time writes to a workdir: WORKDIR/lock.json, written anew every few seconds.

It needs nothing but files that can be made exclusively, so it works on a bucket and on file systems
without flock. Who finds it watches whether it changes: clocks of machines are not compared, and a
lock that a crash left behind lapses. A process of this machine that is gone is known at once.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, in_bucket, write_whole
from salt_jax.keys import Json

log = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two writes
LAPSE = 30.0  # seconds without one, after which a lock is nobody's


class Lock:
    """A lock that is held. `lost`: another run has taken it, because this one stood still."""

    def __init__(self, path: AnyPath, owner: str):
        self._path, self._owner = path, owner
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def refuse_lost(self) -> None:
        """Raises UserError if another run has taken the workdir."""
        if self.lost:
            raise UserError(
                f"another run has taken {self._path.parent} while this one stood still; nothing "
                "more is written here. Stop one of them"
            )

    def release(self) -> None:
        """Idempotent; also for a thread that ends the process."""
        self._stop.set()
        if not self.lost and _read(self._path).get("owner") == self._owner:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(BEAT):
            count += 1
            try:
                found = _read(self._path)  # {}: it could not be read this time
                if found and found.get("owner") != self._owner:
                    self._lost.set()
                    return
                write_whole(self._path, json.dumps(_entry(self._owner, count)))
            except Exception as error:  # a full disk, or whatever a bucket out of reach raises
                log.warning("%s could not be written (%s): others see no beat", self._path, error)


@contextmanager
def locked(workdir: str | AnyPath) -> Iterator[Lock]:
    """Takes the lock of a workdir, which has to be there, and gives it back.

    Raises:
      UserError: another run has it.
    """
    path, owner = as_path(workdir) / "lock.json", uuid.uuid4().hex
    _take(path, owner)
    lock = Lock(path, owner)
    try:
        yield lock
    finally:
        lock.release()


def _take(path: AnyPath, owner: str) -> None:
    entry = json.dumps(_entry(owner, 0))
    while not _create(path, entry):
        _wait_for_its_owner(path)
        path.unlink(missing_ok=True)
    # Two that found the same old lock may both have removed it, the second one ours.
    time.sleep(0.2)
    if (there := _read(path)).get("owner") != owner:
        raise _in_use(path, there)


def _wait_for_its_owner(path: AnyPath) -> None:
    """Returns when the lock may be removed. Raises UserError where its owner is at work."""
    found = _read(path)
    if found.get("host") == _host() and _is_running(found):
        raise _in_use(path, found)
    if found.get("host") == _host() and found:
        return
    print(
        f"{path} was left by another run or belongs to one ({_owner(found)}): waiting up to "
        f"{LAPSE:.0f} s to see whether it is at work",
        flush=True,
    )
    end = time.monotonic() + LAPSE
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        now = _read(path)
        if not now:
            return
        if now != found:
            raise _in_use(path, now)


def _in_use(path: AnyPath, found: Json) -> UserError:
    return UserError(
        f"the workdir {path.parent} is in use by another run ({_owner(found)}); wait for it, stop "
        "it, or pass another --workdir"
    )


def _owner(found: Json) -> str:
    if not found:
        return "unknown"
    return f"process {found.get('pid')} on {str(found.get('host')).split()[0]}"


def _entry(owner: str, beat: int) -> Json:
    pid = os.getpid()
    return {"owner": owner, "host": _host(), "pid": pid, "born": _born(pid), "beat": beat}


def _host() -> str:
    """The machine, and on Linux the space in which a process number means something."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # Z: it has ended, and its parent has not asked how
    return "" if fields[0] in "ZX" else fields[19]


def _is_running(found: Json) -> bool:
    """Whether the process of this machine that wrote an entry is there still."""
    try:
        pid = int(str(found.get("pid")))
        os.kill(pid, 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return _born(pid) == found.get("born")


def _read(path: AnyPath) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _create(path: AnyPath, entry: str) -> bool:
    """Whether the file was not there, and is now."""
    try:
        if in_bucket(path):
            import fsspec  # comes with what epath needs for buckets

            fsspec.filesystem("gs").pipe_file(str(path), entry.encode(), mode="create")
        else:
            with path.open("x") as file:
                file.write(entry)
    except FileExistsError:
        return False
    return True
