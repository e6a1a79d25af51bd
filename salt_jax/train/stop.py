"""SIGTERM and SIGINT: the iteration that is under way is finished and saved, then the run ends.

Nothing is lost before the first iteration is done, so there the run ends at once, also in the
middle of compiling, which Python's own handlers wait for. A second signal ends it at once anywhere.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from salt_jax.errors import STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3.0  # seconds for a run that has nothing to lose to end by itself


class Stop:
    """Whether a run was asked to stop, and what it says of itself meanwhile."""

    def __init__(self) -> None:
        self.asked = False
        self.unsaved = False  # set once an iteration is done
        # called where the process is ended without unwinding
        self.at_exit: Callable[[], object] = lambda: None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Of Python: runs in the main thread, between two steps of the interpreter."""
        del frame
        first, self.asked = not self.asked, True
        if first and not self.unsaved:
            raise Stopped(f"stopped by {signal.Signals(number).name} before the first iteration")

    def watch(self, wake: socket.socket) -> None:
        """In a thread of its own, which also runs while the main one is compiling."""
        count = 0
        while received := wake.recv(1):
            if received[0] not in SIGNALS:
                continue
            count += 1
            name = signal.Signals(received[0]).name
            if count > 1:
                self._end(f"stopped by a second signal ({name}); the last checkpoint stands")
            elif self.unsaved:
                tell(f"{name}: this iteration is finished and saved first; once more stops at once")
            else:
                timer = threading.Timer(
                    PATIENCE, self._end, [f"stopped by {name} before the first iteration"]
                )
                timer.daemon = True
                timer.start()

    def _end(self, message: str) -> None:
        try:
            tell(message)
            self.at_exit()
        finally:
            os._exit(STOPPED)


def tell(message: str) -> None:
    """At once, and beside a progress bar on a line of its own."""
    os.write(sys.stderr.fileno(), f"\n{message}\n".encode())


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Handles the signals while it is open; outside the main thread, where Python does not allow
    that, nothing is handled.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    thread = threading.Thread(target=stop.watch, args=(read,), name="signals", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            # None: it was set outside Python, by jax.distributed
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before)
        write.close()
        thread.join()
        read.close()
