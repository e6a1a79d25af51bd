"""What launch.bench --peer does: the same work by ours and by a network of others, in turns."""

import json
import os

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from salt_jax.cli import bench_flags as f
from salt_jax.cli.benching import surroundings
from salt_jax.config.reading import read_recipe
from salt_jax.io.files import as_path, write_whole
from salt_jax.keys import Config, Json
from salt_jax.models.vae import PRESETS as VAE_PRESETS
from salt_jax.peers.turns import Part, compare, ratios, show, take_turns

# What a CPU is given where no size is asked: 576 tokens of width 768 in three chunks.
SMALL = {"data.clip": (9, 16, 16), "model.dtype": "float32", "model.remat": "none"}


def time_beside(config: Config, what: list[str]) -> None:
    """Times the parts that are named, prints the table, and writes the numbers.

    Raises:
      UserError: the peer is not installed, or its results are not ours.
    """
    from salt_jax.peers import parts as p  # loads torch and diffusers, or says what is missing

    config.batch_size = 1
    if jax.default_backend() == "cpu":
        make_small(config)
    recipe, vae = read_recipe(config), VAE_PRESETS[f.VAE.value]
    vae = vae if recipe.wan.out_channels == vae.z_dim else None
    work = p.Work(recipe, vae, f.NUM_STEPS.value, f.COMPILE.value, p.theirs.device_here())
    made = {name: part for name, part in p.parts(work).items() if name in what}
    rows, found, before = [], surroundings("torch", "diffusers"), os.getloadavg()[0]
    for name, make in (bar := tqdm(made.items(), unit="part")):
        bar.set_description(name)
        rows.append(row_of(name, make(), p.PEER, work.dtype))
    print(show(rows))
    sizes = f"{config.model.preset}, clip {recipe.clip_shape}, {work.dtype}, {f.RUNS.value} rounds"
    print(f"{sizes}; load of the machine {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    if jax.default_backend() == "cpu" and before > (os.cpu_count() or 1) / 2:
        print(
            "others were at work: PyTorch's threads wait for each other and lose by far more than "
            "ours, so these ratios are not the networks'; wait, or compare on one core each: "
            "OMP_NUM_THREADS=1 taskset -c 0"
        )
    if f.JSON.value:
        found |= {
            "peer": f.PEER.value,
            "preset": config.model.preset,
            "clip": recipe.clip_shape,
            "dtype": work.dtype,
            "load": [before, os.getloadavg()[0]],  # processes that ran, mean of a minute
            "results": rows,
        }
        write_whole(as_path(f.JSON.value), json.dumps(found, indent=2))


def row_of(name: str, part: Part, peer: str, dtype: str) -> Json:
    """What is found of a part: the distances of the results, then seconds and ratios."""
    far = compare(name, part, peer, dtype)
    seconds = take_turns(part, tqdm(range(f.RUNS.value), name, unit="round", leave=False))
    return {
        "part": name,
        "distance": far,  # of the results from the peer's, relative
        "seconds": seconds,
        "ratios": ratios(seconds, peer),  # quartiles of those of each round
    }


def make_small(config: Config) -> None:
    """Networks and a clip that a CPU runs in a second, where the command line names no size."""
    named = config_flags.get_override_values(flags.FLAGS["config"])
    if any(flags.FLAGS[name].present for name in ("config", "preset", "frames", "height", "width")):
        return
    f.use_preset(config, "wan2.1-t2v-small")
    config.update_from_flattened_dict({k: v for k, v in SMALL.items() if k not in named})
