"""LoRA weights in files of others (PEFT's names, as LongLive writes them): merged into a network, or kept apart."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salt_jax.convert import names
from salt_jax.convert.reading import FLOATS, Adapter, Found, clean, open_tensors
from salt_jax.convert.sizes import read_json
from salt_jax.errors import UserError
from salt_jax.models.weights import Outgoing, Stored, view


class Lora(NamedTuple):
    """The adapted matrices of a network, by our path and layer."""

    rank: int
    alpha: float
    adapters: dict[tuple[str, int], Adapter]


def find_lora(path: Path, found: Found) -> Lora:
    """The LoRA in a file, which must fit the network `found`.

    The file does not hold alpha. An adapter_config.json beside it tells; without one alpha is the rank, as LongLive
    trains it: W + up @ down.

    Raises:
      UserError: it cannot be read, holds something else, or adapts another network.
    """
    tensors, _ = open_tensors([path], names.ADAPTERS)
    places = {
        getattr(row, layout).format(i=i).removesuffix(".weight"): (row.ours, i)
        for row in names.WAN
        if row.ours in found.pieces and row.ours.startswith("blocks/") and row.ours.endswith("/kernel")
        for layout in ("official", "diffusers")
        for i in range(len(found.pieces[row.ours]))
    }
    halves: dict[str, dict[tuple[str, int], Stored]] = {"A": {}, "B": {}}
    unexpected = []
    for name, tensor in clean(tensors, str(path)).items():
        parts = re.fullmatch(r"(.+)\.lora_([AB])(\.\w+)?\.weight", name)
        if parts and parts[1] in places:
            halves[parts[2]][places[parts[1]]] = tensor
        else:
            unexpected.append(name)
    alone = sorted(f"{ours} of layer {i}" for ours, i in halves["A"].keys() ^ halves["B"].keys())
    if unexpected or alone or not halves["A"]:
        raise UserError(
            f"{path} is no LoRA of this network: unexpected {', '.join(sorted(unexpected)) or 'nothing'}; "
            f"one half absent of {', '.join(alone) or 'none'}; {len(halves['A'])} matrices adapted; name another file"
        )
    ranks = {tensor.shape[:1] for tensor in halves["A"].values()}
    if len(ranks) != 1 or () in ranks or (0,) in ranks:
        raise UserError(
            f"{path} has matrices of ranks {sorted(ranks)}, only one rank is read; name another file"
        )
    ((rank,),) = ranks
    alpha = float(read_json(path.with_name("adapter_config.json")).get("lora_alpha", rank))
    adapters = {at: Adapter(halves["A"][at], halves["B"][at], alpha / rank) for at in halves["A"]}
    for (ours, i), adapter in adapters.items():
        out, into = found.pieces[ours][i].stored.shape
        shapes = (adapter.down.shape, adapter.up.shape)
        if shapes != ((rank, into), (out, rank)) or {adapter.down.dtype, adapter.up.dtype} - set(
            map(np.dtype, FLOATS)
        ):
            raise UserError(
                f"{path} does not fit: {ours} of layer {i} is {(out, into)}, its LoRA {shapes}; name another file"
            )
    return Lora(rank, alpha, adapters)


def merge_lora(found: Found, lora: Lora) -> Found:
    """The network with W + alpha / rank * up @ down in place of W, summed in float32 when it is read."""
    adapted = {
        ours: tuple(piece._replace(adapter=lora.adapters.get((ours, i))) for i, piece in enumerate(pieces))
        for ours, pieces in found.pieces.items()
    }
    return found._replace(pieces=adapted)


def lora_outgoing(lora: Lora, dtype: Any) -> dict[str, Outgoing]:
    """The LoRA as the tree of `models.lora`; `dtype` as for `convert.outgoing`.

    Raises:
      UserError: a matrix is adapted in some layers and not in others, which that tree cannot tell.
    """
    layers = 1 + max(i for _, i in lora.adapters)
    arrays = {}
    for ours in sorted({ours for ours, _ in lora.adapters}):
        each = [lora.adapters.get((ours, i)) for i in range(layers)]
        if None in each:
            raise UserError(f"the LoRA leaves out {ours} of layer {each.index(None)}; merge it instead")
        for half, ab in (("down", "lora_a"), ("up", "lora_b")):
            stored = [getattr(adapter, half) for adapter in each]
            kinds = {tensor.dtype for tensor in stored}
            kind = np.dtype(dtype or (kinds.pop() if len(kinds) == 1 else np.float32))
            parts = lambda stored=stored: (view(tensor).T for tensor in stored)
            arrays[f"{ours}/{ab}"] = Outgoing(kind, (layers, *stored[0].shape[::-1]), parts)
    return arrays
