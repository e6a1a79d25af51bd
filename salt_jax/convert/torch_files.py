"""Tensors in files of torch.save, read without torch and without running anything that a file says.

Such a file is a zip with NAME/data.pkl, a pickle that describes dicts and tensors (read by
`torch_pickle`), and NAME/data/KEY, the numbers of each storage.
"""

import struct
import zipfile
from collections.abc import Callable, Mapping

from salt_jax.convert.torch_pickle import STORAGES, Name, Refused, Storage, follow, short
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, as_path, size

MAX_PICKLE = 2**26  # bytes; a network of 1300 tensors needs 2**18
DAMAGED = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError)  # what zipfile raises


def read_torch(path: str | AnyPath) -> dict[object, object]:
    """The dict that torch.save wrote: nested dicts with a `Stored` for each tensor; no tensor is
    read.

    Numbers, strings, lists and tuples stay as they are.

    Raises:
      UserError: the file is absent, damaged or of another kind, or asks for anything but tensors in
        dicts.
    """
    path = as_path(path)
    try:
        root, entries = _zip_entries(path)
        found = follow(_read_pickle(path, root, entries), _storages(path, root, entries))
    except Refused as error:
        raise UserError(
            f"{path} is refused: {error}. Nothing of it was run. If you trust the file, load it "
            "with torch and save "
            "only the dict of its tensors"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}); check the name"
        ) from error
    except (*DAMAGED, ValueError, TypeError, LookupError) as error:
        raise UserError(f"cannot read {path}: {_remedy(path)} ({error})") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds a {type(found).__name__}, not a dict of tensors; name another file"
        )
    return found


def _remedy(path: AnyPath) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\3\4":
        return "it is cut off or damaged, download it again"
    if start.startswith(b"\x80"):
        return (
            "it is in the format of torch before 1.6, a bare pickle; convert it once with torch: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    return "torch.save did not write it, name another file"


def _zip_entries(path: AnyPath) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder all entries are in, and for each entry where its bytes begin and how many there
    are.
    """
    entries, total = {}, size(path)
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename in entries:
                raise Refused(f"it has two entries named {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Refused(
                    f"its {info.filename!r} is compressed or encrypted, torch.save does neither"
                )
            file.seek(info.header_offset)
            signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
            start = info.header_offset + 30 + name + extra
            if signature != b"PK\3\4" or start + info.file_size > total:
                raise zipfile.BadZipFile(f"entry {info.filename!r} does not lie in the file")
            entries[info.filename] = (start, info.file_size)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"it is a zip with {len(roots)} files data.pkl, torch.save writes one")
    return roots[0], entries


def _read_pickle(path: AnyPath, root: str, entries: Mapping[str, tuple[int, int]]) -> bytes:
    with path.open("rb") as file:

        def read(name):
            start, size = entries[name]
            if size > MAX_PICKLE:
                raise Refused(
                    f"its {name} has {size} bytes, more than any description of tensors needs"
                )
            file.seek(start)
            return file.read(size)

        order = read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order != b"little":
            raise Refused(
                f"its numbers are stored in the byte order {order[:9]!r}, only little-endian is "
                "read"
            )
        return read(f"{root}data.pkl")


def _storages(
    path: AnyPath, root: str, entries: Mapping[str, tuple[int, int]]
) -> Callable[[object], Storage]:
    """From what the pickle says of a storage to its place in the file."""

    def storage(there):
        match there:
            case ("storage", Name(kind), str(key), str(_), int(count)) if kind in STORAGES:
                dtype, name = STORAGES[kind], f"{root}data/{key}"
            case _:
                raise Refused(
                    f"it refers to {short(there)} outside of itself, which is no storage of numbers"
                )
        if not (key.isascii() and key.isdecimal()):
            raise Refused(f"it names a storage {key!r}, torch.save numbers them")
        if name not in entries:
            raise ValueError(f"storage {key} is absent")
        start, size = entries[name]
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(
                f"storage {key} has {size} bytes, too few for {count} numbers of {dtype}"
            )
        return Storage(path, start, dtype, count)

    return storage
