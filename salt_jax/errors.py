"""What may go wrong that is the user's to mend."""

from collections.abc import Iterable

STOPPED = 75  # exit code of a run that a signal has stopped: start it again (EX_TEMPFAIL)


class UserError(Exception):
    """One sentence that names the file, key or value and the remedy; launch/ prints it and exits
    with code 2.
    """


class Stopped(Exception):
    """A signal has stopped the run, whose last checkpoint is whole; launch/ exits with code
    `STOPPED`.
    """


def listed(names: Iterable[str]) -> str:
    """Names for a message: at most ten, sorted, and how many more there are."""
    first = sorted(names)
    more = f" and {len(first) - 10} more" if len(first) > 10 else ""
    return ", ".join(first[:10]) + more
