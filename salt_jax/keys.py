"""One key of a config: default, meaning, what its value must be, and whether it may change.

No jax in here, as in `choices`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Resume = Literal["same", "free", "file"]
"""What a run that goes on may do with a key: nothing, change its value, or name the same file by
another path.
"""


class Must(NamedTuple):
    """What a value has to be."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Must("at least 1", lambda x: x >= 1)
POSITIVE = Must("above 0", lambda x: x > 0)
NOT_NEGATIVE = Must("at least 0", lambda x: x >= 0)
DECAY = Must("at least 0 and below 1", lambda x: 0 <= x < 1)
SHARE = Must("from 0 to 1", lambda x: 0 <= x <= 1)
LEVEL = Must("above 0 and up to 1, a noise level", lambda x: 0 < x <= 1)
SEED = Must(f"from 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32)
STEPS = Must("one or more numbers of steps, each at least 1", lambda x: bool(x) and min(x) >= 1)
NUMBERS = Must("at least one number", bool)
FEW_LEVELS = Must(
    "at least 1 and at most 128, since triples are tabulated", lambda x: 1 <= x <= 128
)


def key(
    default: Any,
    doc: str,
    must: Must | None = None,
    resume: Resume = "same",
    path: bool = False,
) -> Any:
    """A field of a frozen dataclass of the config.

    Args:
      default: its value where a config says nothing; that of a key which old configs lack says
        what their runs did.
      doc: what it is, with its unit and its source; one line of docs/guide.md.
      must: what its value has to be, beside its type.
      resume: whether it may change when a run resumes.
      path: whether it names a file or folder.
    """
    metadata = {"doc": doc, "must": must, "resume": resume, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def is_finite(value: Any) -> bool:
    """Whether a number, or each of several, is finite; anything else is."""
    several = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(x) for x in several if isinstance(x, float))
