"""One key of a config: default, meaning, what its value must be, and whether it may change.

No jax in here, as in `choices`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

Json = dict[str, Any]
"""A JSON object: by name strings, numbers, booleans, None, and lists and objects of these."""

Config = Any
"""A ConfigDict of ml_collections, which files in `configs/` edit. A type checker takes each of its
attributes for a section and a value at once, so it gets no type.
"""

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

Resume = Literal["same", "free", "file"]
"""What a run that goes on may do with a key: nothing, change its value, or name the same file by
another path.
"""


@dataclasses.dataclass(frozen=True)
class Must(Generic[T_contra]):
    """What a value has to be."""

    words: str
    holds: Callable[[T_contra], bool]


COUNT: Must[int] = Must("at least 1", lambda x: x >= 1)
POSITIVE: Must[float] = Must("above 0", lambda x: x > 0)
NOT_NEGATIVE: Must[float] = Must("at least 0", lambda x: x >= 0)
DECAY: Must[float] = Must("at least 0 and below 1", lambda x: 0 <= x < 1)
SHARE: Must[float] = Must("from 0 to 1", lambda x: 0 <= x <= 1)
LEVEL: Must[float] = Must("above 0 and up to 1, a noise level", lambda x: 0 < x <= 1)
SEED: Must[int] = Must(f"from 0 to {2**32 - 1}", lambda x: 0 <= x < 2**32)
STEPS: Must[tuple[int, ...]] = Must(
    "one or more numbers of steps, each at least 1", lambda x: bool(x) and min(x) >= 1
)
NUMBERS: Must[tuple[float, ...]] = Must("at least one number", bool)
FEW_LEVELS: Must[int] = Must(
    "at least 1 and at most 128, since triples are tabulated", lambda x: 1 <= x <= 128
)


def key(
    default: T,
    doc: str,
    must: Must[T] | None = None,
    resume: Resume = "same",
    path: bool = False,
) -> T:
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


def is_finite(value: object) -> bool:
    """Whether a number, or each of several, is finite; anything else is."""
    several = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(x) for x in several if isinstance(x, float))
