"""A stage: what is trained, as one value. Everything that differs from stage to stage is behind it.

A stage refuses its own contradictions, says which files have which part, makes the first state,
lists the optimizer calls of an iteration, gives their losses, and states its forward passes for
the planners. Nobody else asks which stage a run is of.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from salt_jax.config.schema import Recipe
from salt_jax.io.files import AnyPath
from salt_jax.models.denoiser import WanDenoiser
from salt_jax.models.presets import WanConfig
from salt_jax.rollout.draws import Draw, Terms
from salt_jax.state import Stream, TrainState
from salt_jax.types import Conditioning, Latent, Params, PRNGKey, TextEmb, TokenIds

Frozen = dict[str, Params]
"""Parameters that no update moves: "teacher", and what a stage reads besides: "null_text", ..."""

Metrics = dict[str, Num[Array, ""]]
"""Means of losses and the like; the counters of skipped updates are integers."""

Noise = Any
"""What a stage draws on the device for an update: a tree of arrays of the whole batch, which are
cut with it where there are micro-batches.
"""

Parts = list[tuple[str, str]]
"""Who is who in a run: names of parts, and the file, folder or workdir that each is read from; ""
is fresh, and `CLOSED_FORM` and `NO_TEACHER` are none of these.
"""
CLOSED_FORM = "closed form of the world"
NO_TEACHER = "none: the clips themselves"


# Of a field that a stage does not have. Any, since whoever reads the field may take it for a value.
ABSENT: Any = None


class Batch(NamedTuple):
    """Examples of an update; what a stage does not read is `ABSENT`."""

    cond: Conditioning = ABSENT
    tokens: TokenIds = ABSENT
    video: Latent = ABSENT
    switch: TextEmb = ABSENT  # of streaming long tuning, where prompts are paired
    # of ODE regression: a trajectory's states at the student's levels, and its end
    states: Float[Array, "b n f h w c"] = ABSENT

    @property
    def size(self) -> int:
        return len(jax.tree.leaves(self)[0])


class Update(NamedTuple):
    """One optimizer call. Static: each is a program of its own."""

    moves: str  # the learner that moves
    terms: Terms = Terms()


class Weights(NamedTuple):
    """The parameters that a run begins with; what a stage does not read is `ABSENT`."""

    base: Params  # the transformer that `config.weights` names
    text_encoder: Params
    start: Params  # where the student starts
    teacher: Params  # of a network or of the closed form
    null_text: TextEmb  # [1, T, D]
    critic: Params = ABSENT  # where the critic starts, if not at the base
    vae: Params = ABSENT  # where updates decode and encode
    switch: TextEmb = ABSENT  # form of a switch prompt, [1, T, D], where the data has them


class Inputs(NamedTuple):
    """What a loss reads and does not move."""

    state: TrainState
    frozen: Frozen
    batch: Batch
    noise: Noise
    draw: Draw | None


class Aux(NamedTuple):
    """What a loss returns beside its value."""

    metrics: Metrics
    stream: Stream | None = None  # what the next update continues from


class RecordSource(NamedTuple):
    """What a stage makes its records of."""

    clips: Sequence  # or prompts
    workdir: AnyPath
    frozen: Frozen
    encode_caption: Callable[[str], np.ndarray]
    files_may_move: bool  # see `config.migrate.refuse_another_run`


Gradient = Literal["none", "activations", "weights"]
"""Of what a forward pass has a gradient: weights means activations too."""


class Pass(NamedTuple):
    """A forward pass of an update, as the planners count it: one for each clip of the batch."""

    name: str  # "network: part"
    network: WanConfig
    pairs: tuple[tuple[int, int], ...]  # for each chunk: new frames, and frames that are seen
    times: float  # in the mean of a run, or of one update
    gradient: Gradient = "none"
    layers: int | None = None  # None: all
    reads: float | None = None  # of the prompt by cross attention; None: as often as it runs


class Memory(NamedTuple):
    """Memory at the peak of the student's update, for the planners."""

    caches: int  # KV caches of a clip
    slots: int  # frames of each
    forwards: float  # of the student whose activations wait for the backward pass


@runtime_checkable
class Stage(Protocol):
    """What is trained. Implementations are frozen dataclasses of these two values: jit keys on
    them.
    """

    @property
    def recipe(self) -> Recipe: ...

    @property
    def mesh(self) -> Mesh | None: ...

    @property
    def student(self) -> WanDenoiser:
        """The network that is trained for its own sake."""
        ...

    @property
    def learners(self) -> tuple[str, ...]:
        """What optimizers move, "student" first."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of a `Batch` that it reads."""
        ...

    def contradictions(self) -> Iterator[str]:
        """One sentence for each contradiction in the recipe, with the remedy."""
        ...

    def parts(self) -> Parts:
        """The parts of the run beside the student and the text encoder."""
        ...

    def frozen(self, weights: Weights) -> Frozen: ...

    def first_state(self, weights: Weights) -> TrainState:
        """The state before the first iteration; planners take its `eval_shape`."""
        ...

    def records(self, source: RecordSource) -> Sequence:
        """What batches are made of: the clips or prompts of a run, or something made of them."""
        ...

    def updates(self, iteration: int) -> list[tuple[Update, Draw | None]]:
        """The optimizer calls of an iteration, with what is drawn for them. Pure, on the host."""
        ...

    def noise(self, key: PRNGKey, batch: Batch) -> Noise:
        """Everything random in an update that is drawn on the device, of the whole batch."""
        ...

    def loss(self, params: Params, inputs: Inputs, update: Update) -> tuple[Float[Array, ""], Aux]:
        """What `update.moves`, whose parameters are `params`, minimises: a mean over examples."""
        ...

    def passes(self, update: Update, draw: Draw | None) -> list[Pass]:
        """The forward passes of an update."""
        ...

    def mean_passes(self, learner: str) -> list[Pass]:
        """Those of an update of a learner in the mean of a run."""
        ...

    def memory(self, update: Update) -> Memory:
        """Memory of an update at its peak."""
        ...
