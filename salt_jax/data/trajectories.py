"""Trajectories of the causal teacher on disk, for stage ode_regression: made once, part by part,
then read as data.

A part is a function of (recipe, its number), written whole or not at all; a run that was stopped
continues with the first part that is missing. Several processes make each part together, as they
make an update, and the first one writes it where all of them can read.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from salt_jax import hosts
from salt_jax.config.migrate import refuse_another_run
from salt_jax.config.reading import to_json
from salt_jax.config.schema import Recipe
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, made_on_disk
from salt_jax.io.header import read_metadata
from salt_jax.io.tensor_files import layer, list_tensors

Record = dict[str, str | int | np.ndarray]
"""A clip of Moving Shapes or of encoded data, see `pipeline.batches`."""

Make = Callable[[list[Record], int], dict[str, np.ndarray]]


class Trajectories(Sequence):
    """Records `video` [F, H, W, C], `states` [n + 1, F, H, W, C], and the words of their clips'
    records.

    See `stages.ode_regression.OdeRegression.trajectory`.
    """

    def __init__(self, parts: list[AnyPath], per_part: int, clips: Sequence[Record]):
        self._parts, self._per_part, self._clips = parts, per_part, clips

    def __len__(self) -> int:
        return len(self._parts) * self._per_part

    def __getitem__(self, index):
        part, i = divmod(int(index), self._per_part)
        arrays, _ = list_tensors(self._parts[part])
        record = {name: np.array(layer(arrays[name], i)) for name in ("video", "states")}
        clip = self._clips[int(index) % len(self._clips)]
        return record | {name: clip[name] for name in ("caption", "text") if name in clip}


def open_trajectories(
    directory: AnyPath, recipe: Recipe, make: Make, source: Sequence, files_may_move: bool = False
) -> Trajectories:
    """Makes what is missing in `directory`: `config.ode.trajectories`, rounded up to whole batches.

    Args:
      make: (records of a batch, its number) -> its arrays `video` and `states`.
      source: the clips, used again from the start where they are too few.

    Raises:
      UserError: a part that is there was made with another config, or does not say with which.
    """
    size = recipe.batch_size
    count = -(-recipe.ode.trajectories // size)
    parts = [directory / f"{i:05d}.safetensors" for i in range(count)]
    missing = hosts.only_first(lambda: _missing(parts, recipe, files_may_move), f"{directory}")
    bar = tqdm(
        missing, desc="trajectories", unit="batch", disable=not (missing and hosts.is_first())
    )
    for number in bar:
        clips = [source[i % len(source)] for i in range(number * size, (number + 1) * size)]
        arrays = make(clips, number)
        write = functools.partial(_write, parts[number], arrays, recipe)
        hosts.only_first(write, f"{parts[number]}")
    return Trajectories(parts, size, source)


def _missing(parts: list[AnyPath], recipe: Recipe, files_may_move: bool) -> list[int]:
    """The numbers of those that are not there.

    Raises:
      UserError: as `open_trajectories`.
    """
    missing = []
    for number, path in enumerate(parts):
        if not path.exists():
            missing.append(number)
            continue
        config = read_metadata(path).get("config")
        if not config:
            raise UserError(f"{path} has no config in it; delete it, or pass a new --workdir")
        refuse_another_run(config, recipe, files_may_move)
    return missing


def _write(path: AnyPath, arrays: dict[str, np.ndarray], recipe: Recipe) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with made_on_disk(path) as partial:
        save_file(arrays, partial, {"config": to_json(recipe)})
