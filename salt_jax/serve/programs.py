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
        """Waits for the program that is being compiled: a process must not end meanwhile."""
        self._thread.shutdown(cancel_futures=True)


def _go_on(model: Model, memory: CachePolicy) -> Live:
    live = model.begin("", memory=memory)
    for _ in range(2):
        made, live = model.advance(live)
        model.parts.to_bytes(made.decoded)
    return live


def _turn(model: Model, live: Live) -> None:
    jax.block_until_ready(model.advance(live, ".")[0].latents)
