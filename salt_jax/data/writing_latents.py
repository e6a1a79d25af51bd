"""Writes the data sets that `latents` reads.

Writing is cut into parts, one file each. A part is a function of the settings and its number and is
put in place whole, so work that was stopped continues with the first part that is missing, and
processes share parts without communicating.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from salt_jax.data.latents import FORMAT, read_object
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, made_on_disk, write_whole

# Decoding and resizing videos release the interpreter lock; a clip of 81 frames at 832 x 480 is 97
# MB.
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)

Record = Mapping[str, str | np.ndarray]
"""What is to be written: `caption` str, `text` [n, D] without padding, and of `switch` [n, D],
`latent`, `image`, `condition` those the data set has.
"""

Shapes = Mapping[str, tuple[int | None, ...]]
"""Of the arrays of every record, `text` and `switch` as (None, D)."""

Make = Callable[[range], Iterable[Record | str]]
"""Sources' numbers -> for each of them its record, or the reason why there is none. Values that
float16 cannot hold are a reason too.
"""

T = TypeVar("T")


class Plan(NamedTuple):
    """What a data set is to hold."""

    settings: Mapping[str, object]  # JSON values, all that records depend on besides their number
    shapes: Shapes
    null_text: np.ndarray  # [n, D], kept beside the records
    names: Sequence[str]  # of the sources, in a fixed order; each becomes one record or is rejected
    per_part: int  # sources

    @property
    def count(self) -> int:
        """Of the parts."""
        return -(-len(self.names) // self.per_part)

    def numbers(self, part: int) -> range:
        """The sources of a part."""
        return range(part * self.per_part, min((part + 1) * self.per_part, len(self.names)))


class Report(NamedTuple):
    """How far the writing of a data set is, over all processes."""

    written: int
    rejected: list[tuple[str, str]]  # name and reason
    missing: int  # parts


class Written(NamedTuple):
    """The note beside a part."""

    length: int  # records
    bytes: int
    rejected: list[list[str]]  # name and reason of each


def begin(directory: str | AnyPath, plan: Plan) -> None:
    """Makes the directory, and writes the settings on the first call; compares afterwards.

    Raises:
      UserError: the directory cannot be made, or holds other settings.
    """
    directory = as_path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the directory {directory} ({error.strerror or error}); choose another"
        ) from error
    _keep_settings(directory, plan)


def write_parts(
    directory: str | AnyPath, plan: Plan, make: Make, process_index: int, process_count: int
) -> None:
    """Writes this process's share of the parts that are missing, after `begin`."""
    directory, features = as_path(directory), _features(plan.shapes)
    mine = range(process_index, plan.count, process_count)
    missing = [part for part in mine if not _part_file(directory, part).exists()]
    total = sum(len(plan.numbers(part)) for part in mine)
    done = total - sum(len(plan.numbers(part)) for part in missing)
    with tqdm(total=total, initial=done, desc="encoding", unit="record") as bar:
        left_out = 0
        for part in missing:
            left_out += _write_part(directory, part, plan, features, make, bar)
            bar.set_postfix(rejected=left_out)


def in_groups(
    numbers: range,
    load: Callable[[int], T | str],
    encode: Callable[[Sequence[T]], Iterable[Record]],
    size: int,
) -> Iterator[Record | str]:
    """For each number its record or the reason why there is none, a str that `load` gives; for
    `write_parts`.

    `size` loaded ones are encoded together, while threads load the next. A group that is not full
    is filled with its last one, so every program is compiled for one size.
    """
    loaded = iter(grain.MapDataset.source(numbers).map(load).to_iter_dataset(READ_AHEAD))
    while group := list(itertools.islice(loaded, size)):
        good = [item for item in group if not isinstance(item, str)]
        records = iter(encode(good + good[-1:] * (size - len(good))) if good else ())
        yield from (item if isinstance(item, str) else next(records) for item in group)


def _features(shapes: Shapes) -> tfds.features.FeaturesDict:
    arrays = {
        name: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
        for name, shape in shapes.items()
    }
    return tfds.features.FeaturesDict({"caption": tfds.features.Text(), **arrays})


def _keep_settings(directory: AnyPath, plan: Plan) -> None:
    settings = {
        **plan.settings,
        "format": FORMAT,
        "sources": len(plan.names),
        "per_part": plan.per_part,
        "clip": plan.shapes.get("latent"),
        "shapes": dict(plan.shapes),
    }
    settings = json.loads(json.dumps(settings))
    before = read_object(directory / "settings.json")
    if before is not None:
        for key in sorted(set(before) | set(settings)):
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"{directory} was begun with {key}={before.get(key)}, this run has "
                    f"{settings.get(key)}; "
                    "make them equal, or choose another --dst"
                )
        return
    array = io.BytesIO()
    np.save(array, plan.null_text.astype(np.float16))
    write_whole(directory / "null_text.npy", array.getvalue())
    _write_json(directory / "settings.json", settings)


def _write_part(
    directory: AnyPath,
    part: int,
    plan: Plan,
    features: tfds.features.FeaturesDict,
    make: Make,
    bar: tqdm,
) -> int:
    """One file of records, then the note that makes it count.

    Returns how many sources were rejected.
    """
    file = as_path(_template(directory).sharded_filepath(shard_index=part, num_shards=plan.count))
    numbers = plan.numbers(part)
    rejected, length, size = [], 0, 0
    with made_on_disk(file) as temporary:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for number, record in zip(numbers, make(numbers), strict=True):
                stored = record if isinstance(record, str) else _halved(record)
                if isinstance(stored, str):
                    rejected.append([plan.names[number], stored])
                else:
                    serialized = features.serialize_example(stored)
                    writer.write(serialized)
                    length, size = length + 1, size + len(serialized)
                bar.update()
        finally:
            writer.close()
    _write_json(_part_file(directory, part), Written(length, size, rejected)._asdict())
    return len(rejected)


def _halved(record: Record) -> dict[str, str | np.ndarray] | str:
    """The arrays as float16, or why that cannot be."""
    arrays = {name: value for name, value in record.items() if not isinstance(value, str)}
    limit = float(np.finfo(np.float16).max)
    for name, value in arrays.items():
        largest = float(np.abs(value).max(initial=0))
        if not largest <= limit:
            return f"its {name} has values up to {largest:g}, float16 holds {limit:g}"
    return {
        "caption": record["caption"],
        **{name: value.astype(np.float16) for name, value in arrays.items()},
    }


def complete(directory: str | AnyPath, plan: Plan) -> Report:
    """Sums up the parts and, when all are there, writes what TFDS needs to open them.

    Raises:
      UserError: all parts are there and no record is in them.
    """
    directory = as_path(directory)
    parts = [_read_part(_part_file(directory, part)) for part in range(plan.count)]
    found = [part for part in parts if part is not None]
    rejected = [(name, reason) for part in found for name, reason in part.rejected]
    report = Report(sum(part.length for part in found), rejected, plan.count - len(found))
    if report.missing:
        return report
    lines = [json.dumps({"source": name, "reason": reason}) + "\n" for name, reason in rejected]
    write_whole(directory / "rejected.jsonl", "".join(lines))
    if not report.written:
        name, reason = rejected[0]
        raise UserError(
            f"none of {len(rejected)} sources could be encoded ({name}: {reason}); see "
            f"{directory / 'rejected.jsonl'}"
        )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[part.length for part in found],
        num_bytes=sum(part.bytes for part in found),
        filename_template=_template(directory),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(plan.shapes),
        split_infos=[split],
        filename_template=_template(directory),
        check_data=False,  # its check needs TensorFlow
        description="Videos or prompts encoded by salt_jax for training.",
        disable_shuffling=True,
    )
    return report


def _template(directory: AnyPath) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(directory),
        dataset_name="encoded",
        split="train",
        filetype_suffix="array_record",
    )


def _part_file(directory: AnyPath, part: int) -> AnyPath:
    return directory / "parts" / f"{part:05d}.json"


def _read_part(file: AnyPath) -> Written | None:
    note = read_object(file)
    return None if note is None else Written(**note)  # pyright: ignore[reportArgumentType]


def _write_json(file: AnyPath, value: Mapping[str, object]) -> None:
    write_whole(file, json.dumps(value, indent=1))
