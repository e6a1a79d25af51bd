"""The scale of a LoRA: every source is applied, or the file is refused.

Sources: PEFT (adapter_config.json; get_pattern_key for patterns), diffusers 0.42 (metadata
lora_adapter_metadata), kohya (alpha of each module as a tensor; ss_network_alpha in the metadata).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath

DIFFUSERS = "lora_adapter_metadata"  # key of the metadata that diffusers writes and reads
APPLIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"}
# Of PEFT's LoraConfig: what does not change the sum W + scale B A.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "eva_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
MATTERS = {
    "use_dora",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "use_qalora",
    "layer_replication",
}
NO = (None, False, [], {}, "", "none", "None", "false", "False")
# Ways to begin that leave the network as it is. The others take something away from it first.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
FLAT = {
    "lora_alpha": "lora_alpha",
    "network_alpha": "lora_alpha",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


class Stated(NamedTuple):
    """What one source says."""

    source: str
    rank: float | None
    alpha: float | None
    rslora: bool
    ranks: dict[str, float]  # by pattern
    alphas: dict[str, float]


def read_stated(path: AnyPath, metadata: Mapping[str, str]) -> list[Stated]:
    """What adapter_config.json beside a file and the file's metadata say of its scale.

    Raises:
      UserError: one cannot be read, or asks for what is not applied here.
    """
    beside = path.with_name("adapter_config.json")
    found = []
    if beside.is_file():
        found.append(_stated(_json(beside.read_bytes(), beside), str(beside), strict=True))
    for key, text in metadata.items():
        if key == DIFFUSERS:
            found.append(
                _stated(
                    _json(text, f"{path}, metadata {key}"), f"{path}, metadata {key}", strict=True
                )
            )
        elif text.lstrip().startswith("{") and re.search(r"lora_alpha|use_rslora|use_dora", text):
            found.append(
                _stated(
                    _json(text, f"{path}, metadata {key}"), f"{path}, metadata {key}", strict=False
                )
            )
    flat = {FLAT[key]: _plain(text) for key, text in metadata.items() if key in FLAT}
    found += [_stated(flat, f"{path}, metadata", strict=False)] if flat else []
    return found


def kohya_alpha(metadata: Mapping[str, str], where: str) -> float | None:
    """What kohya's metadata say of alpha.

    The alpha of each module counts; tools leave these metadata as they were.
    """
    alpha = _plain(metadata.get("ss_network_alpha", "None"))
    return None if alpha in (None, "None", "") else number(alpha, f"ss_network_alpha of {where}")


def scale_of(
    module: str,
    rank: int,
    alpha: float | None,
    stated: Sequence[Stated],
    kohya: float | None,
    where: str,
) -> float:
    """alpha / rank, or alpha / sqrt(rank) where a source says rsLoRA; 1 where nothing says
    anything.

    Args:
      alpha: of the module itself, as a tensor.
      kohya: of the metadata of a file in kohya's spelling, whose modules should have their own.

    Raises:
      UserError: two sources contradict each other.
    """
    options = {} if alpha is None else {f"{where}, {module}.alpha": alpha / rank}
    for one in stated:
        r = one.ranks.get(_pattern(one.ranks, module), one.rank)
        a = one.alphas.get(_pattern(one.alphas, module), one.alpha)
        if r is not None and r != rank:
            raise UserError(
                f"{where} has rank {rank} at {module}, {one.source} says {r:g}; name the file it "
                "belongs to"
            )
        if a is None and one.rslora:
            raise UserError(f"{one.source} says use_rslora and no lora_alpha; add it")
        if a is not None:
            options[one.source] = a / (math.sqrt(rank) if one.rslora else rank)
    for source, scale in options.items():
        first, other = next(iter(options.items()))
        if not math.isclose(scale, other, rel_tol=4e-3):  # an alpha may be stored in bfloat16
            raise UserError(
                f"{first} and {source} contradict each other: {module} is scaled by {other:g} or "
                f"by {scale:g}; "
                "remove the one that is wrong"
            )
    if not options and kohya not in (None, rank):
        raise UserError(
            f"{where} says ss_network_alpha {kohya:g} in its metadata, and {module} of rank {rank} "
            "has no alpha, which "
            "programs take for another scale; add the alphas, or remove that key"
        )
    return next(reversed(options.values()), 1.0)


def number(value: object, what: str) -> float:
    """A finite number other than zero, perhaps as text. Raises UserError."""
    try:
        read = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        read = math.nan
    if not math.isfinite(read) or not read or isinstance(value, bool):
        raise UserError(
            f"{what} is {str(value)[:40]!r}, not a finite number other than 0; correct it"
        )
    return read


def _stated(found: object, source: str, strict: bool) -> Stated:
    config = _component(found, source)
    asked = {key: value for key, value in config.items() if value not in NO}
    passed = APPLIED | HARMLESS if strict else config.keys() - MATTERS
    other = {key: value for key, value in asked.items() if key not in passed}
    if strict and str(config.get("peft_type") or "LORA").rpartition(".")[2].upper() != "LORA":
        other["peft_type"] = config["peft_type"]
    if config.get("init_lora_weights") not in STARTS:
        other["init_lora_weights"] = config["init_lora_weights"]
    if other:
        key = min(other)
        raise UserError(
            f"{source} says {key} {str(other[key])[:60]!r}, which is not applied here; merge it "
            "with PEFT"
        )
    rank, alpha = (
        None if config.get(key) is None else number(config[key], f"{key} of {source}")
        for key in ("r", "lora_alpha")
    )
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        each = config.get(key) or {}
        if not isinstance(each, dict):
            raise UserError(f"{key} of {source} is no table of patterns; correct it")
        patterns[key] = {
            str(pattern): number(value, f"{key} of {source}") for pattern, value in each.items()
        }
    rslora = asked.get("use_rslora", False)
    if rslora not in (False, True, "True", "true"):
        raise UserError(
            f"use_rslora of {source} is {str(rslora)[:40]!r}, neither true nor false; correct it"
        )
    return Stated(source, rank, alpha, bool(rslora), *patterns.values())


def _component(found: object, source: str) -> dict[str, object]:
    """The keys of the transformer: diffusers writes "transformer." in front of each."""
    if not isinstance(found, dict):
        raise UserError(f"{source} is no JSON object; correct or remove it")
    parts: dict[str, dict[str, object]] = {}
    for key, value in found.items():
        front, _, last = key.rpartition(".")
        parts.setdefault(front, {})[last] = value
    front = next((front for front in ("transformer", "", *parts) if front in parts), "")
    if front == "transformer_2":
        raise UserError(
            f"{source} is of transformer_2, the second transformer of Wan 2.2; name another file"
        )
    return parts.get(front, {})


def _pattern(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches the end of a module's name, as PEFT looks for it."""
    try:
        return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)
    except re.error as error:
        raise UserError(
            f"a pattern of rank or alpha is no regular expression ({error}); correct it"
        ) from error


def _json(text: str | bytes, source: str | AnyPath) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {source} as JSON ({error}); correct or remove it") from error


def _plain(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
