"""Text -> token ids, padded with 0.

Bytes for the small presets, the umT5 vocabulary for Wan 2.1.
"""

import html
import importlib
import re
from collections.abc import Callable

import numpy as np

from salt_jax.io.files import AnyPath, as_path, on_disk
from salt_jax.models.text_encoder import PAD

END = 1
FIRST_BYTE = 3  # id of byte 0; id 2 stays unused, as umT5 keeps its first ids for special tokens


def byte_tokenize(text: str, length: int) -> np.ndarray:
    """The UTF-8 bytes of a text and an end token, int32 [length].

    Example: `byte_tokenize("Hi", 5)` is [75, 108, 1, 0, 0]; the null caption "" is [1, 0, 0, 0, 0].

    Raises:
        ValueError: if the text with its end token is longer than `length`. Nothing is cut silently.
    """
    ids = [FIRST_BYTE + byte for byte in text.encode("utf-8")] + [END]
    if len(ids) > length:
        raise ValueError(
            f"the text {text!r} needs {len(ids)} tokens (its bytes and an end token) but the text "
            "length is "
            f"{length}: shorten the text or use a model with a longer one"
        )
    return _pad(ids, length)


def load_tokenizer(path: str | AnyPath) -> Callable[[str, int], np.ndarray]:
    """The umT5 tokenizer from the user's `tokenizer.json` or `spiece.model`.

    Returns a function (text, length) -> int32 [length] that cleans the text as Wan 2.1 does, cuts
    it to `length - 1` tokens and appends the end token.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the library that reads it, or ftfy, is not installed.
        ValueError: if the file is of another kind or its special tokens are not umT5's.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer file at {path}: give umt5-xxl's tokenizer.json or spiece.model"
        )
    ftfy = _library("ftfy")
    if path.suffix == ".json":
        library = _library("tokenizers")
        with on_disk(path) as file:
            model = library.Tokenizer.from_file(str(file))
        model.no_truncation()  # a file may carry settings of its own
        model.no_padding()

        def encode(text: str) -> list[int]:
            return model.encode(text, add_special_tokens=False).ids

        special = (model.token_to_id("<pad>"), model.token_to_id("</s>"))
    elif path.suffix == ".model":
        library = _library("sentencepiece")
        with on_disk(path) as file:
            model = library.SentencePieceProcessor(model_file=str(file))
        encode = model.encode
        special = (model.pad_id(), model.eos_id())
    else:
        raise ValueError(
            f"{path} is no tokenizer file: expected the name to end in .json or .model"
        )
    if special != (PAD, END):
        raise ValueError(
            f"{path} is not umT5's: its <pad> and </s> have ids {special}, expected {(PAD, END)}"
        )

    def tokenize(text: str, length: int) -> np.ndarray:
        return _pad([*encode(clean_text(text, ftfy.fix_text))[: length - 1], END], length)

    return tokenize


def clean_text(text: str, fix_text: Callable[[str], str]) -> str:
    """Wan 2.1's cleaning: mend the encoding with `ftfy.fix_text`, resolve HTML entities, collapse
    blanks.
    """
    text = html.unescape(html.unescape(fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def _pad(ids: list[int], length: int) -> np.ndarray:
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    return row


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the umT5 tokenizer needs the library {name}: pip install {name}"
        ) from error
