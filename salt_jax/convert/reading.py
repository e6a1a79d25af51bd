"""Networks of Wan 2.1 in files of others -> our files, array by array, so that no network is ever
in memory.

A file is recognised by the names in it, its sizes follow from the shapes, and nothing is written
before every name and shape has been checked. `names` has the tables.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from salt_jax.convert import names
from salt_jax.convert.files import Opened, open_tensors
from salt_jax.convert.foreign import check_surroundings, foreign_by_names
from salt_jax.convert.fp8 import FP8, fits, rescaled, split_scales
from salt_jax.convert.names import TABLES
from salt_jax.convert.places import (
    Place,
    bare,
    choose,
    find_places,
    inside,
    layers,
    names_of,
    unnumbered,
)
from salt_jax.convert.sizes import PARTS, Size, infer_config, read_json
from salt_jax.errors import UserError, listed
from salt_jax.io import model_folder
from salt_jax.io.files import AnyPath
from salt_jax.io.tensor_files import TensorRef, TensorWriter, view
from salt_jax.types import Leaf

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, jnp.bfloat16)))  # stored as they are


class Delta(NamedTuple):
    """What a LoRA adds to an array: scale * up, or scale * up @ down of a matrix or of a
    convolution.
    """

    scale: float
    up: TensorRef  # [O, R], or of the array's shape
    down: TensorRef | None = None  # [R, ...]


class Piece(NamedTuple):
    """One array of theirs, or a third of one, on its way to ours."""

    name: str
    stored: TensorRef
    form: str
    third: int | None = None
    scale: TensorRef | None = None  # of 8-bit numbers
    deltas: tuple[Delta, ...] = ()


class Found(NamedTuple):
    """A network in files of others: recognised, complete and of the right shapes; nothing of it is
    read yet.
    """

    network: str
    layout: str
    student: str  # which of several networks in the file: a key of it, or ""
    config: model_folder.Sizes
    files: tuple[AnyPath, ...]
    pieces: dict[str, tuple[Piece, ...]]  # by our path; one for each layer where ours are stacked
    record: str = ""  # what our export wrote about it, as JSON
    tokenizer: TensorRef | None = None  # bytes of spiece.model in a file of a text encoder


def find_network(files: Sequence[AnyPath], key: str = "") -> Found | None:
    """The network that the files (one, or the shards of one model) hold; None: none of Wan 2.1.

    Args:
      key: which one, where the files hold several of one kind; "": the averaged student.

    Raises:
      UserError: a file cannot be read, or is a network with names or shapes that do not fit.
    """
    return next(iter(networks_in(open_tensors(files), files, key)), None)


def networks_in(opened: Opened, files: Sequence[AnyPath], key: str = "") -> list[Found]:
    """As `find_network`; a file of ComfyUI may hold several of different kinds."""
    where = str(files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more")
    tensors, scales = split_scales(bare(opened.tensors, where), opened.metadata, where)
    places, found = find_places(tensors), []
    for network in dict.fromkeys(place.network for place in places):
        same = [place for place in places if place.network == network]
        place = same[choose([place.prefix for place in same], key, f"{where} as {network}")]
        prefixes = [other.prefix for other in places if other.prefix != place.prefix]
        here = inside(tensors, place.prefix, prefixes)
        pieces = _match(place, here, inside(scales, place.prefix, prefixes), where)
        config = infer_config(
            network, _sizes(pieces), read_json(files[0].with_name("config.json")), where
        )
        _check(pieces, PARTS[network], config, where)
        if network == "wan":
            check_surroundings(files)
        path, _, front = place.prefix.rpartition("/")
        several = sum(other.prefix.rpartition("/")[0] == path for other in same) > 1
        asked = key in (*re.split(r"[./]", front), place.prefix.strip("./"))
        student = (place.prefix if several or (key and asked) else path).strip("./")
        tokenizer = here.get(names.TOKENIZER) if network == "text_encoder" else None
        record = opened.metadata.get("salt_jax", "")
        found.append(
            Found(network, place.layout, student, config, tuple(files), pieces, record, tokenizer)
        )
    return found


def outgoing_dtype(piece: Piece) -> np.dtype:
    """The default dtype on disk: exact, and never of 8 bits."""
    if piece.stored.dtype in FP8 and piece.scale is None and not piece.deltas:
        return np.dtype(jnp.bfloat16)
    return piece.stored.dtype if piece.stored.dtype in FLOATS else np.dtype(np.float32)


def writers(found: Found, dtype: DTypeLike | None) -> dict[str, TensorWriter]:
    """Our arrays of a network, stored as `dtype`, or as they are stored there where it is None.

    Nothing is read yet.
    """
    arrays = {}
    for ours, pieces in found.pieces.items():
        kinds = {outgoing_dtype(piece) for piece in pieces}
        kind = np.dtype(dtype or (kinds.pop() if len(kinds) == 1 else np.float32))
        stack = (len(pieces),) if ours.startswith("blocks/") else ()
        parts = functools.partial(map, _read, pieces)
        arrays[ours] = TensorWriter(kind, stack + _shape(pieces[0]), parts)
    return arrays


def _match(
    place: Place, tensors: Mapping[str, TensorRef], scales: Mapping[str, TensorRef], where: str
) -> dict[str, tuple[Piece, ...]]:
    """Every array of ours with those of theirs that it is made of.

    Raises UserError about those that do not match.
    """
    network, layout, _ = place
    table = TABLES[network]
    used = (
        1 + max(layers(tensors, table, layout).values(), default=-1) - names.UNUSED_LAYERS[network]
    )
    image = [row for row in table if re.search(names.IMAGE_TO_VIDEO, row.ours)]
    with_image = not unnumbered(tensors, table, layout).isdisjoint(names_of(image, layout))
    pieces, missing, left = {}, [], set(tensors)
    for row in table if with_image else [row for row in table if row not in image]:
        name, _, third = getattr(row, layout).partition("#")
        form = row.official_form if layout == "official" and row.official_form else row.form
        each = [name.format(i=i) for i in range(used)] if "{i}" in name else [name]
        missing += [n for n in each if n not in tensors]
        left -= set(each)
        pieces[row.ours] = tuple(
            Piece(n, tensors[n], form, int(third) if third else None, scales.get(n))
            for n in each
            if n in tensors
        )
    ignored = names.IGNORED[network].replace("LAST", str(used))
    unexpected = [name for name in left if not re.fullmatch(ignored, name)]
    if unexpected and foreign_by_names(unexpected):
        raise UserError(f"{where} {foreign_by_names(unexpected)}; name another file")
    if missing or unexpected:
        counts = ((f"{len(missing)} missing ({listed(set(missing))})", missing),)
        counts += ((f"{len(unexpected)} unexpected ({listed(unexpected)})", unexpected),)
        what = " and ".join(text for text, some in counts if some)
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
        path: Size(len(each), each[0].stored.shape, ours(each[0]))
        for path, each in pieces.items()
        if each
    }


def _shape(piece: Piece) -> tuple[int, ...]:
    """What the array's shape is among ours. Raises EinopsError where it does not fit."""
    rows, *rest = piece.stored.shape or (1,)
    shape = piece.stored.shape if piece.third is None else (rows // 3, *rest)
    return rearrange(np.broadcast_to(np.float32(0), shape), piece.form).shape


@functools.cache
def _like(part: model_folder.Part, config: model_folder.Sizes) -> dict[str, Leaf]:
    return flatten_dict(model_folder.shapes(part, config), sep="/")


def _check(
    pieces: Mapping[str, Sequence[Piece]],
    part: model_folder.Part,
    config: model_folder.Sizes,
    where: str,
) -> None:
    like, wrong = _like(part, config), []
    for ours, each in pieces.items():
        want = like[ours].shape[1:] if ours.startswith("blocks/") else like[ours].shape
        for piece in each:
            try:
                right = _shape(piece) == want and (
                    piece.third is None or piece.stored.shape[0] % 3 == 0
                )
            except EinopsError:
                right = False
            if not right:
                wrong.append(f"{piece.name} is {piece.stored.shape}, which does not give {want}")
            if piece.stored.dtype not in (*FLOATS, *FP8, np.float64):
                wrong.append(
                    f"{piece.name} is {piece.stored.dtype}, no floating point: quantised or damaged"
                )
            if piece.scale is not None and not fits(piece.scale, piece.stored.shape):
                wrong.append(f"{piece.name} is {piece.stored.shape}, its scale {piece.scale.shape}")
    if wrong:
        raise UserError(f"{where} does not fit {config}: {listed(wrong)}; name another file")


def _read(piece: Piece) -> np.ndarray:
    """The array as ours, a view on the file where nothing changes it."""
    array = view(piece.stored)
    if piece.scale is not None:
        array = rescaled(array, view(piece.scale))
    if piece.third is not None:
        array = np.split(array, 3)[piece.third]
    for scale, *halves in piece.deltas:
        up, *down = (view(half).astype(np.float32) for half in halves if half is not None)
        delta = up.reshape(len(up), -1) @ down[0].reshape(len(down[0]), -1) if down else up
        array = array.astype(np.float32) + np.float32(scale) * delta.reshape(array.shape)
    return rearrange(array, piece.form)
