"""python -m launch.sample --workdir=DIR [--num_updates=2,4,8] [--solver=cm] [--prompt=... | --prompts_file=...]

Writes DIR/samples/K_INDEX.mp4 (16 fps), .gif, and one contact sheet per number of updates. A seed gives the same clip
on the same machine, however many clips are asked for.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import flags
from tqdm import tqdm

from launch.common import open_workdir, read_prompts, run_main
from salt_jax.data.shapes import FPS, to_pixels
from salt_jax.errors import UserError
from salt_jax.rollout.parallel import Solver
from salt_jax.sample import clip_keys, sample_clips
from salt_jax.video import visible_scale, write_contact_sheet, write_gif, write_mp4

WORKDIR = flags.DEFINE_string("workdir", None, "what launch.train wrote", required=True)
NUM_UPDATES = flags.DEFINE_list("num_updates", None, "network evaluations per clip; default as in the config")
SOLVER = flags.DEFINE_enum("solver", None, get_args(Solver), "default as in the config")
PROMPT = flags.DEFINE_string("prompt", None, "one caption")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "captions, one a line, UTF-8")
COUNT = flags.DEFINE_integer("count", 8, "clips, where no prompts file says it", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)


def main(_):
    run = open_workdir(WORKDIR.value)
    recipe = run.recipe
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value, recipe, COUNT.value)
    try:
        updates = [int(k) for k in NUM_UPDATES.value or recipe.sample.num_updates]
        text = run.embed(prompts)
    except ValueError as error:
        raise UserError(f"{error}; check --num_updates and the prompts") from error
    if min(updates) < 1:
        raise UserError(f"--num_updates={min(updates)} must be 1 or more")
    out, keys = Path(WORKDIR.value) / "samples", clip_keys(SEED.value, len(prompts))
    solver: Any = SOLVER.value or recipe.sample.solver
    scale = visible_scale(recipe.world.size, 192)
    for k in updates:
        args = (run.denoiser, run.params, text, keys, k, recipe.schedule.shift, solver, recipe.clip_shape, 1)
        clips = []
        for i, latent in enumerate(
            tqdm(sample_clips(*args), total=len(prompts), desc=f"{k} updates", unit="clip")
        ):
            clips.append(to_pixels(latent[0]))
            write_mp4(out / f"{k}_{i:03d}.mp4", clips[-1], scale, FPS)
            write_gif(out / f"{k}_{i:03d}.gif", clips[-1], scale, FPS)
        write_contact_sheet(
            out / f"{k}_sheet.png", np.stack(clips), prompts, visible_scale(recipe.world.size, 64)
        )
    print(f"{len(updates) * len(prompts)} clips in {out}")


if __name__ == "__main__":
    run_main(main)
