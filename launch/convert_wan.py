"""python -m launch.convert_wan --src=DIR_OR_FILE --dst=DIR [--lora=FILE [--keep_lora]] [--dtype=bfloat16]
python -m launch.convert_wan --to=official|diffusers --src=DIR_OR_FILE --dst=DIR [--dtype=bfloat16]

Reads Wan 2.1 as others store it: the official release, the Diffusers layout, a .pt of the Self Forcing family, or
LongLive's base with its LoRA; the names in a file show what it is. With --to the other way: a converted transformer, or
the averaged student of a workdir, for the official code, ComfyUI and Diffusers. One array is in memory at a time.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from launch.cli import run_main
from launch.common import open_workdir
from salt_jax.convert.folder import find_networks, tokenizer_files
from salt_jax.convert.lora import find_lora, lora_outgoing, merge_lora
from salt_jax.convert.reading import digest, outgoing
from salt_jax.convert.sizes import PARTS
from salt_jax.convert.writing import open_wan, write_official
from salt_jax.errors import UserError
from salt_jax.models.weights import Outgoing, all_or_nothing, write_tensors

SRC = flags.DEFINE_string(
    "src", None, "a folder or file with weights; with --to also a workdir", required=True
)
DST = flags.DEFINE_string("dst", None, "the folder to write to", required=True)
LORA = flags.DEFINE_string("lora", "", "a LoRA to merge into the transformer")
KEEP = flags.DEFINE_bool("keep_lora", False, "write the LoRA to lora.safetensors instead of merging it")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "how to store; default: as it is stored there"
)
TO = flags.DEFINE_enum("to", None, ["official", "diffusers"], "write the layout of others")


class Job(NamedTuple):
    """A file to write."""

    arrays: dict[str, Outgoing]
    config: dict[str, Any]
    read: tuple[Path, ...]  # what it is made of
    told: str  # how


def plan(src: Path) -> dict[str, Job]:
    """What comes of everything in `src`, by file name. All that can be checked has been when this returns."""
    networks, jobs = find_networks(src, lambda path: print(f"not used: {path}, no network of Wan 2.1")), {}
    loras = ()
    if LORA.value:
        if "wan" not in networks:
            raise UserError(f"{src} holds no transformer that --lora={LORA.value} could change; check --src")
        lora, loras = find_lora(Path(LORA.value), networks["wan"]), (Path(LORA.value),)
        config = {"rank": lora.rank, "alpha": lora.alpha}
        if KEEP.value:
            jobs["lora.safetensors"] = Job(lora_outgoing(lora, DTYPE.value), config, loras, "LoRA")
            loras = ()
        else:
            networks["wan"] = merge_lora(networks["wan"], lora)
        print(f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.adapters)} matrices")
    for name, found in networks.items():
        told = f"{found.layout} names" + (f", {found.student} of the file" if found.student else "")
        files = found.files + (loras if name == "wan" else ())
        config = dataclasses.asdict(found.config)
        jobs[PARTS[name].file] = Job(outgoing(found, DTYPE.value), config, files, told)
    return jobs


def take_in(src: Path, dst: Path) -> None:
    """Converts everything in `src`, or nothing."""
    jobs, tokenizer = plan(src), tokenizer_files(src)
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
            source = {"told": job.told, "sha256": {path.name: read[path] for path in job.read}}
            metadata = {"format": "salt_jax", "config": json.dumps(job.config), "source": json.dumps(source)}
            write_tensors(folder / name, job.arrays, metadata, bar.update)
        for path in tokenizer:
            shutil.copyfile(path, folder / path.name)
    for name, job in jobs.items():
        sizes = ", ".join(f"{key}={value}" for key, value in job.config.items())
        print(f"wrote {dst / name} ({sizes}) from {job.read[0]} ({job.told})")
    for path in tokenizer:
        print(f"wrote {dst / path.name} from {path}")


def give_back(src: Path, dst: Path, layout: Any) -> None:
    """Writes a transformer of ours as others do."""
    ours = src / PARTS["wan"].file if src.is_dir() else src
    if src.is_dir() and not ours.is_file():
        if not (src / "checkpoints").is_dir():
            raise UserError(
                f"{src} is neither a converted folder nor a workdir; convert it without --to first"
            )
        run = open_workdir(str(src))
        config, params = run.recipe.wan, run.params
    else:
        config, params = open_wan(ours)
    with tqdm(unit="B", unit_scale=True) as bar:
        write_official(params, config, dst, layout, DTYPE.value, report=bar.update)
    print(f"wrote {dst} with {layout} names")


def main(_):
    if (KEEP.value and not LORA.value) or (TO.value and LORA.value):
        raise UserError("--keep_lora is for --lora, and --lora is not for --to; leave one out")
    src, dst = Path(SRC.value or ""), Path(DST.value or "")
    if TO.value:
        give_back(src, dst, TO.value)
    else:
        take_in(src, dst)


if __name__ == "__main__":
    run_main(main)
