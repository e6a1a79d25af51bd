"""LoRA weights in files of others: merged into a network, or kept apart."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from salt_jax.convert.files import open_tensors
from salt_jax.convert.lora_names import Modules, read_modules
from salt_jax.convert.lora_scale import kohya_alpha, number, read_stated, scale_of
from salt_jax.convert.reading import Delta, Found
from salt_jax.errors import UserError, listed
from salt_jax.io.files import AnyPath
from salt_jax.io.tensor_files import TensorRef, TensorWriter, view

Place = tuple[str, int]  # our path and layer


class Adapter(NamedTuple):
    """A matrix of low rank: scale * up @ down."""

    down: TensorRef  # [R, I], or [R, C, pt, ph, pw] of a convolution
    up: TensorRef  # [O, R], or with axes of 1 behind it
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Lora(NamedTuple):
    """What a file adds to a network."""

    path: AnyPath
    key: str  # of the file's dict, or ""
    adapters: dict[Place, Adapter]
    differences: dict[Place, Delta]  # whole arrays: biases, norms, modulation

    @property
    def ranks(self) -> list[int]:
        return sorted({adapter.rank for adapter in self.adapters.values()})

    @property
    def alphas(self) -> list[float]:
        """As if every matrix were scaled by alpha / rank."""
        return sorted(
            {round(adapter.scale * adapter.rank, 6) for adapter in self.adapters.values()}
        )


def find_lora(path: AnyPath, found: Found, key: str = "") -> Lora:
    """The LoRA in a file, which must fit the network `found`.

    Args:
      key: which one, where the file holds several; "": the averaged student's.

    Raises:
      UserError: it cannot be read, holds something else, asks for what is not applied, or adapts
        another network.
    """
    where = str(path)
    opened = open_tensors([path])
    modules = read_modules(opened.tensors, where, key)
    stated = read_stated(path, opened.metadata)
    spelled = any(".lora_down" in name for name in opened.tensors)
    kohya = kohya_alpha(opened.metadata, where) if spelled else None
    _check_network(modules, found, where)
    adapters: dict[Place, Adapter] = {}
    differences: dict[Place, Delta] = {}
    wrong = []
    for module, parts in modules.parts.items():
        low, slots, scale = {"down", "up"} & parts.keys(), modules.targets[module], 1.0
        if (
            len(low) == 1
            or (not low and parts.keys() & {"alpha", "up_bias"})
            or (low and "weight" in parts)
        ):
            wrong.append(f"{module} has {' and '.join(sorted(parts))}, no two factors")
            continue
        if low:
            down = parts["down"]
            if not down.shape or not down.shape[0]:
                raise UserError(f"{where} has rank 0 at {module}; name another file")
            own = (
                number(_value(parts["alpha"]), f"alpha of {module} in {where}")
                if "alpha" in parts
                else None
            )
            scale = scale_of(module, down.shape[0], own, stated, kohya, where)
        for part, slot, by in (
            ("up", "weight", scale),
            ("weight", "weight", 1.0),
            ("bias", "bias", 1.0),
            ("up_bias", "bias", scale),
        ):
            place = slots.get(slot)
            if part in parts and (place is None or place in adapters or place in differences):
                wrong.append(f"{module} has a {slot} too many")
            elif part == "up" and part in parts and place is not None:
                adapters[place] = Adapter(parts["down"], parts["up"], scale)
            elif part in parts and place is not None:
                differences[place] = Delta(by, parts[part])
    if wrong:
        raise UserError(f"{where} is no LoRA of this network: {listed(wrong)}; name another file")
    _check_shapes(adapters, differences, found, where)
    return Lora(path, modules.key, adapters, differences)


def merge_lora(found: Found, lora: Lora, strength: float = 1.0) -> Found:
    """The network with what the LoRA adds, times `strength`, summed in float32 when it is read."""
    deltas = {
        place: Delta(one.scale, one.up, one.down) for place, one in lora.adapters.items()
    } | lora.differences

    def added(place: Place) -> tuple[Delta, ...]:
        if place not in deltas:
            return ()
        return (deltas[place]._replace(scale=strength * deltas[place].scale),)

    pieces = {
        ours: tuple(
            piece._replace(deltas=piece.deltas + added((ours, i))) for i, piece in enumerate(pieces)
        )
        for ours, pieces in found.pieces.items()
    }
    return found._replace(pieces=pieces)


def lora_alpha(lora: Lora) -> tuple[int, float]:
    """Rank and alpha of a LoRA that `models.lora` can hold: low rank in whole blocks, of one rank
    and one scale.

    Raises:
      UserError: it is another one.
    """
    apart = sorted({ours for ours, _ in lora.adapters if not ours.startswith("blocks/")})
    scales = {adapter.scale for adapter in lora.adapters.values()}
    reason = ""
    if lora.differences or not lora.adapters:
        reason = (
            f"changes {len(lora.differences)} arrays as a whole, such as {min(lora.differences)[0]}"
        )
    elif apart:
        reason = f"adapts {listed(apart)} outside of the blocks"
    elif len(lora.ranks) > 1 or len(scales) > 1:
        listed_scales = listed(f"{scale:g}" for scale in scales)
        reason = f"has ranks {listed(map(str, lora.ranks))} and scales {listed_scales}"
    if reason:
        raise UserError(
            f"{lora.path} {reason}, which lora.safetensors cannot tell; leave out --keep_lora to "
            "merge it"
        )
    return lora.ranks[0], scales.pop() * lora.ranks[0]


def lora_writers(lora: Lora, layers: int, dtype: DTypeLike | None) -> dict[str, TensorWriter]:
    """The LoRA as the tree of `models.lora`; `dtype` as for `reading.writers`.

    Raises:
      UserError: a matrix is adapted in some layers and not in others, which that tree cannot tell.
    """
    arrays = {}
    for ours in sorted({ours for ours, _ in lora.adapters}):
        each = [lora.adapters.get((ours, i)) for i in range(layers)]
        if None in each:
            raise UserError(
                f"{lora.path} leaves out {ours} of layer {each.index(None)}; leave out --keep_lora "
                "to merge it"
            )
        for half, ab in (("down", "lora_a"), ("up", "lora_b")):
            stored = [getattr(adapter, half) for adapter in each]
            kinds = {tensor.dtype for tensor in stored}
            exact = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
            kind = np.dtype(dtype or (exact if exact.itemsize in (2, 4) else np.float32))
            parts = functools.partial(map, _transposed, stored)
            rows = stored[0].shape[0]
            arrays[f"{ours}/{ab}"] = TensorWriter(
                kind, (layers, math.prod(stored[0].shape[1:]), rows), parts
            )
    return arrays


def _transposed(tensor: TensorRef) -> np.ndarray:
    """A factor as a matrix [I, R] or [R, O]."""
    array = view(tensor)
    return array.reshape(len(array), -1).T


def describe(lora: Lora) -> str:
    """In one line."""
    low = f"rank {_span(lora.ranks)}, alpha {_span(lora.alphas)}, " if lora.adapters else ""
    whole = f", {len(lora.differences)} differences of whole arrays" if lora.differences else ""
    key = f", {lora.key} of the file" if lora.key else ""
    return f"{low}{len(lora.adapters)} matrices{whole}{key}"


def _span(numbers: Sequence[float | int]) -> str:
    first, last = f"{numbers[0]:g}", f"{numbers[-1]:g}"
    return first if len(numbers) == 1 else f"{first} to {last}"


def _value(tensor: TensorRef) -> float:
    return (
        float(np.asarray(view(tensor), np.float64).reshape(-1)[0])
        if math.prod(tensor.shape) == 1
        else math.nan
    )


def _check_network(modules: Modules, found: Found, where: str) -> None:
    """Refuses a LoRA of a network with other parts, before its shapes are looked at."""
    places: Iterable[Place] = [
        place for module in modules.parts for place in modules.targets[module].values()
    ]
    absent = {ours for ours, _ in places if ours not in found.pieces}
    if absent:
        raise UserError(
            f"{where} adapts {listed(absent)}, of image-to-video models, and {found.files[0]} is "
            "text-to-video; name a "
            "LoRA of this network"
        )
    layers, deepest = len(found.pieces["blocks/modulation"]), max(i for _, i in places)
    if deepest >= layers:
        raise UserError(
            f"{where} adapts layer {deepest}, and {found.files[0]} has {layers}, counted from 0; "
            "name a LoRA of this "
            "network"
        )


def _check_shapes(
    adapters: dict[Place, Adapter], differences: dict[Place, Delta], found: Found, where: str
) -> None:
    wrong = []
    for (ours, i), adapter in adapters.items():
        out, *into = found.pieces[ours][i].stored.shape
        down, up = adapter.down.shape, adapter.up.shape
        inner = (tuple(into), (math.prod(into),), (*into, 1, 1), (*into, 1, 1, 1))
        if down[1:] not in inner or up[:2] != (out, adapter.rank) or any(n != 1 for n in up[2:]):
            wrong.append(f"{ours} of layer {i} is {(out, *into)}, its LoRA {(down, up)}")
    for (ours, i), delta in differences.items():
        shape = found.pieces[ours][i].stored.shape
        if delta.up.shape != shape:
            wrong.append(f"{ours} of layer {i} is {shape}, its difference {delta.up.shape}")
    arrays = [half for one in adapters.values() for half in one[:2]] + [
        delta.up for delta in differences.values()
    ]
    wrong += [
        f"an array is {kind}" for kind in {array.dtype for array in arrays} if kind.kind in "iub"
    ]
    if wrong:
        raise UserError(
            f"{where} does not fit {found.files[0]}: {listed(wrong)}; name a LoRA of this network"
        )
