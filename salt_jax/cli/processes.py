"""Several processes as one run, through jax.distributed, by what the scheduler says or by flags.

No jax in here until there are several: help and refusals come at once.
"""

import glob
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn, TypeVar

from absl import flags

from salt_jax.errors import Stopped, UserError

COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT on the machine of process 0, where no scheduler says it; see docs/pods.md",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the run; with --coordinator")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "of this process, from 0; with --coordinator")

T = TypeVar("T")

JOIN = 300  # seconds for all processes to arrive
HEARTBEAT = 40  # seconds of silence after which JAX takes a process for dead, and ends the others

# Ends with its parent, and says what that could not: JAX ends a process whose peers do not come, or
# are gone, from C++, with a stack trace.
WATCH = """
import sys
said = sys.stdin.read()
if not said:
    sys.exit("error: not all processes of this run came within JOIN s, or this one was ended "
             "before; all of them have to be started, and reach the port of process 0")
if said.endswith("joined"):
    sys.exit("error: this process of the run was ended, or JAX ended it because another one is "
             "gone (the messages above, and those of the others, say which); start all of them "
             "again with the same command: the run goes on from its last checkpoint")
"""


def _watch() -> subprocess.Popen:
    """It is told that the others are found, that they are several, and of a good end."""
    command = [sys.executable, "-S", "-E", "-c", WATCH.replace("JOIN", str(JOIN))]
    # in a session of its own: signals of the terminal are not for it
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)


class Cluster(NamedTuple):
    """What is known of a run of several processes; JAX asks the scheduler for the rest."""

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    devices: list[int] | None = None  # of the machine, which this process takes


@contextmanager
def joined(read: Callable[[], T]) -> Iterator[T]:
    """Joins the other processes of the run, if there are any, and at the end waits for them.

    Args:
      read: of the command line; what it returns is given to the block. What one process refuses,
        all refuse.

    Raises:
      UserError: that of `read`, the flags contradict each other, or the others cannot be reached.
    """
    found = _cluster(os.environ)
    if found is None:
        yield read()
        return
    import jax

    from salt_jax import hosts

    watch, quiet = _watch().stdin, False
    assert watch
    try:
        _find_others(found)
        watch.write("found")
        watch.write(" and joined" * (jax.process_count() > 1))
        watch.flush()
        with hosts.agreed("the command line"):
            value = read()
        yield value
        jax.distributed.shutdown()
        quiet = True
    except (UserError, Stopped):  # which say themselves what happened
        quiet = True
        raise
    finally:
        if quiet:
            watch.write("done")
            watch.close()


def _find_others(cluster: Cluster) -> None:
    import jax

    try:
        jax.distributed.initialize(
            *(cluster.coordinator, cluster.count, cluster.index),
            local_device_ids=cluster.devices,
            cluster_detection_method="deactivate" if cluster.coordinator else None,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:  # of the client: JaxRuntimeError
        raise UserError(
            f"the processes of this run did not find each other within {JOIN} s "
            f"({str(error).splitlines()[0]}); all of them have to be started, and reach the port "
            "of process 0"
        ) from error


def refuse_in_all(argv: list[str], error: UserError) -> None:
    """Ends the other processes of the run, if there are any and they come, with this one's error of
    reading its flags.
    """
    names = flags.FlagValues()  # the flags by which one finds the others, of a line with mistakes
    for holder in (COORDINATOR, NUM_PROCESSES, PROCESS_ID):
        names[holder.name] = flags.FLAGS[holder.name]
    names.set_gnu_getopt()

    def read() -> NoReturn:
        raise error

    try:
        names(argv, known_only=True)
        flags.FLAGS.mark_as_parsed()
        if _cluster(os.environ) is not None:
            print("telling the other processes of the run", file=sys.stderr, flush=True)
        with joined(read):
            pass
    except (flags.Error, UserError, RuntimeError):
        return  # what is wrong here is told; the others cannot be reached, or know it now


def tells() -> bool:
    """Whether this process prints what all know; without jax where it is the only one."""
    if _cluster(os.environ) is None:
        return True
    from salt_jax import hosts

    return hosts.is_first()


def _cluster(env: Mapping[str, str]) -> Cluster | None:
    """None: this process is the only one."""
    given = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if given == (None, None, None):
        return Cluster(devices=_devices(env)) if _is_one_of_several(env) else None
    coordinator, count, index = given
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --num_processes and --process_id belong together; give all")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator} has to be HOST:PORT")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} has to be below --num_processes={count}, and 0 or more"
        )
    return Cluster(coordinator, count, index) if count > 1 else None


def _devices(env: Mapping[str, str]) -> list[int] | None:
    """In a step of SLURM JAX takes one GPU for each task; a task that has a node to itself takes
    all that are there. None: as JAX does.
    """
    alone = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    count = int(env.get("SLURM_GPUS_ON_NODE", "0") or 0)
    if not alone or count < 2 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    return list(range(count))


def _is_one_of_several(env: Mapping[str, str]) -> bool:
    """Whether JAX will find the others by itself: in a step of SLURM, under Open MPI, on the hosts
    of a TPU slice.
    """
    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    if slurm <= env.keys() and int(env.get("SLURM_NTASKS", "1")) > 1:
        return True
    if "OMPI_MCA_orte_hnp_uri" in env and int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    asked = env.get("JAX_PLATFORMS", "tpu").split(",")
    return bool(chips and "tpu" in asked and importlib.util.find_spec("libtpu"))
