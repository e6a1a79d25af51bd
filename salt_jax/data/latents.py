"""Encoded data on disk: what training at paper size reads instead of pixels and sentences.

A record holds the latent of a clip, the embedding of its caption, and for image-to-video the
features of its first frame and the latent of the clip that shows it alone; prompts without a clip
have no latent. It is a TFDS data set in array_record, so `tfds.builder_from_directory` opens it
too. Stored as float16, read as float32.

Writing is cut into parts, one file each. A part is a function of the settings and its number and is
put in place whole, so work that was stopped continues with the first part that is missing, and
processes share parts without communicating.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from salt_jax.errors import UserError

FORMAT = 1  # of the records and of settings.json
# Decoding and resizing videos release the interpreter lock; a clip of 81 frames at 832 x 480 is 97
# MB.
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
# arrays on disk -> in a batch
NAMES = {"latent": "video", "image": "image", "condition": "condition"}

Record = Mapping[str, Any]
"""What is to be written: `caption` str, `text` [n, D] without padding, and of `latent`, `image`,
`condition` those the data set has.
"""


class Report(NamedTuple):
    """How far the writing of a data set is, over all processes."""

    written: int
    rejected: list[tuple[str, str]]  # name and reason
    missing: int  # parts


class Encoded(NamedTuple):
    """A data set, opened for reading."""

    # dicts of caption str, text [T, D] and perhaps video, image, condition; float32
    records: Sequence
    null_text: np.ndarray  # float32 [T, D], of the prompt that guidance leads away from
    # what it was made from; "clip" is [F, h, w, C], or null without latents
    settings: dict[str, Any]


def write_records(
    directory: str | Path,
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int | None, ...]],
    null_text: np.ndarray,
    names: Sequence[str],
    per_part: int,
    make: Callable[[range], Iterable[Record | str]],
    process_index: int,
    process_count: int,
) -> Report:
    """Writes this process's share of the parts that are missing, and completes the data set if none
    is left.

    Args:
      settings: JSON values, everything the records depend on besides their number.
      shapes: of the arrays of every record, `text` as (None, D).
      null_text: [n, D], kept beside the records.
      names: of the sources, in a fixed order; a source becomes one record or is rejected.
      make: sources' numbers -> for each of them its record, or the reason why there is none. Values
        that float16 cannot hold are a reason too.

    Raises:
      UserError: the directory holds other settings, or no source became a record.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the directory {directory} ({error.strerror}); choose another"
        ) from error
    clip = list(shapes["latent"]) if "latent" in shapes else None
    count = -(-len(names) // per_part)
    settings = {
        **settings,
        "format": FORMAT,
        "sources": len(names),
        "per_part": per_part,
        "clip": clip,
    }
    settings["shapes"] = {name: list(shape) for name, shape in shapes.items()}
    _keep_settings(directory, settings, null_text, process_index)
    features = _features(shapes)
    mine = range(process_index, count, process_count)
    size = lambda part: min(per_part, len(names) - part * per_part)
    done = sum(size(part) for part in mine if _part_file(directory, part).exists())
    with tqdm(total=sum(map(size, mine)), initial=done, desc="encoding", unit="record") as bar:
        left_out = 0
        for part in mine:
            if not _part_file(directory, part).exists():
                numbers = range(part * per_part, part * per_part + size(part))
                called = [names[i] for i in numbers]
                left_out += _write_part(
                    directory, part, count, features, called, make(numbers), bar
                )
                bar.set_postfix(rejected=left_out)
    return _complete(directory, count, features)


class Records(Sequence):
    """The records of a TFDS source, as `Encoded.records` tells."""

    def __init__(self, stored: Sequence, text_length: int):
        self._stored, self._text_length = stored, text_length

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index):
        # an IndexError past the end, as sequences give
        stored = self._stored[range(len(self))[index]]
        arrays = {
            new: stored[old].astype(np.float32) for old, new in NAMES.items() if old in stored
        }
        return {
            "caption": stored["caption"].decode(),
            "text": _pad(stored["text"], self._text_length),
        } | arrays


def in_groups(
    numbers: range,
    load: Callable[[int], Any],
    encode: Callable[[Sequence[Any]], Iterable[Record]],
    size: int,
) -> Iterator[Record | str]:
    """For each number its record or the reason why there is none, a str that `load` gives; for
    `write_records`.

    `size` loaded ones are encoded together, while threads load the next. A group that is not full
    is filled with its last one, so every program is compiled for one size.
    """
    loaded = iter(grain.MapDataset.source(numbers).map(load).to_iter_dataset(READ_AHEAD))
    while group := list(itertools.islice(loaded, size)):
        good = [item for item in group if not isinstance(item, str)]
        records = iter(encode(good + good[-1:] * (size - len(good))) if good else ())
        yield from (item if isinstance(item, str) else next(records) for item in group)


def open_records(directory: str | Path, clip: Sequence[int], text_length: int) -> Encoded:
    """Opens what `write_records` wrote; texts are padded with zero rows to `text_length`.

    `clip` is the (F, h, w, C) that latents must have; a data set of prompts has none and fits any.

    Raises:
      UserError: there is no such data set, it is not complete, or its latents have another size.
      ValueError: on reading, a text is longer than `text_length`.
    """
    directory = Path(directory)
    settings = _read_json(directory / "settings.json")
    if settings is None:
        raise UserError(
            f"{directory} holds no encoded data; write it with launch.encode --dst={directory}"
        )
    if settings["format"] != FORMAT:
        raise UserError(
            f"{directory} has format {settings['format']}, this version of salt_jax reads "
            f"{FORMAT}; encode again"
        )
    if not (directory / "dataset_info.json").exists():
        raise UserError(
            f"{directory} is not complete; run launch.encode again as before, it goes on"
        )
    if settings["clip"] not in (None, list(clip)):
        raise UserError(
            f"the latents in {directory} are {settings['clip']} (frames, height, width, channels), "
            "the run wants "
            f"{list(clip)}; set config.data.clip, or encode again with another --size and --frames"
        )
    builder = tfds.builder_from_directory(str(directory))
    # TFDS decorates it.
    stored = builder.as_data_source("train")  # pyright: ignore[reportCallIssue]
    null_text = _pad(np.load(directory / "null_text.npy"), text_length)
    return Encoded(Records(stored, text_length), null_text, settings)


def _pad(text: np.ndarray, length: int) -> np.ndarray:
    if len(text) > length:
        raise ValueError(
            f"a text has {len(text)} tokens, the model reads {length}: encode with its text length"
        )
    return np.pad(text.astype(np.float32), ((0, length - len(text)), (0, 0)))


def _features(shapes: Mapping[str, tuple[int | None, ...]]) -> tfds.features.FeaturesDict:
    tensor = lambda shape: tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
    arrays = {name: tensor(shape) for name, shape in shapes.items()}
    return tfds.features.FeaturesDict({"caption": tfds.features.Text(), **arrays})


def _keep_settings(
    directory: Path, settings: dict, null_text: np.ndarray, process_index: int
) -> None:
    """Writes the settings on the first call, compares afterwards."""
    settings = json.loads(json.dumps(settings))
    before = _read_json(directory / "settings.json")
    if before is not None:
        for key in sorted(set(before) | set(settings)):
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"{directory} was begun with {key}={before.get(key)}, this run has "
                    f"{settings.get(key)}; "
                    "make them equal, or choose another --dst"
                )
        return
    temporary = directory / f"null_text.{process_index}.npy"  # processes may start at the same time
    np.save(temporary, null_text.astype(np.float16))
    temporary.replace(directory / "null_text.npy")
    _write_json(directory / "settings.json", settings, process_index)


def _write_part(directory, part, count, features, names, records, bar) -> int:
    """One file of records, then the note that makes it count.

    Returns how many sources were rejected.
    """
    file = Path(_template(directory).sharded_filepath(shard_index=part, num_shards=count))
    temporary = file.with_name(f"{file.name}.partial")
    rejected, length, size = [], 0, 0
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    try:
        for name, record in zip(names, records, strict=True):
            stored = record if isinstance(record, str) else _halved(record)
            if isinstance(stored, str):
                rejected.append((name, stored))
            else:
                data = features.serialize_example(stored)
                writer.write(data)
                length, size = length + 1, size + len(data)
            bar.update()
    finally:
        writer.close()
    temporary.replace(file)
    _write_json(
        _part_file(directory, part), {"length": length, "bytes": size, "rejected": rejected}, part
    )
    return len(rejected)


def _halved(record: Record) -> dict[str, Any] | str:
    """The arrays as float16, or why that cannot be."""
    arrays = {name: value for name, value in record.items() if name != "caption"}
    limit = float(np.finfo(np.float16).max)
    for name, value in arrays.items():
        largest = float(np.abs(value).max(initial=0))
        if not largest <= limit:
            return f"its {name} has values up to {largest:g}, float16 holds {limit:g}"
    return {
        "caption": record["caption"],
        **{name: value.astype(np.float16) for name, value in arrays.items()},
    }


def _complete(directory: Path, count: int, features: tfds.features.FeaturesDict) -> Report:
    """Sums up the parts and, when all are there, writes what TFDS needs to open them.

    Raises:
      UserError: all parts are there and no record is in them.
    """
    parts = [_read_json(_part_file(directory, part)) for part in range(count)]
    found = [part for part in parts if part is not None]
    rejected = [(name, reason) for part in found for name, reason in part["rejected"]]
    report = Report(sum(part["length"] for part in found), rejected, count - len(found))
    if report.missing:
        return report
    lines = [json.dumps({"source": name, "reason": reason}) + "\n" for name, reason in rejected]
    (directory / "rejected.jsonl").write_text("".join(lines), encoding="utf-8")
    if not report.written:
        name, reason = rejected[0]
        raise UserError(
            f"none of {len(rejected)} sources could be encoded ({name}: {reason}); see "
            f"{directory / 'rejected.jsonl'}"
        )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[part["length"] for part in found],
        num_bytes=sum(part["bytes"] for part in found),
        filename_template=_template(directory),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=[split],
        filename_template=_template(directory),
        check_data=False,  # its check needs TensorFlow
        description="Videos or prompts encoded by salt_jax for training.",
        disable_shuffling=True,
    )
    return report


def _template(directory: Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(directory),
        dataset_name="encoded",
        split="train",
        filetype_suffix="array_record",
    )


def _part_file(directory: Path, part: int) -> Path:
    return directory / "parts" / f"{part:05d}.json"


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it, or put a copy back") from error


def _write_json(file: Path, value: Any, writer: int) -> None:
    """Atomic. `writer` keeps the temporary files of processes apart."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(f".{writer}.partial")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(file)
