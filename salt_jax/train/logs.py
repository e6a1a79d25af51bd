"""The logs of a run, and its stop where updates are not finite."""

import logging
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from salt_jax.errors import UserError
from salt_jax.io.files import in_bucket

log = logging.getLogger(__name__)


def summarize(recent: Sequence[Mapping[str, SupportsFloat]]) -> dict[str, float]:
    """The mean of each term over the updates that had it; of counters the last value."""
    names = {name for metrics in recent for name in metrics}
    series = {name: [float(m[name]) for m in recent if name in m] for name in sorted(names)}
    counters = ("skipped", "in_a_row")
    return {
        name: values[-1] if name.endswith(counters) else float(np.mean(values))
        for name, values in series.items()
    }


def report(values: dict[str, float], step: int, writer: SummaryWriter, bar: tqdm) -> None:
    """Scalars to TensorBoard, the losses to the bar."""
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    flush(writer)
    bar.set_postfix(
        {k: f"{v:.4g}" for k, v in values.items() if not k.endswith(("skipped", "row", "norm"))}
    )


def flush(writer: SummaryWriter, anyway: bool = False) -> None:
    """Shows what was written at once.

    In a bucket a file is written anew by each flush, and these files grow: there it is left to
    tensorboardX, which flushes every two minutes, unless `anyway`.
    """
    if anyway or not in_bucket(writer.logdir):
        writer.flush()


def stop_if_stuck(values: dict[str, float], limit: int, step: int) -> None:
    """Raises UserError, naming the terms that are not finite, once `limit` updates in a row were
    skipped.
    """
    for who in ("student", "critic"):
        skipped, in_a_row = (
            values.get(f"{who}_skipped", 0),
            values.get(f"{who}_skipped_in_a_row", 0),
        )
        if in_a_row >= limit:
            bad = [k for k, v in values.items() if not np.isfinite(v)] or ["the gradient"]
            raise UserError(
                f"{in_a_row:.0f} {who} updates in a row were not finite at update {step} "
                f"({', '.join(bad)}); "
                "lower the learning rate, or restart from an earlier checkpoint"
            )
        if skipped:
            log.warning("%d %s updates skipped so far: not finite", skipped, who)
