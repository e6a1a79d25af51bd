"""Which earlier frames a chunk of a video sees, as a plain value; `kv_cache` applies it."""

import itertools
from dataclasses import dataclass

from salt_jax.choices import Context, Positions
from salt_jax.keys import key

# latent frames that a position computed by a program may name, as in Wan's own table
MAX_FRAMES = 1024


@dataclass(frozen=True)
class CachePolicy:
    """Sizes in latent frames; docs/guide.md has those of the peers.

    Cyclic positions are those of Salt's release (`loop_rope_training`): frame n stands at n modulo
    the period, so a video of any length has the positions of a training clip. Attention knows the
    difference of two positions alone. That is the distance in time of a frame that is seen while
    the count has not begun again since it; behind that it is the distance less the period, as if
    the frame came after the chunk. Frames a period apart share a position: a window of at most a
    period sees no two of them, the sink aside, which keeps its positions and is met again once in
    each period. A period holds whole chunks, so none is torn where the count begins again.

    The last step as context is Causal-rCM's (`context_from_last_step`): keys and values of a chunk
    are those of the evaluation that made it, of its noisy state at the exit step's level. Frames
    that no step made are read clean: those that are given, and all at a prompt switch.
    """

    chunk: int = key(3, "latent frames generated together")
    first: int = key(
        0, "latent frames of the first chunk; 1 makes it a picture, 0 is as the others"
    )
    window: int = key(
        0, "latent frames a chunk sees at most, itself and the sink included; 0 is everything"
    )
    sink: int = key(0, "first frames of the video, which every chunk sees")
    positions: Positions = key(
        "absolute",
        'or `"relative"`: a frame\'s position is its rank among those that are seen; or '
        '`"cyclic"`: its number modulo `period`',
    )
    period: int = key(
        0, "latent frames after which cyclic positions begin again, such as a clip's; else 0"
    )
    context: Context = key(
        "clean",
        "what later chunks see of one: its clean frames, read once more at noise level 0; or "
        '`"last_step"`: what its last denoising step read, which saves that evaluation',
    )

    def __post_init__(self):
        if not self.first:
            object.__setattr__(self, "first", self.chunk)
        if not (1 <= self.first <= self.chunk):
            raise ValueError(f"first={self.first} must be between 1 and chunk={self.chunk}")
        if self.sink < 0 or (self.window and self.window < self.sink + self.chunk):
            raise ValueError(
                f"window={self.window} must be 0 (everything) or hold sink={self.sink} and "
                f"chunk={self.chunk}"
            )
        if (self.positions == "cyclic") != bool(self.period):
            raise ValueError(
                f"positions={self.positions} with period={self.period}: cyclic positions need a "
                "period, such as 21, and others have period=0"
            )
        fits = self.first == self.chunk and self.period % self.chunk == 0
        if self.period and not (fits and 0 < self.period <= MAX_FRAMES):
            raise ValueError(
                f"period={self.period} must be a multiple of chunk={self.chunk}, up to "
                f"{MAX_FRAMES}, and first={self.first} equal to chunk: no chunk is torn"
            )

    @property
    def clean_pass(self) -> bool:
        """Whether a finished chunk is read once more."""
        return self.context == "clean"

    def sizes(self, frames: int, before: int = 0) -> tuple[int, ...]:
        """How many of the next `frames` each chunk has, in a video that has `before` frames
        already.

        Raises ValueError where they do not split into chunks.
        """
        first = 0 if before else self.first
        if frames < first or (frames - first) % self.chunk:
            raise ValueError(
                f"{frames} latent frames do not split into a chunk of {first or self.chunk} and "
                f"chunks of {self.chunk}"
            )
        return (first,) * (first > 0) + (self.chunk,) * ((frames - first) // self.chunk)

    def starts(self, frames: int) -> tuple[int, ...]:
        """The frames at which the chunks of a video begin. Raises ValueError as `sizes` does."""
        return tuple(itertools.accumulate(self.sizes(frames)[:-1], initial=0))

    def visible(self, start: int, stop: int) -> tuple[slice, ...]:
        """The earlier frames that the chunk [start, stop) sees: all, or the sink and the end of the
        window.
        """
        if not self.window or stop <= self.window:
            return (slice(0, start),) if start else ()
        return tuple(
            s
            for s in (slice(0, self.sink), slice(stop - self.window + self.sink, start))
            if s.start < s.stop
        )

    def nearest(self, frames: int) -> tuple[int, int]:
        """The longest video of at most so many frames that splits into chunks, and the shortest of
        at least so many.
        """
        below = self.first + max(frames - self.first, 0) // self.chunk * self.chunk
        return below, below + self.chunk * (below < frames)

    def capacity(self, frames: int) -> int:
        """Frames that a cache has to hold to continue a video of any length, or of `frames` if all
        are seen.
        """
        return self.window - self.chunk if self.window else frames


def refuse_overflow(policy: CachePolicy, slots: int, frames: int) -> None:
    """Raises ValueError where a video of `frames` does not fit a cache of `slots`, or the table of
    positions.
    """
    if not policy.window and frames > slots:
        raise ValueError(
            f"{frames} latent frames do not fit a cache of {slots} that forgets nothing; "
            "set a window (and a sink), or a larger capacity"
        )
    if policy.positions == "absolute" and frames > MAX_FRAMES:
        raise ValueError(
            f"{frames} latent frames are more than the {MAX_FRAMES} absolute positions; set "
            "positions to relative"
        )
