"""What the arrays in a LoRA file of others are: which module of Wan 2.1 each belongs to, and as
which part of it.

Spellings: PEFT's and Diffusers' X.lora_A.weight with any prefix, ComfyUI's and LightX2V's
X.lora_down.weight, X.diff and X.diff_b, and those of kohya and musubi-tuner, where the dots of a
module's name are underscores. X is a name of the official release or of Diffusers: the names that
are known are flattened, and no name is guessed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from salt_jax.convert.names import WAN
from salt_jax.convert.places import bare, choose
from salt_jax.errors import UserError, listed
from salt_jax.io.tensor_files import TensorRef

MAX_LAYERS = 100  # more than any network here has: a LoRA of a deeper one is known by its layers

_ADAPTER = r"(\.(?!weight|bias)\w+)?"  # PEFT's name of the adapter, such as "default"
KINDS = {
    "down": r"(.+?)(?:\.lora_down|\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)"
    rf"{_ADAPTER}(?:\.weight)?",
    "up": r"(.+?)(?:\.lora_up|\.lora_B|[._]lora\.up|\.lora_linear_layer\.up)"
    rf"{_ADAPTER}(?:\.weight)?",
    "up_bias": rf"(.+?)(?:\.lora_up|\.lora_B){_ADAPTER}\.bias",
    "alpha": r"(.+)\.alpha",
    "weight": r"(.+)\.(?:diff|w_norm)",
    "bias": r"(.+)\.(?:diff_b|b_norm)",
    "modulation": r"(.+)\.diff_m",
}
# What changes the weights in a way that is not applied here.
METHODS = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "LoCon with three factors",
    r"\.(oft_|boft_)": "OFT",
    r"\.reshape_weight$": "a LoRA that changes shapes",
    r"\.set_(weight|bias)$|\.base_layer\.|\.modules_to_save": (
        "arrays that replace those of the network"
    ),
}


class Modules(NamedTuple):
    """What a file changes: by module of the network, and by part."""

    key: str  # of the file's dict, or ""
    parts: dict[str, dict[str, TensorRef]]
    targets: dict[str, dict[str, tuple[str, int]]]  # module -> weight, bias -> our path and layer


def read_modules(tensors: Mapping[str, TensorRef], where: str, key: str = "") -> Modules:
    """The parts of a LoRA by module.

    Raises:
      UserError: a name is not known, or two are of the same part.
    """
    targets, tensors = _targets(), bare(tensors, where)
    flat = {module.replace(".", "_"): module for module in targets}
    read = {name: _parse(name, targets, flat) for name in tensors}
    known = {name: part for name, part in read.items() if part}
    if not known:
        reason = _method(read) or (f"its names are {listed(read)}" if read else "it is empty")
        raise UserError(f"{where} is no LoRA of this network: {reason}; name another file")
    paths = sorted({front.rpartition("/")[0] for front, _, _ in known.values()})
    path = paths[choose([f"{path}/" for path in paths], key, f"{where} as LoRA")]
    here = {name: part for name, part in read.items() if name.rpartition("/")[0] == path}
    front = Counter(part[0] for part in here.values() if part).most_common(1)[0][0]
    if re.search(r"transformer_2|(high|low)_noise", front):
        raise UserError(
            f"{where} adapts {front.strip('./')}, the second transformer of Wan 2.2; name another "
            "file"
        )
    left = [name for name, part in here.items() if not part or part[0] != front]
    if left:
        reason = _method(left) or f"unexpected {listed(left)}"
        raise UserError(f"{where} is no LoRA of this network: {reason}; name another file")
    parts: dict[str, dict[str, TensorRef]] = {}
    for name, part in here.items():
        _, module, kind = part or ("", "", "")
        if kind in parts.setdefault(module, {}):
            raise UserError(f"{where} has two adapters of {module}; keep one of them in a file")
        parts[module][kind] = tensors[name]
    return Modules(path, parts, targets)


def _targets() -> dict[str, dict[str, tuple[str, int]]]:
    targets: dict[str, dict[str, tuple[str, int]]] = {}
    for row in WAN:
        for name in {row.official, row.diffusers}:
            module, _, slot = name.rpartition(".")
            if slot not in ("weight", "bias"):
                module, slot = name, "weight"
            for i in range(MAX_LAYERS if "{i}" in name else 1):
                targets.setdefault(module.format(i=i), {})[slot] = row.ours, i
    return targets


def _parse(name: str, targets: Mapping, flat: Mapping[str, str]) -> tuple[str, str, str] | None:
    """What stands in front of a known module, the module, and the kind of part. None: not known."""
    for kind, pattern in KINDS.items():
        match = re.fullmatch(pattern, name)
        if not match:
            continue
        raw = match[1] + (".modulation" if kind == "modulation" else "")
        kind = "weight" if kind == "modulation" else kind
        for cut in [0, *(found.end() for found in re.finditer(r"[./]", raw))]:
            if raw[cut:] in targets:
                return raw[:cut], raw[cut:], kind
        for cut in [0, *(found.end() for found in re.finditer(r"[./_]", raw))]:
            if raw[cut:] in flat:
                return raw[:cut], flat[raw[cut:]], kind
    return None


def _method(names: Iterable[str]) -> str:
    for pattern, what in METHODS.items():
        seen = [name for name in sorted(names) if re.search(pattern, name)]
        if seen:
            return f"it has {seen[0]}, of {what}, which is not applied here"
    return ""
