"""What the released few-step students of others were trained at.

No jax in here, as in `choices`.
"""

from typing import NamedTuple

from salt_jax.models.memory import CachePolicy


class Released(NamedTuple):
    """How a student is to be sampled.

    Their few steps are levels of `flow.schedule.grid` where `levels` is empty.
    """

    num_steps: int
    shift: float
    levels: tuple[float, ...]  # 1000 sigma, falling, without the 0 at the end
    memory: CachePolicy


_ALL = CachePolicy(chunk=3, first=3, window=0, sink=0, positions="absolute")

# Read off configs and code of each: Self-Forcing @33593df, Causal-Forcing @1fc7bbc, LongLive v1.0
# @e52d9ef, CausVid @ca21150. Lists that those "warp" (1000, 750, 500, 250) are the grid of 4
# updates at their shift; CausVid's is not.
RELEASED = {
    "self_forcing": Released(4, 5.0, (), _ALL),
    "causal_forcing": Released(4, 5.0, (), _ALL),
    "causal_forcing_framewise": Released(4, 5.0, (), CachePolicy(1, 1, 0, 0, "absolute")),
    "longlive": Released(4, 5.0, (), CachePolicy(3, 3, 12, 3, "absolute")),
    "causvid": Released(3, 8.0, (1000.0, 757.0, 522.0), _ALL),
}
