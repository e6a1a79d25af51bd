"""VBench: which videos it wants under which names, and its totals from its scores.

VBench (Vchitect/VBench, arXiv 2311.17982) finds a video by its name, {prompt}-{index}.mp4, and asks
for 5 samples of every prompt; 25 where temporal flickering is judged, because its static filter
throws most of them away. The name carries VBench's own prompt even where the video was generated
from an extended one. It takes the suffix of all videos from the first file it meets, so a folder of
videos must hold nothing else: seeds are stored beside it.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from salt_jax.data.text_lists import read_lines, read_text
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath


class Dimension(NamedTuple):
    """How a raw score enters the totals: (score - low) / (high - low), times weight."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(low=0.1462),
    "background_consistency": Dimension(low=0.2615),
    "temporal_flickering": Dimension(low=0.6293),
    "motion_smoothness": Dimension(low=0.706, high=0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(low=0.0009, high=0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC
QUALITY_WEIGHT = 4  # semantic has 1

SAMPLES, FLICKER_SAMPLES = 5, 25
LONGEST_NAME = 255  # bytes, of usual file systems; VBench's longest is 216


class Prompt(NamedTuple):
    """One prompt of VBench."""

    text: str  # in the file's name
    generate: str  # the prompt of the model: `text`, or its extension
    samples: int


class Job(NamedTuple):
    """One video to make."""

    name: str
    generate: str
    seed: int


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """The leaderboard's "quality", "semantic" and "total" in percent, from raw scores (fractions)
    by dimension.

    Raises:
      ValueError: a dimension is missing. VBench itself would count it as 0.
    """
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"VBench's totals need all 16 dimensions; missing: {', '.join(missing)}")

    def part(dimensions: Mapping[str, Dimension]) -> float:
        parts = (
            d.weight * (scores[name] - d.low) / (d.high - d.low) for name, d in dimensions.items()
        )
        return 100 * sum(parts) / sum(d.weight for d in dimensions.values())

    quality, semantic = part(QUALITY), part(SEMANTIC)
    return {"quality": quality, "semantic": semantic, "total": total(quality, semantic)}


def total(quality: float, semantic: float) -> float:
    """VBench's total score, 4 : 1.

    >>> round(total(85.96, 81.59), 2)
    85.09
    """
    return (QUALITY_WEIGHT * quality + semantic) / (QUALITY_WEIGHT + 1)


def read_results(path: AnyPath) -> dict[str, float]:
    """Raw scores by dimension from a result file of VBench, or from a folder with several
    *_eval_results.json.

    A file maps dimensions, with underscores or blanks, to [score, details] or to the score.

    Raises:
      UserError: no such file, not such a file, an unknown dimension, one in two files, or a score
        that is no fraction.
    """
    files = sorted(path.glob("*_eval_results.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path} has no *_eval_results.json; give VBench's output folder or one result file"
        )
    scores: dict[str, float] = {}
    for file in files:
        results = _read_json(file)
        if not isinstance(results, dict):
            raise UserError(f"{file} is not a VBench result: it must map dimensions to scores")
        for key, value in results.items():
            name = key.replace(" ", "_")
            if name not in DIMENSIONS:
                raise UserError(
                    f"{file}: {key!r} is not a dimension of VBench ({', '.join(DIMENSIONS)})"
                )
            if name in scores:
                raise UserError(
                    f"{file}: {name} is in another file of {path} too; keep one result of each"
                )
            scores[name] = _score(file, key, value)
    return scores


def _score(file: AnyPath, key: str, value: object) -> float:
    score = value[0] if isinstance(value, list) and value else value
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(f"{file}: the score of {key!r} is {score!r}; it must be a number")
    if score > 1:
        raise UserError(
            f"{file}: the score of {key!r} is {score}; VBench's are fractions, at most 1"
        )
    return float(score)


def read_prompts(path: AnyPath, extended: AnyPath | None = None) -> list[Prompt]:
    """VBench's prompts, each once, in the order of the file.

    Args:
      path: VBench_full_info.json, which alone tells all dimensions; or plain text, one prompt a
        line, then of the dimension the file is named after, as in VBench's
        prompts_per_dimension/temporal_flickering.txt, if any.
      extended: plain text, line i is what to generate for prompt i. Where a prompt occurs twice,
        VBench's later video replaces the earlier one, so the later line counts.

    Raises:
      UserError: a file cannot be read, an empty line, files of different lengths, or a prompt that
        cannot be a name.
    """
    if path.suffix == ".json":
        entries = _read_entries(path)
    else:
        entries = [(line, [path.stem]) for line in _read_lines(path)]
    texts = _read_lines(extended) if extended else [text for text, _ in entries]
    if len(texts) != len(entries):
        raise UserError(
            f"{extended} has {len(texts)} lines but {path} has {len(entries)} prompts; align them"
        )
    prompts: dict[str, Prompt] = {}
    for (text, dimensions), generate in zip(entries, texts, strict=True):
        _refuse_name(path, text)
        samples = FLICKER_SAMPLES if "temporal_flickering" in dimensions else SAMPLES
        before = prompts[text].samples if text in prompts else 0
        prompts[text] = Prompt(text, generate, max(samples, before))
    return list(prompts.values())


def jobs(prompts: Iterable[Prompt], seed: int) -> list[Job]:
    """All videos to make, sample by sample. Skip the names that exist to resume.

    The seed of a video is a function of `seed` and its name alone: the same in any part of the
    list, and not chosen.
    """
    names = [(f"{p.text}-{i}.mp4", p.generate) for p in prompts for i in range(p.samples)]
    return [Job(name, generate, video_seed(seed, name)) for name, generate in names]


def video_seed(seed: int, name: str) -> int:
    """31 bits of SHA-256 of "{seed}/{name}": fits a PRNG key on every platform."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def _refuse_name(path: AnyPath, text: str) -> None:
    """Raises UserError for a prompt that VBench could not find under its name; changing the name
    would not help.
    """
    if "/" in text or "\0" in text or "\n" in text:
        raise UserError(
            f"{path}: the prompt {text!r} cannot be a file name; VBench finds videos by their "
            "prompt"
        )
    size = len(f"{text}-{FLICKER_SAMPLES - 1}.mp4".encode())
    if size > LONGEST_NAME:
        raise UserError(
            f"{path}: the prompt {text[:40]!r}... needs a file name of {size} bytes, "
            f"{LONGEST_NAME} are possible; "
            "give extended prompts apart from VBench's own"
        )


def _read_entries(path: AnyPath) -> list[tuple[str, Sequence[str]]]:
    """(prompt, dimensions) of VBench_full_info.json."""
    entries = _read_json(path)
    listed = entries if isinstance(entries, list) else []
    try:
        found = [(entry["prompt_en"], entry["dimension"]) for entry in listed]
    except (TypeError, KeyError):
        found = []
    if not found or not all(isinstance(t, str) and t and isinstance(d, list) for t, d in found):
        raise UserError(f'{path} is not VBench\'s list of {{"prompt_en": ..., "dimension": [...]}}')
    return found


def _read_lines(path: AnyPath) -> list[str]:
    """Lines without surrounding blanks; an empty one is refused, it would shift those below."""
    lines = read_lines(path) or [""]
    if "" in lines:
        raise UserError(f"{path}:{lines.index('') + 1} is empty; one prompt a line")
    return lines


def _read_json(path: AnyPath) -> object:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
