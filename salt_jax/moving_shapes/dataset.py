"""Moving Shapes on disk: a TFDS builder (array_record, no TensorFlow) around the pure world of
`moving_shapes.shapes`.

Example i is a function of (world, seed, i), so a data set can be thrown away and made again. The
world is
finite: train and test are independent draws from the same clips, and a test clip may occur in
train. What was learnt is measured against the closed form and by the scorer, not by a held-out
loss.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, below, upload
from salt_jax.moving_shapes import shapes

# the test split counts from here, so it shares no stream of random numbers with train
TEST_START = 2**32
INFO = "dataset_info.json"


def example(world: shapes.World, seed: int, index: int) -> dict:
    """Example `index` of the data set `seed`: scene and mode uniform and independent.

    Returns video uint8 [F, H, W, 3], caption str, and `scene` and `mode`, indices into
    `shapes.scenes(world)` and `shapes.modes(world)`.
    """
    scenes, modes = shapes.scenes(world), shapes.modes(world)
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    scene, mode = int(rng.integers(len(scenes))), int(rng.integers(len(modes)))
    video = shapes.render(scenes[scene], modes[mode], world)
    return {"video": video, "caption": shapes.caption(scenes[scene]), "scene": scene, "mode": mode}


class MovingShapesConfig(tfds.core.BuilderConfig):
    """One data set. Its name spells out every value, so different ones never share a directory."""

    def __init__(self, world: shapes.World, num_train: int, num_test: int, seed: int):
        values = dataclasses.asdict(world) | {"train": num_train, "test": num_test, "seed": seed}
        if world.patch == 1:  # as before there were others
            del values["patch"]
        spelt = {
            key: "_".join(map(str, value)) if isinstance(value, tuple) else value
            for key, value in values.items()
        }
        super().__init__(name="-".join(f"{key}{value}" for key, value in spelt.items()))
        self.world, self.num_train, self.num_test, self.seed = world, num_train, num_test, seed

    def __repr__(self) -> str:  # TFDS logs it
        return self.name


class MovingShapes(tfds.core.GeneratorBasedBuilder):
    """Captioned clips of one shape, or of a pair, moving on a torus.

    Needs a `MovingShapesConfig`.
    """

    # Of the pixels and sentences: raise it when `moving_shapes.shapes` changes them.
    VERSION = tfds.core.Version("1.0.0")

    @property
    def _asked(self) -> MovingShapesConfig:
        if not isinstance(self.builder_config, MovingShapesConfig):
            raise TypeError(
                "MovingShapes has no default: pass config=MovingShapesConfig(world, num_train, "
                "num_test, seed)"
            )
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        world = self._asked.world
        clip = (world.frames, world.size, world.size, 3)
        features = {
            # packed where pixels are many and most of them black
            "video": tfds.features.Tensor(
                shape=clip, dtype=np.uint8, encoding="bytes" if world.patch == 1 else "zlib"
            ),
            "caption": tfds.features.Text(),
            "scene": tfds.features.Scalar(dtype=np.int32),
            "mode": tfds.features.Scalar(dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned clips of shapes moving on a torus, "
            f"{shapes.FPS} frames per second.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing to download
        config = self._asked
        return {
            "train": self._generate_examples(0, config.num_train),
            "test": self._generate_examples(TEST_START, config.num_test),
        }

    def _generate_examples(self, start: int, count: int) -> Iterator[tuple[int, dict]]:
        config = self._asked
        for i in tqdm(range(count), desc="rendering Moving Shapes", unit="clip", delay=1):
            yield i, example(config.world, config.seed, start + i)


@tfds.decode.make_decoder()
def _text(stored, feature) -> str:
    del feature
    return stored.decode()


def _render_for(bucket: epath.Path, opened: Callable[[str], MovingShapes]) -> None:
    """Records cannot be written to a bucket: they are on this machine first. What makes a data set
    one, its description, comes last.
    """
    with tempfile.TemporaryDirectory(prefix="salt_jax_") as folder:
        builder = opened(folder)
        place = bucket / builder.data_path.relative_to(folder)
        if (place / INFO).exists():
            return
        builder.download_and_prepare()
        for file in sorted(below(Path(builder.data_dir)), key=lambda file: file.name == INFO):
            upload(Path(file), place / file.name)


def build(
    data_dir: str | AnyPath, world: shapes.World, num_train: int, num_test: int, seed: int
) -> tuple[Sequence, Sequence]:
    """The train and test sources; written under `data_dir` on the first call, read from there
    afterwards.

    `source[i]` is what `example` returns. Writing that was interrupted is never taken for complete;
    of runs that start at once each writes, and all read what the first has written.

    Raises:
      UserError: a split would be empty, or the data on disk differs from what
        `moving_shapes.shapes` makes today.
    """
    if min(num_train, num_test) < 1:
        raise UserError(
            f"config.data: num_train={num_train} and num_test={num_test} must both be at least 1"
        )
    tfds.disable_progress_bar()  # ours knows the total, so it has an ETA
    config = MovingShapesConfig(world, num_train, num_test, seed)
    where = as_path(data_dir)
    opened = lambda where: MovingShapes(config=config, data_dir=where, file_format="array_record")
    if isinstance(where, epath.Path):
        _render_for(where, opened)
    builder = opened(where)
    try:
        builder.download_and_prepare()
    except FileExistsError:  # another run was done first; ours is gone already
        builder = opened(where)
    # The decorators of TFDS hide from a type checker which arguments these two calls take.
    decoders = {"caption": _text()}  # pyright: ignore[reportCallIssue]
    train, test = builder.as_data_source(
        ["train", "test"],  # pyright: ignore[reportCallIssue]
        decoders=decoders,
    )
    stored, expected = train[0], example(world, seed, 0)
    if not all(np.array_equal(stored[key], value) for key, value in expected.items()):
        raise UserError(
            f"the data set in {builder.data_dir} was written by another version of "
            "salt_jax/moving_shapes/shapes.py: "
            "delete this directory and run again"
        )
    return train, test
