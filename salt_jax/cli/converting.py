"""Runs launch.convert_wan, one array in host memory at a time."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

from tqdm import tqdm

from salt_jax.checkpoint import restore_params
from salt_jax.cli import convert_flags as f
from salt_jax.cli.parsing import read_workdir
from salt_jax.convert.folder import find_networks, tokenizer_files
from salt_jax.convert.lora import Lora, describe, find_lora, lora_alpha, lora_writers, merge_lora
from salt_jax.convert.reading import Found, writers
from salt_jax.convert.sizes import PARTS
from salt_jax.convert.writing import Transformer, open_wan, write_official
from salt_jax.convert.writing_lora import LowRank, open_lora, write_lora
from salt_jax.convert.writing_torch import write_pt
from salt_jax.errors import UserError
from salt_jax.io.files import AnyPath, all_or_nothing, as_path, free_bytes
from salt_jax.io.files import size as file_size
from salt_jax.io.header import read_metadata, stored_student
from salt_jax.io.model_folder import TOKENIZERS
from salt_jax.io.tensor_files import TensorWriter, digest, view, write_tensors
from salt_jax.keys import Json
from salt_jax.sharding import own_devices
from salt_jax.workdir import ITEMS, open_networks, open_workdir, record

Layout = Literal["official", "diffusers", "comfyui", "pt"]  # of --to
FAMILY = ("generator", "generator_ema", "critic")  # keys of a .pt


class Job(NamedTuple):
    """A file to write."""

    arrays: dict[str, TensorWriter]
    config: Json
    read: tuple[AnyPath, ...]  # what it is made of
    how: str  # it is read
    student: str = ""  # the key it stood under
    loras: Sequence[tuple[Lora, float]] = ()  # what was added, and how strongly
    record: str = ""


def plan(networks: dict[str, Found], src: AnyPath) -> dict[str, Job]:
    """The files to write from the networks in `src`, by name.

    Everything that can be checked is checked here.
    """
    jobs: dict[str, Job] = {}
    loras = read_loras(networks, src)
    if f.KEEP.value:
        if len(loras) > 1:
            raise UserError("--keep_lora keeps one LoRA; name one with --lora, or merge them")
        (lora, strength), layers = loras[0], len(networks["wan"].pieces["blocks/modulation"])
        rank, alpha = lora_alpha(lora)
        arrays, config = (
            lora_writers(lora, layers, f.DTYPE.value),
            {"rank": rank, "alpha": strength * alpha},
        )
        jobs["lora.safetensors"] = Job(arrays, config, (lora.path,), "LoRA", "", loras)
        loras = []
    for lora, strength in loras:
        networks["wan"] = merge_lora(networks["wan"], lora, strength)
    for name, found in networks.items():
        added = loras if name == "wan" else []
        how = f"{found.layout} names" + (f", {found.student} of the file" if found.student else "")
        config = dataclasses.asdict(found.config)
        read = found.files + tuple(dict.fromkeys(lora.path for lora, _ in added))
        arrays = writers(found, f.DTYPE.value)
        jobs[PARTS[name].file] = Job(arrays, config, read, how, found.student, added, found.record)
    return jobs


def read_loras(networks: dict[str, Found], src: AnyPath) -> list[tuple[Lora, float]]:
    """The LoRAs of --lora with their strengths."""
    paths = [
        as_path(name)
        for names in f.LORA.value
        for name in ([names] if as_path(names).exists() else names.split(","))
    ]
    numbers = f.STRENGTH.value.split(",")
    try:
        strengths = [float(number) for number in numbers]
    except ValueError as error:
        raise UserError(
            f"--lora_strength={f.STRENGTH.value} is no number; write such as 0.8"
        ) from error
    if len(numbers) == 1:
        strengths *= len(paths)
    if len(strengths) != len(paths) or not all(abs(number) < float("inf") for number in strengths):
        raise UserError(
            f"--lora_strength={f.STRENGTH.value} does not give {len(paths)} finite numbers, one "
            "for each --lora"
        )
    if paths and "wan" not in networks:
        raise UserError(
            f"{src} holds no transformer that --lora={paths[0]} could change; check --src"
        )
    loras = list(
        zip(
            [find_lora(path, networks["wan"], f.KEY.value) for path in paths],
            strengths,
            strict=True,
        )
    )
    for lora, strength in loras:
        print(f"LoRA: {describe(lora)}, strength {strength:g}")
    return loras


def take_in(src: AnyPath, dst: AnyPath) -> None:
    """Converts everything in `src`, or nothing."""
    networks = find_networks(src, print_unused, f.KEY.value)
    jobs, tokenizer = plan(networks, src), tokenizer_files(src)
    read = list(dict.fromkeys(path for job in jobs.values() for path in job.read))
    size = sum(array.nbytes for job in jobs.values() for array in job.arrays.values())
    if size > free_bytes(dst):
        raise UserError(
            f"{dst} has no room for {size / 1e9:.1f} GB; make room or choose another --dst"
        )
    total = size + sum(map(file_size, read))
    with all_or_nothing(dst) as folder, tqdm(total=total, unit="B", unit_scale=True) as bar:
        digests = {}
        for path in read:
            digests[path] = digest(path, bar.update)
            tqdm.write(f"{digests[path]}  {path}")
        for name, job in jobs.items():
            write_tensors(folder / name, job.arrays, metadata(job, digests), bar.update)
        for path in tokenizer:
            (folder / path.name).write_bytes(path.read_bytes())
        inner = [found.tokenizer for found in networks.values() if found.tokenizer]
        if inner and not tokenizer and not any((dst / name).exists() for name in TOKENIZERS):
            (folder / "spiece.model").write_bytes(view(inner[0]).tobytes())
            tokenizer = [networks["text_encoder"].files[0]]
    for name, job in jobs.items():
        sizes = ", ".join(f"{key}={value}" for key, value in job.config.items())
        print(f"wrote {dst / name} ({sizes}) from {job.read[0]} ({job.how})")
    for path in tokenizer:
        print(
            f"wrote {dst / path.name if path.name in TOKENIZERS else dst / 'spiece.model'} from "
            f"{path}"
        )


def print_unused(path: AnyPath) -> None:
    print(f"not used: {path}, no network of Wan 2.1")


def metadata(job: Job, digests: dict[AnyPath, str]) -> dict[str, str]:
    """Metadata of a file that we write: its origin."""
    added = []
    for lora, strength in job.loras:
        file = {"file": lora.path.name, "sha256": digests[lora.path], "strength": strength}
        added.append(file | {"rank": lora.ranks, "alpha": lora.alphas})
    sha256 = {path.name: digests[path] for path in job.read}
    source = {"told": job.how, "student": job.student, "sha256": sha256, "lora": added}
    own = {"format": "salt_jax", "config": json.dumps(job.config), "source": json.dumps(source)}
    return own | ({"salt_jax": job.record} if job.record else {})


def give_back(src: AnyPath, dst: AnyPath, layout: Layout, workdir: bool) -> None:
    """Writes one of our transformers or LoRAs in the layout of another project."""
    ours = src / PARTS["wan"].file if src.is_dir() else src
    if src.is_dir() and not workdir and not ours.is_file() and not f.KEEP.value:
        raise UserError(
            f"{src} is neither a converted folder nor a workdir; convert it without --to first"
        )
    lora = adapter_of(src, workdir)
    if lora:
        if layout in ("official", "pt"):
            raise UserError(f"{src} is a LoRA; write it with --to=diffusers or --to=comfyui")
        with tqdm(unit="B", unit_scale=True) as bar:
            file = write_lora(lora, dst, layout, f.DTYPE.value, report=bar.update)
        print(f"wrote {file} with {layout} names, rank {lora.rank}, alpha {lora.alpha:g}")
        return
    if layout == "comfyui":
        raise UserError(
            f"{src} is a whole transformer, which ComfyUI reads with --to=official; name that"
        )
    if layout == "pt":
        with tqdm(unit="B", unit_scale=True) as bar:
            file = write_pt(dst, family(src, workdir), f.DTYPE.value, bar.update)
        print(f"wrote {file}")
        return
    if workdir:
        run = open_workdir(str(src), f.STEP.value, f.AVERAGE.value)
        network, origin = Transformer(run.recipe.wan, run.params), record(run)["salt_jax"]
    else:
        network, origin = open_wan(ours), read_metadata(ours).get("salt_jax", "")
    with tqdm(unit="B", unit_scale=True) as bar:
        write_official(network, dst, layout, f.DTYPE.value, report=bar.update, record=origin)
    print(f"wrote {dst} with {layout} names")


def family(src: AnyPath, workdir: bool) -> Iterator[tuple[str, Transformer]]:
    """The networks of a .pt with their keys: all of a workdir; or a converted one, under the key
    that it came from, where a student has one.
    """
    if workdir:
        config = read_workdir(src, f.STEP.value).wan
        for key, params in open_networks(src, f.STEP.value):
            yield key, Transformer(config, params)
        return
    ours = src / PARTS["wan"].file if src.is_dir() else src
    parts = re.split(r"[./]", stored_student(ours))
    yield next((key for key in FAMILY if key in parts), "generator"), open_wan(ours)


def adapter_of(src: AnyPath, workdir: bool) -> LowRank | None:
    """A kept LoRA, or with --keep_lora the adapter of a workdir; None: neither."""
    if not workdir:
        lora = open_lora(src / "lora.safetensors" if src.is_dir() and f.KEEP.value else src)
        if f.KEEP.value and lora is None:
            raise UserError(f"{src} has no lora.safetensors; leave out --keep_lora")
        return lora
    if not f.KEEP.value:
        return None
    recipe = read_workdir(src, f.STEP.value)
    if not recipe.lora.rank:
        raise UserError(f"{src} has trained no LoRA; leave out --keep_lora")
    params = restore_params(src, ITEMS[f.AVERAGE.value], own_devices(), f.STEP.value)
    return LowRank(params, recipe.lora.rank, recipe.lora.alpha)


def convert(wanted: f.Wanted) -> None:
    """Writes what is wanted, or nothing.

    Raises:
      UserError: what is read does not fit, or cannot be written as others have it.
    """
    if f.TO.value:
        give_back(*wanted[:2], cast(Layout, f.TO.value), wanted.workdir)
    else:
        take_in(*wanted[:2])
