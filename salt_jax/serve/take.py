"""A video that somebody watches, as a value: where it stands, what made it, and its earlier states,
from which it can be forked.
"""

from typing import NamedTuple

import jax

from salt_jax.keys import Json
from salt_jax.models.cache_policy import CachePolicy
from salt_jax.pipeline.live import Live, Made, fork
from salt_jax.pipeline.model import Model
from salt_jax.serve.messages import Side

APART = 4  # chunks at least: to make them again is little, a copy of each state is much


class Take(NamedTuple):
    """A video under way."""

    name: str  # of its files; nobody else knows it
    side: Side
    live: Live
    script: dict[int, str]  # its prompts, by latent frame
    states: dict[int, Live]  # by latent frame: copies, not all of them are kept
    origin: tuple[str, int] | None = None  # the video that it was forked from, and where


def begin(model: Model, name: str, side: Side, memory: CachePolicy, prompt: str) -> Take:
    live = model.begin(prompt, memory=memory, num_steps=side.steps, seed=side.seed)
    return Take(name, side, live, {0: prompt}, {})


def go_on(model: Model, take: Take, prompt: str, kept: int) -> tuple[Made, Take]:
    """The next chunk, not waited for, and the video with it; `take` is given up.

    Args:
      kept: bytes that earlier states may have.
    """
    live, script = take.live, take.script
    if prompt != live.prompt:
        script = script | {live.frames: prompt}
    states = remembered(take.states, live, kept)
    made, live = model.advance(live, prompt)
    return made, take._replace(live=live, script=script, states=states)


def remembered(states: dict[int, Live], live: Live, kept: int) -> dict[int, Live]:
    """With a copy of this state, where it is as far from the last one as that is from the one
    before, and some chunks at least; of too many, every second one but the first goes.
    """
    *_, before, last = [0, 0, *sorted(states)]
    policy = live.sampler.memory
    assert policy
    if states and live.frames - last < max(last - before, APART * policy.chunk):
        return states
    states = states | {live.frames: fork(live)}
    while len(states) > 2 and len(states) * nbytes(live) > kept:
        states = {frame: states[frame] for frame in sorted(states)[::2]}
    return states


def nbytes(live: Live) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves((live.session.cache, live.decoder)))


def fork_at(model: Model, take: Take, name: str, frame: int) -> Take:
    """A copy that stands at the chunk with this latent frame, bit for bit as it stood there: from
    the state before it that is kept, made again as far as is needed.

    Raises ValueError where the video has not come so far.
    """
    policy = take.live.sampler.memory
    assert policy
    if not take.states or frame >= take.live.frames:
        raise ValueError("the video has not come so far")
    at = max(
        start for start in policy.starts(policy.nearest(frame + policy.chunk)[0]) if start <= frame
    )
    live = fork(take.states[max(start for start in take.states if start <= at)])
    while live.frames < at:
        _, live = model.advance(live, prompt_at(take.script, live.frames))
    script = {start: prompt for start, prompt in take.script.items() if start <= at}
    states = {start: fork(state) for start, state in take.states.items() if start < at}
    return Take(name, take.side, live, script, states, (take.name, at))


def prompt_at(script: dict[int, str], frame: int) -> str:
    return script[max(start for start in script if start <= frame)]


def record(model: Model, take: Take) -> Json:
    """What made the video: whoever has the same network can make it again."""
    sampler = take.live.sampler
    memory = sampler.memory
    return {
        "model": model.parts.source,
        "prompts": {str(frame): prompt for frame, prompt in take.script.items()},
        "seed": take.side.seed,
        "num_steps": sampler.num_steps,
        "levels": sampler.grid().tolist(),
        "solver": sampler.solver,
        "memory": memory and vars(memory),
        "latent_frames": take.live.frames,
        "forked_from": take.origin and {"video": take.origin[0], "latent_frame": take.origin[1]},
        "made_with": model.parts.made_with,
    }
