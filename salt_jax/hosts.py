"""What the processes of a run have to agree on. With one process all of it is a plain call."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from salt_jax.errors import Stopped, UserError
from salt_jax.keys import Json

T = TypeVar("T")

WAIT = 1800.0  # seconds until a process gives up on the others
LONG = 86400.0  # of work that takes as long as it takes; a process that is gone is known at once
# A barrier's name may be used once; every process counts the same calls.
_calls = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


class Elsewhere(UserError):
    """Another process has failed, by what is not the user's to mend."""


KINDS = (Elsewhere, Stopped, UserError)  # of what all raise; where processes differ the last counts


@contextmanager
def agreed(what: str, limit: float = WAIT) -> Iterator[None]:
    """A block that every process runs, and that all leave together or fail in together.

    Args:
      what: is being done, for the message.
      limit: seconds that one waits for the others.

    Raises:
      UserError: that of this process, or else of the first one that has one; or this process has
        waited for `limit`.
      Stopped: one was asked to.
      Elsewhere: neither, and another process has failed.
    """
    if jax.process_count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    try:
        from orbax.checkpoint import multihost  # here, because one process alone starts without it

        barrier = multihost.get_barrier_sync_fn()
        barrier(key=f"salt_jax {next(_calls)}", timeout_ms=int(1000 * limit))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {jax.process_index()} waited {limit:.0f} s for the others ({what}); see "
            "their output, and start all processes again"
        ) from mine or error
    kind = (
        0 if mine is None else 3 if isinstance(mine, UserError) else 1 + isinstance(mine, Stopped)
    )
    every = np.asarray(multihost_utils.process_allgather(np.array([kind], np.int32))).ravel()
    if not every.any():
        return
    source = int(every.argmax())
    told = _tell(_told(mine), source)
    raise mine or KINDS[every[source] - 1](told)


def _told(error: Exception | None) -> str:
    if isinstance(error, UserError | Stopped):
        return str(error)
    reason = str(error).partition("\n")[0]
    return (
        f"process {jax.process_index()} has failed ({type(error).__name__}: {reason}); see its "
        "output"
    )


def _tell(value: Json | str | list, source: int = 0) -> Any:
    """A value of JSON that process `source` has, in every process."""
    mine = jax.process_index() == source
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    (length,) = multihost_utils.broadcast_one_to_all(np.array([text.size], np.int32), mine)
    room = np.zeros(int(length), np.uint8)
    told = multihost_utils.broadcast_one_to_all(text if mine else room, mine)
    return json.loads(bytes(np.asarray(told)))


def only_first(make: Callable[[], T], what: str, limit: float = WAIT) -> T:
    """`make()` in process 0, and what it returns, JSON values, in every process; the others wait.

    Args:
      what: is being done, for the message.
      limit: seconds.

    Raises:
      UserError, Elsewhere: as `agreed`.
    """
    if jax.process_count() == 1:
        return make()
    made: list[T] = []
    with agreed(what, limit):
        if is_first():
            made.append(make())
    return _tell(made)[0]


def share(work: Sequence[T]) -> Sequence[T]:
    """What of some work this process does: every so-manieth, from its own number on."""
    return work[jax.process_index() :: jax.process_count()]


def first_then_others(make: Callable[[], T], what: str, limit: float = WAIT) -> T:
    """`make()` in process 0, and then in the others: what is made once is found by them, also where
    each machine has a disk of its own.

    Raises:
      UserError: as `only_first`.
    """
    made: list[T] = []
    only_first(lambda: made.append(make()), what, limit)
    with agreed(what, limit):
        return made[0] if made else make()


def fetch(x: jax.Array) -> np.ndarray:
    """An array in the memory of every process, wherever its parts lie. All have to call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class Votes:
    """What one of the processes asks for, known to all of them in the same iteration.

    With several processes it is known one iteration late: to wait for this one's answer would hold
    up the devices.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(lambda x: x.any(0), out_shardings=NamedSharding(mesh, P()))
        self._asked: jax.Array | None = None

    def __call__(self, *mine: bool) -> list[bool]:
        """For each question whether any process says yes."""
        if jax.process_count() == 1:
            return list(mine)
        shape = (self._sharding.num_devices, len(mine))
        rows = np.broadcast_to(np.array(mine), shape)
        before = self._asked
        self._asked = self._any(
            jax.make_array_from_callback(shape, self._sharding, lambda index: rows[index])
        )
        return [False] * len(mine) if before is None else np.asarray(before).tolist()
