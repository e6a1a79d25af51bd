"""python -m launch.sample --workdir=DIR [--num_updates=2,4,8] [--solver=cm] [--prompt=... | --prompts_file=...]

Writes DIR/samples/K_INDEX.mp4 (16 fps), .gif, and one contact sheet per number of updates. A seed gives the same clip
on the same machine, however many clips are asked for. A student that works chunk by chunk makes clips of any length
(--frames), under any memory (--memory), and changes its prompt on the way (--switch).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import flags
from tqdm import tqdm

from launch.common import Trained, open_workdir, read_memory, read_prompts, run_main
from salt_jax.data.shapes import FPS, to_pixels
from salt_jax.errors import UserError
from salt_jax.rollout.parallel import Solver
from salt_jax.sample import Cue, clip_keys, sample_clips, stream_chunks
from salt_jax.video import visible_scale, write_contact_sheet, write_gif, write_mp4

WORKDIR = flags.DEFINE_string("workdir", None, "what launch.train wrote", required=True)
NUM_UPDATES = flags.DEFINE_list("num_updates", None, "network evaluations per clip; default as in the config")
SOLVER = flags.DEFINE_enum("solver", None, get_args(Solver), "default as in the config")
PROMPT = flags.DEFINE_string("prompt", None, "one caption")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "captions, one a line, UTF-8")
COUNT = flags.DEFINE_integer("count", 8, "clips, where no prompts file says it", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
FRAMES = flags.DEFINE_integer(
    "frames", None, "latent frames, chunk by chunk; default as in training", lower_bound=1
)
MEMORY = flags.DEFINE_string(
    "memory", None, "WINDOW:SINK:POSITIONS, chunk by chunk; default as in the config"
)
FLUSH = flags.DEFINE_bool(
    "flush", False, "at a switch forget all but the sink and two frames, read nothing again"
)
CUT = flags.DEFINE_bool("cut", False, "a switch is a scene cut; needs relative positions")
SWITCH = flags.DEFINE_multi_string(
    "switch", [], "FRAME:PROMPT, another prompt from that frame on; may be repeated"
)


def read_switches(run: Trained) -> dict[int, Cue]:
    """--switch as cues for one video."""
    switches = {}
    for told in SWITCH.value:
        frame, _, prompt = told.partition(":")
        if not frame.isdigit() or not prompt:
            raise UserError(f"--switch={told!r} is not FRAME:PROMPT, such as 9:'A red circle moves up.'")
        switches[int(frame)] = Cue(run.embed([prompt.strip()]), FLUSH.value, CUT.value)
    return switches


def make(run: Trained, text: np.ndarray, num_updates: int, solver: Any) -> Iterator[np.ndarray]:
    """Clips one by one, float32 [F, H, W, C]."""
    recipe, keys = run.recipe, clip_keys(SEED.value, len(text))
    shape, shift = recipe.clip_shape, recipe.schedule.shift
    if not recipe.causal:
        if FRAMES.value or MEMORY.value or SWITCH.value:
            raise UserError(
                "--frames, --memory and --switch are for students that work chunk by chunk; drop them"
            )
        args = (run.network.denoise, run.params, text, keys, num_updates, shift, solver, shape, 1)
        yield from (latent[0] for latent in sample_clips(*args))
        return
    policy = read_memory(MEMORY.value, recipe.memory) if MEMORY.value else recipe.memory
    shape, switches = (FRAMES.value or shape[0], *shape[1:]), read_switches(run)
    for i in range(len(text)):
        cues = {0: Cue(text[i : i + 1])} | switches
        args = (
            cues,
            keys[i : i + 1],
            num_updates,
            shift,
            solver,
            shape,
            policy,
            recipe.rollout.first_updates,
        )
        try:
            yield np.concatenate([chunk[0] for chunk in stream_chunks(run.network, run.params, *args)])
        except ValueError as error:
            raise UserError(f"{error}; check --frames, --memory and --switch") from error


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
    out, solver = Path(WORKDIR.value) / "samples", SOLVER.value or recipe.sample.solver
    scale = visible_scale(recipe.world.size, 192)
    for k in updates:
        clips = []
        for i, latent in enumerate(
            tqdm(make(run, text, k, solver), total=len(prompts), desc=f"{k} updates", unit="clip")
        ):
            clips.append(to_pixels(latent))
            write_mp4(out / f"{k}_{i:03d}.mp4", clips[-1], scale, FPS)
            write_gif(out / f"{k}_{i:03d}.gif", clips[-1], scale, FPS)
        write_contact_sheet(
            out / f"{k}_sheet.png", np.stack(clips), prompts, visible_scale(recipe.world.size, 64)
        )
    print(f"{len(updates) * len(prompts)} clips in {out}")


if __name__ == "__main__":
    run_main(main)
