"""python -m launch.convert_wan --src=DIR_OR_FILE --dst=DIR [--key=NAME] [--dtype=bfloat16]
                            [--lora=FILE[,FILE] [--lora_strength=0.8[,1]] [--keep_lora]]
python -m launch.convert_wan --to=official|diffusers|comfyui --src=DIR_OR_FILE --dst=DIR [--keep_lora] [--dtype=...]

Reads Wan 2.1 as others store it: the official release, the Diffusers layout, ComfyUI's files, a .pt of the Self Forcing
family, and LoRAs in the spellings of PEFT, Diffusers, ComfyUI, kohya and LightX2V; the names in a file show what it is.
With --to the other way: a converted transformer, the averaged student of a workdir, or a LoRA (a kept
lora.safetensors; the adapter of a workdir with --keep_lora), for the official code, ComfyUI and Diffusers. One array is
in memory at a time.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from launch.cli import refuse_flags, refuse_pairs, run_main
from launch.common import ITEMS, all_devices, open_workdir, record
from launch.parsing import read_workdir
from salt_jax.convert.folder import find_networks, tokenizer_files
from salt_jax.convert.lora import Lora, describe, find_lora, lora_alpha, lora_outgoing, merge_lora
from salt_jax.convert.reading import Found, outgoing
from salt_jax.convert.sizes import PARTS
from salt_jax.convert.writing import open_wan, write_official
from salt_jax.convert.writing_lora import open_lora, write_lora
from salt_jax.errors import UserError
from salt_jax.models.header import read_metadata
from salt_jax.models.pretrained import TOKENIZERS
from salt_jax.models.weights import Outgoing, all_or_nothing, digest, view, write_tensors
from salt_jax.train.checkpoint import restore_params
from salt_jax.train.record import is_workdir

SRC = flags.DEFINE_string(
    "src", None, "a folder or file with weights; with --to also a workdir", required=True
)
DST = flags.DEFINE_string("dst", None, "the folder to write to", required=True)
KEY = flags.DEFINE_string(
    "key", "", "which network of a file with several, such as generator; default: the averaged student"
)
LORA = flags.DEFINE_multi_string("lora", [], "a LoRA to merge into the transformer; several with commas")
STRENGTH = flags.DEFINE_string("lora_strength", "1", "what each LoRA is multiplied by; several with commas")
KEEP = flags.DEFINE_bool(
    "keep_lora",
    False,
    "write the LoRA to lora.safetensors instead of merging it; with --to: the adapter alone",
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "how to store; default: as it is stored there, fp8 as it is exact"
)
TO = flags.DEFINE_enum("to", None, ["official", "diffusers", "comfyui"], "write the layout of others")
STEP = flags.DEFINE_integer("step", None, "of a workdir's checkpoint; default the newest", lower_bound=1)
AVERAGE = flags.DEFINE_enum("average", "ema", ["ema", "none"], "of a workdir's weights")

MODES = {"in": "taking files in", "out": "writing with --to", "workdir": "writing a workdir with --to"}
BELONGS = {
    **dict.fromkeys(("key", "lora", "lora_strength"), ("in",)),
    **dict.fromkeys(("step", "average"), ("workdir",)),
    **dict.fromkeys(("src", "dst", "dtype", "to", "keep_lora"), tuple(MODES)),
}


class Job(NamedTuple):
    """A file to write."""

    arrays: dict[str, Outgoing]
    config: dict[str, Any]
    read: tuple[Path, ...]  # what it is made of
    told: str  # how
    student: str = ""  # the key it stood under
    loras: Sequence[tuple[Lora, float]] = ()  # what was added, and how strongly
    record: str = ""


def plan(networks: dict[str, Found], src: Path) -> dict[str, Job]:
    """What comes of the networks in `src`, by file name. All that can be checked has been when this returns."""
    jobs: dict[str, Job] = {}
    loras = read_loras(networks, src)
    if KEEP.value:
        if len(loras) > 1:
            raise UserError("--keep_lora keeps one LoRA; name one with --lora, or merge them")
        (lora, strength), layers = loras[0], len(networks["wan"].pieces["blocks/modulation"])
        rank, alpha = lora_alpha(lora)
        arrays, config = lora_outgoing(lora, layers, DTYPE.value), {"rank": rank, "alpha": strength * alpha}
        jobs["lora.safetensors"] = Job(arrays, config, (lora.path,), "LoRA", "", loras)
        loras = []
    for lora, strength in loras:
        networks["wan"] = merge_lora(networks["wan"], lora, strength)
    for name, found in networks.items():
        added = loras if name == "wan" else []
        told = f"{found.layout} names" + (f", {found.student} of the file" if found.student else "")
        config = dataclasses.asdict(found.config)
        read = found.files + tuple(dict.fromkeys(lora.path for lora, _ in added))
        arrays = outgoing(found, DTYPE.value)
        jobs[PARTS[name].file] = Job(arrays, config, read, told, found.student, added, found.record)
    return jobs


def read_loras(networks: dict[str, Found], src: Path) -> list[tuple[Lora, float]]:
    """The LoRAs of --lora with their strengths."""
    paths = [
        Path(name) for told in LORA.value for name in ([told] if Path(told).exists() else told.split(","))
    ]
    told = STRENGTH.value.split(",")
    try:
        strengths = [float(number) for number in told]
    except ValueError as error:
        raise UserError(f"--lora_strength={STRENGTH.value} is no number; write such as 0.8") from error
    if len(told) == 1:
        strengths *= len(paths)
    if len(strengths) != len(paths) or not all(abs(number) < float("inf") for number in strengths):
        raise UserError(
            f"--lora_strength={STRENGTH.value} does not give {len(paths)} finite numbers, one for each --lora"
        )
    if paths and "wan" not in networks:
        raise UserError(f"{src} holds no transformer that --lora={paths[0]} could change; check --src")
    loras = list(zip([find_lora(path, networks["wan"], KEY.value) for path in paths], strengths, strict=True))
    for lora, strength in loras:
        print(f"LoRA: {describe(lora)}, strength {strength:g}")
    return loras


def take_in(src: Path, dst: Path) -> None:
    """Converts everything in `src`, or nothing."""
    networks = find_networks(src, lambda path: print(f"not used: {path}, no network of Wan 2.1"), KEY.value)
    jobs, tokenizer = plan(networks, src), tokenizer_files(src)
    read = dict.fromkeys(path for job in jobs.values() for path in job.read)
    size = sum(array.nbytes for job in jobs.values() for array in job.arrays.values())
    there = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    if size > shutil.disk_usage(there).free:
        raise UserError(f"{dst} has no room for {size / 1e9:.1f} GB; make room or choose another --dst")
    total = size + sum(path.stat().st_size for path in read)
    with all_or_nothing(dst) as folder, tqdm(total=total, unit="B", unit_scale=True) as bar:
        for path in read:
            read[path] = digest(path, bar.update)
            tqdm.write(f"{read[path]}  {path}")
        for name, job in jobs.items():
            write_tensors(folder / name, job.arrays, metadata(job, read), bar.update)
        for path in tokenizer:
            shutil.copyfile(path, folder / path.name)
        inner = [found.tokenizer for found in networks.values() if found.tokenizer]
        if inner and not tokenizer and not any((dst / name).exists() for name in TOKENIZERS):
            (folder / "spiece.model").write_bytes(view(inner[0]).tobytes())
            tokenizer = [networks["text_encoder"].files[0]]
    for name, job in jobs.items():
        sizes = ", ".join(f"{key}={value}" for key, value in job.config.items())
        print(f"wrote {dst / name} ({sizes}) from {job.read[0]} ({job.told})")
    for path in tokenizer:
        print(f"wrote {dst / path.name if path.name in TOKENIZERS else dst / 'spiece.model'} from {path}")


def metadata(job: Job, digests: dict[Path, Any]) -> dict[str, str]:
    """What a file of ours says about itself and about what it is made of."""
    added = []
    for lora, strength in job.loras:
        told = {"file": lora.path.name, "sha256": digests[lora.path], "strength": strength}
        added.append(told | {"rank": lora.ranks, "alpha": lora.alphas})
    sha256 = {path.name: digests[path] for path in job.read}
    source = {"told": job.told, "student": job.student, "sha256": sha256, "lora": added}
    told = {"format": "salt_jax", "config": json.dumps(job.config), "source": json.dumps(source)}
    return told | ({"salt_jax": job.record} if job.record else {})


def give_back(src: Path, dst: Path, layout: Any, workdir: bool) -> None:
    """Writes a transformer or a LoRA of ours as others do."""
    ours = src / PARTS["wan"].file if src.is_dir() else src
    if src.is_dir() and not workdir and not ours.is_file() and not KEEP.value:
        raise UserError(f"{src} is neither a converted folder nor a workdir; convert it without --to first")
    lora = adapter_of(src, workdir)
    if lora:
        if layout == "official":
            raise UserError(f"{src} is a LoRA; write it with --to=diffusers or --to=comfyui")
        with tqdm(unit="B", unit_scale=True) as bar:
            file = write_lora(*lora, dst, layout, DTYPE.value, report=bar.update)
        print(f"wrote {file} with {layout} names, rank {lora[1]}, alpha {lora[2]:g}")
        return
    if layout == "comfyui":
        raise UserError(f"{src} is a whole transformer, which ComfyUI reads with --to=official; name that")
    if workdir:
        run = open_workdir(str(src), STEP.value, AVERAGE.value)
        config, params, told = run.recipe.wan, run.params, record(run)["salt_jax"]
    else:
        (config, params), told = open_wan(ours), read_metadata(ours).get("salt_jax", "")
    with tqdm(unit="B", unit_scale=True) as bar:
        write_official(params, config, dst, layout, DTYPE.value, report=bar.update, record=told)
    print(f"wrote {dst} with {layout} names")


def adapter_of(src: Path, workdir: bool) -> tuple[Any, int, float] | None:
    """Parameters, rank and alpha of a kept LoRA, or with --keep_lora of the adapter of a workdir; None: neither."""
    if not workdir:
        lora = open_lora(src / "lora.safetensors" if src.is_dir() and KEEP.value else src)
        if KEEP.value and lora is None:
            raise UserError(f"{src} has no lora.safetensors; leave out --keep_lora")
        return lora
    if not KEEP.value:
        return None
    recipe = read_workdir(src, STEP.value)
    if not recipe.lora.rank:
        raise UserError(f"{src} has trained no LoRA; leave out --keep_lora")
    return (
        restore_params(src, ITEMS[AVERAGE.value], all_devices(), STEP.value),
        recipe.lora.rank,
        recipe.lora.alpha,
    )


def check_apart(src: Path, dst: Path) -> None:
    """Refuses to write where is read. Raises UserError."""
    one, other = src.resolve(), dst.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(
            f"--dst={dst} and --src={src} lie in each other; name a folder apart from what is read"
        )


def main(_):
    src, dst = Path(SRC.value or ""), Path(DST.value or "")
    workdir = is_workdir(str(src))
    mode = "in" if not TO.value else "workdir" if workdir else "out"
    refuse_flags(mode, MODES, BELONGS)
    if mode == "in":
        refuse_pairs({"keep_lora": ["lora"], "lora_strength": ["lora"]}, {})
    check_apart(src, dst)
    if TO.value:
        give_back(src, dst, TO.value, workdir)
    else:
        take_in(src, dst)


if __name__ == "__main__":
    run_main(main)
