"""Networks of Wan 2.1 in files of others -> our files, array by array, so that no network is ever in memory.

A file is recognised by the names in it, its sizes follow from the shapes, and nothing is written before every name and
shape has been checked. `names` has the tables.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError

from salt_jax.convert import names
from salt_jax.convert.names import TABLES, Row
from salt_jax.convert.sizes import PARTS, Size, infer_config, read_json
from salt_jax.convert.torch_files import read_torch
from salt_jax.errors import UserError
from salt_jax.models import pretrained
from salt_jax.models.weights import Outgoing, Stored, list_tensors, view
from salt_jax.models.weights import digest as digest  # for those who read it here

FLOATS = (np.float32, np.float16, jnp.bfloat16)


class Adapter(NamedTuple):
    """What a LoRA adds to one matrix [O, I]: scale * up @ down."""

    down: Stored  # [R, I]
    up: Stored  # [O, R]
    scale: float


class Piece(NamedTuple):
    """One array of theirs, or a third of one, on its way to ours."""

    name: str
    stored: Stored
    form: str
    third: int | None = None
    adapter: Adapter | None = None


class Found(NamedTuple):
    """A network in files of others: recognised, complete and of the right shapes; nothing of it is read yet."""

    network: str
    layout: str
    student: str  # which of several networks in the file: a key of it, or ""
    config: Any
    files: tuple[Path, ...]
    pieces: dict[str, tuple[Piece, ...]]  # by our path; one for each layer where ours are stacked


def find_network(files: Sequence[Path]) -> Found | None:
    """The network that the files (one, or the shards of one model) hold; None: none of Wan 2.1.

    Raises:
      UserError: a file cannot be read, or is a network with names or shapes that do not fit.
    """
    tensors, student = open_tensors(files, names.STUDENTS)
    where = str(files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more")
    tensors = clean(tensors, where)
    known = {}
    for network, layout in itertools.product(TABLES, ("official", "diffusers")):
        seen, expected = _unnumbered(tensors, TABLES[network], layout), _names(TABLES[network], layout)
        known[network, layout] = sum(name in seen for name in expected) / len(expected)
    network, layout = max(known, key=lambda place: known[place])
    if known[network, layout] < 0.5:
        return None
    pieces = _match(network, layout, tensors, where)
    config = infer_config(network, _sizes(pieces), read_json(files[0].with_name("config.json")), where)
    _check(pieces, PARTS[network], config, where)
    return Found(network, layout, student, config, tuple(files), pieces)


def open_tensors(files: Sequence[Path], keys: Sequence[str]) -> tuple[dict[str, Stored], str]:
    """The tensors of some files by name; of a file of torch.save those under the first of `keys`, and which that was.

    Raises:
      UserError: a file cannot be read, or two have the same name.
    """
    tensors, chosen = {}, ""
    for path in files:
        if path.suffix == ".safetensors":
            try:
                found: dict[Any, Any] = dict(list_tensors(path)[0])
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {path} ({error}); download it again") from error
        else:
            found = read_torch(path)
            chosen = next((key for key in keys if isinstance(found.get(key), dict)), "")
            found = found[chosen] if chosen else found
        twice = tensors.keys() & found.keys()
        if twice:
            raise UserError(
                f"{path} and another file both hold {min(map(str, twice))}; convert one model at a time"
            )
        tensors |= {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Stored)}
    return tensors, chosen


def outgoing(found: Found, dtype: Any) -> dict[str, Outgoing]:
    """Our arrays of a network, stored as `dtype`, or as they are stored there where it is None. Nothing is read yet."""
    arrays = {}
    for ours, pieces in found.pieces.items():
        kinds = {piece.stored.dtype for piece in pieces}
        kind = np.dtype(dtype or (kinds.pop() if len(kinds) == 1 else np.float32))
        stack = (len(pieces),) if ours.startswith("blocks/") else ()
        parts = lambda pieces=pieces: (_read(piece) for piece in pieces)
        arrays[ours] = Outgoing(kind, stack + _shape(pieces[0]), parts)
    return arrays


def _names(table: Iterable[Row], layout: str) -> list[str]:
    return [getattr(row, layout).partition("#")[0] for row in table]


def _layers(tensors: Iterable[str], table: Iterable[Row], layout: str) -> dict[str, int]:
    """The names that belong to a layer, and which. The names of a layer all begin alike."""
    front = next((name.partition("{i}")[0] for name in _names(table, layout) if "{i}" in name), None)
    numbered = {name: front and re.match(re.escape(front) + r"(\d{1,4})\.", name) for name in tensors}
    return {name: int(match[1]) for name, match in numbered.items() if match}


def _unnumbered(tensors: Iterable[str], table: Iterable[Row], layout: str) -> set[str]:
    """The names with {i} for the layer."""
    layers = _layers(tensors, table, layout)
    return {
        re.sub(rf"\b{layers[name]}\b", "{i}", name, count=1) if name in layers else name for name in tensors
    }


def clean(tensors: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """Names without what wrappers put in front of them."""
    bare = {}
    for name, tensor in tensors.items():
        short = name
        for wrapper in names.WRAPPERS:
            short = short.replace(wrapper, "")
        while prefix := next((p for p in names.PREFIXES if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        if short in bare:
            raise UserError(f"{where} holds {short} twice, once as {name}; convert one model at a time")
        bare[short] = tensor
    for name, first in names.ALIASES.items():
        if name in bare:
            tensor = bare.pop(name)
            bare.setdefault(first, tensor)
    return bare


def _match(
    network: str, layout: str, tensors: Mapping[str, Stored], where: str
) -> dict[str, tuple[Piece, ...]]:
    """Every array of ours with those of theirs that it is made of. Raises UserError with all that do not match."""
    table = TABLES[network]
    used = 1 + max(_layers(tensors, table, layout).values(), default=-1) - names.UNUSED_LAYERS[network]
    image = [row for row in table if re.search(names.IMAGE_TO_VIDEO, row.ours)]
    with_image = not _unnumbered(tensors, table, layout).isdisjoint(_names(image, layout))
    pieces, missing, left = {}, [], set(tensors)
    for row in table if with_image else [row for row in table if row not in image]:
        name, _, third = getattr(row, layout).partition("#")
        form = row.official_form if layout == "official" and row.official_form else row.form
        each = [name.format(i=i) for i in range(used)] if "{i}" in name else [name]
        missing += [n for n in each if n not in tensors]
        left -= set(each)
        pieces[row.ours] = tuple(
            Piece(n, tensors[n], form, int(third) if third else None) for n in each if n in tensors
        )
    ignored = names.IGNORED[network].replace("LAST", str(used))
    unexpected = sorted(name for name in left if not re.fullmatch(ignored, name))
    if missing or unexpected:
        told = ((f"{len(missing)} missing ({', '.join(sorted(set(missing)))})", missing),)
        told += ((f"{len(unexpected)} unexpected ({', '.join(unexpected)})", unexpected),)
        what = " and ".join(text for text, some in told if some)
        raise UserError(
            f"{where} looks like a {network} with {layout} names, but has {what}; "
            "download it again, or name another file"
        )
    return pieces


def _sizes(pieces: Mapping[str, Sequence[Piece]]) -> dict[str, Size]:
    def ours(piece):
        try:
            return _shape(piece)
        except EinopsError:
            return ()

    return {
        path: Size(len(each), each[0].stored.shape, ours(each[0])) for path, each in pieces.items() if each
    }


def _shape(piece: Piece) -> tuple[int, ...]:
    """What the array's shape is among ours. Raises EinopsError where it does not fit."""
    rows, *rest = piece.stored.shape or (1,)
    shape = piece.stored.shape if piece.third is None else (rows // 3, *rest)
    return rearrange(np.broadcast_to(np.float32(0), shape), piece.form).shape


def _check(pieces: Mapping[str, Sequence[Piece]], part: pretrained.Part, config: Any, where: str) -> None:
    like: Any = flatten_dict(jax.eval_shape(lambda: part.init(jax.random.key(0), config)), sep="/")
    wrong = []
    for ours, each in pieces.items():
        want = like[ours].shape[1:] if ours.startswith("blocks/") else like[ours].shape
        for piece in each:
            try:
                fits = _shape(piece) == want and (piece.third is None or piece.stored.shape[0] % 3 == 0)
            except EinopsError:
                fits = False
            if not fits:
                wrong.append(f"{piece.name} is {piece.stored.shape}, which does not give {want}")
            if piece.stored.dtype not in FLOATS:
                wrong.append(f"{piece.name} is {piece.stored.dtype}, not floating point of 16 or 32 bits")
    if wrong:
        raise UserError(f"{where} does not fit {config}: {', '.join(wrong)}; name another file")


def _read(piece: Piece) -> np.ndarray:
    """The array as ours, a view on the file where no LoRA changes it."""
    array = view(piece.stored)
    if piece.third is not None:
        array = np.split(array, 3)[piece.third]
    if piece.adapter is not None:
        down, up = (view(stored).astype(np.float32) for stored in piece.adapter[:2])
        array = array.astype(np.float32) + np.float32(piece.adapter.scale) * (up @ down)
    return rearrange(array, piece.form)
