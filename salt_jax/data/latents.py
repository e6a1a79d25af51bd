"""Encoded data on disk: what training at paper size reads instead of pixels and sentences.

A record holds the latent of a clip, the embedding of its caption, and for image-to-video the
features of its first frame and the latent of the clip that shows it alone; prompts without a clip
have no latent, and may have the embedding of a switch prompt, see `prompt_pairs`. It is a TFDS data
set in array_record, so `tfds.builder_from_directory` opens it too. Stored as float16, read as
float32. `writing_latents` writes it.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path

FORMAT = 1  # of the records and of settings.json
# arrays on disk -> in a batch
NAMES = {"latent": "video", "image": "image", "condition": "condition"}


class Encoded(NamedTuple):
    """A data set, opened for reading."""

    # dicts of caption str, text [T, D] and perhaps switch [T, D], video, image, condition; float32
    records: Sequence
    null_text: np.ndarray  # float32 [T, D], of the prompt that guidance leads away from
    # what it was made from; "clip" is [F, h, w, C], or null without latents
    settings: dict[str, object]


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
        texts = {
            name: padded(stored[name], self._text_length)
            for name in ("text", "switch")
            if name in stored
        }
        return {"caption": stored["caption"].decode()} | texts | arrays


def open_records(directory: str | AnyPath, clip: Sequence[int], text_length: int) -> Encoded:
    """Opens what `writing_latents` wrote; texts are padded with zero rows to `text_length`.

    `clip` is the (F, h, w, C) that latents must have; a data set of prompts has none and fits any.

    Raises:
      UserError: there is no such data set, it is not complete, or its latents have another size.
      ValueError: on reading, a text is longer than `text_length`.
    """
    directory = as_path(directory)
    settings = read_object(directory / "settings.json")
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
    import tensorflow_datasets as tfds  # here, because programs that open no data start without it

    builder = tfds.builder_from_directory(str(directory))
    # TFDS decorates it.
    stored = builder.as_data_source("train")  # pyright: ignore[reportCallIssue]
    null_text = padded(read_array(directory / "null_text.npy"), text_length)
    return Encoded(Records(stored, text_length), null_text, settings)


def read_object(file: AnyPath) -> dict[str, object] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
      UserError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it, or put a copy back") from error


def read_array(file: AnyPath) -> np.ndarray:
    with file.open("rb") as stored:
        return np.load(stored)


def padded(text: np.ndarray, length: int) -> np.ndarray:
    """[n, D] -> float32 [length, D], with rows of 0. Raises ValueError where it is too long."""
    if len(text) > length:
        raise ValueError(
            f"a text has {len(text)} tokens, the model reads {length}: encode with its text length"
        )
    return np.pad(text.astype(np.float32), ((0, length - len(text)), (0, 0)))
