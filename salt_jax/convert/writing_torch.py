"""Transformers of ours -> the .pt of the Self Forcing family, as torch.load reads it: a dict of
state dicts, under the keys generator, generator_ema and critic. Written without torch.

The file is a zip: each array is an entry of its own, and behind them stands the pickle that
describes the dicts. `torch_files` reads the same.
"""

import itertools
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
from jax.typing import DTypeLike

from salt_jax.convert.torch_pickle import STORAGES
from salt_jax.convert.writing import Transformer, writers
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, all_or_nothing, as_path
from salt_jax.io.tensor_files import Report, TensorWriter, contiguous, no_report, pieces

NAME = "model.pt"
FRONT = "model."  # the network inside its wrapper there
KINDS = {dtype: name for name, dtype in reversed(STORAGES.items())}


def write_pt(
    dst: str | AnyPath,
    networks: Iterable[tuple[str, Transformer]],
    dtype: DTypeLike | None = None,
    report: Report = no_report,
) -> AnyPath:
    """Writes transformers as one file in `dst`, each under its key, and returns the file's name.

    Args:
      networks: (key, network), asked for one after the other.
      dtype: how to store them; None: as they are.
      report: is called with the bytes of each piece that was written.

    Raises:
      UserError: there is such a file already, or the disk refuses; nothing is left then.
    """
    file = as_path(dst) / NAME
    if file.exists():
        raise UserError(f"{file} exists; name another folder")
    number, tables = itertools.count(), {}
    with all_or_nothing(as_path(dst)) as folder, zipfile.ZipFile(folder / NAME, "w") as archive:
        for key, network in networks:
            table = {}
            for name, tensor in writers(network, "official", dtype).items():
                table[FRONT + name] = _tensor(i := next(number), tensor)
                parts = (piece.data for piece in pieces(name, tensor))
                _write(archive, f"data/{i}", parts, report)
            tables[key] = _dict(table)
        described = b"\x80\x02" + _dict(tables) + b"."
        more = {"data.pkl": described, "version": b"3\n", "byteorder": b"little"}
        for name, content in more.items():
            _write(archive, name, [content])
    return file


def _write(
    archive: zipfile.ZipFile,
    name: str,
    parts: Iterable[bytes | memoryview],
    report: Report = no_report,
) -> None:
    """An entry without a date, so that the same networks make the same file."""
    with archive.open(zipfile.ZipInfo(f"model/{name}"), "w", force_zip64=True) as entry:
        for part in parts:
            entry.write(part)
            report(len(part))


def _dict(table: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(_text(key) + value for key, value in table.items()) + b"u"


def _tensor(number: int, tensor: TensorWriter) -> bytes:
    """What rebuilds a tensor from the entry of that number."""
    kind = _name(KINDS[np.dtype(tensor.dtype)])
    count = math.prod(tensor.shape)
    entry = _tuple(_text("storage"), kind, _text(str(number)), _text("cpu"), _int(count)) + b"Q"
    shape, strides = (_tuple(*map(_int, axes)) for axes in (tensor.shape, contiguous(tensor.shape)))
    no_hooks = _name("collections OrderedDict") + b")R"
    arguments = _tuple(entry, _int(0), shape, strides, b"\x89", no_hooks)
    return _name("torch._utils _rebuild_tensor_v2") + arguments + b"R"


def _name(text: str) -> bytes:
    return f"c{text}\n".replace(" ", "\n").encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def _int(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)
