"""What the processes of a run have to agree on. With one process all of it is a plain call."""

import itertools
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from salt_jax.errors import UserError
from salt_jax.keys import Json

T = TypeVar("T")

WAIT = 1800.0  # seconds until a process gives up on the first one
# A barrier's name may be used once; every process counts the same calls.
_calls = itertools.count()


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


def only_first(make: Callable[[], T], what: str, limit: float = WAIT) -> T:
    """`make()` in process 0, and what it returns, JSON values, in every process; the others wait.

    Args:
      what: is being done, for the message.
      limit: seconds.

    Raises:
      UserError: that of process 0, in every process; or the others have waited for `limit`.
    """
    if jax.process_count() == 1:
        return make()
    answer: Json = {}
    if is_first():
        try:
            answer = {"value": make()}
        except UserError as error:
            answer = {"error": str(error)}
    try:
        barrier = multihost.get_barrier_sync_fn()
        barrier(key=f"salt_jax {next(_calls)}", timeout_ms=int(1000 * limit))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {jax.process_index()} waited {limit:.0f} s for process 0 ({what}); see the "
            "output of process 0, and start all processes again"
        ) from error
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    (length,) = multihost_utils.broadcast_one_to_all(np.array([text.size], np.int32))
    room = np.zeros(int(length), np.uint8)
    told = multihost_utils.broadcast_one_to_all(text if is_first() else room)
    answer = json.loads(bytes(np.asarray(told)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def first_then_others(make: Callable[[], T], what: str, limit: float = WAIT) -> T:
    """`make()` in process 0, and then in the others: what is made once is found by them, also where
    each machine has a disk of its own.

    Raises:
      UserError: as `only_first`.
    """
    made: list[T] = []
    only_first(lambda: made.append(make()), what, limit)
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
