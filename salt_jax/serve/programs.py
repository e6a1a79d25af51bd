"""Compiles what videos need in a thread of its own, while other videos go on."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax

from salt_jax.models.cache_policy import CachePolicy
from salt_jax.pipeline.live import Live
from salt_jax.pipeline.model import Model


class Ready(NamedTuple):
    """Done when the programs are there."""

    goes_on: Future[Live]
    turns: Future[None]  # to another prompt


class Programs:
    """Those of a model and a memory; all numbers of steps share them."""

    def __init__(self):
        self._found: dict[tuple[Model, CachePolicy], Ready] = {}
        self._thread = ThreadPoolExecutor(1, "compiler")

    def of(self, model: Model, memory: CachePolicy) -> Ready:
        kind = model, memory
        if kind not in self._found:
            first = self._thread.submit(_go_on, model, memory)
            turn = self._thread.submit(lambda: _turn(model, first.result()))
            self._found[kind] = Ready(first, turn)
        return self._found[kind]

    def stop(self) -> None:
        """Begins nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether a program is being compiled, which nothing can interrupt."""
        return not all(future.done() for ready in self._found.values() for future in ready)


def _go_on(model: Model, memory: CachePolicy) -> Live:
    live = model.begin("", memory=memory)
    for _ in range(2):
        made, live = model.advance(live)
        model.parts.to_bytes(made.decoded)
    return live


def _turn(model: Model, live: Live) -> None:
    jax.block_until_ready(model.advance(live, ".")[0].latents)
