"""python -m launch.sample --workdir=DIR [--num_updates=2,4,8] [--solver=cm] [--prompt=... | --prompts_file=...]
python -m launch.sample --weights=DIR --prompt="..." [--image=FILE] [--student=FILE --chunk=3]

Writes DIR/samples/K_INDEX.mp4 (16 fps), of Moving Shapes also .gif and one contact sheet per number of updates; without
a workdir into --out. A seed gives the same clip on the same machine, however many clips are asked for. A student that
works chunk by chunk makes clips of any length (--frames), under any memory (--memory), and changes its prompt on the
way (--switch). --vbench writes what VBench scores.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import flags
from tqdm import tqdm

from launch import wan
from launch.common import Trained, open_workdir, read_memory, read_prompts, run_main
from salt_jax.data.shapes import FPS, to_pixels
from salt_jax.errors import UserError
from salt_jax.evaluate import vbench
from salt_jax.flow.multistep import TeacherSolver
from salt_jax.rollout.parallel import Solver
from salt_jax.sample import Cue, clip_keys, sample_clips, stream_chunks
from salt_jax.video import visible_scale, write_bytes, write_contact_sheet, write_gif, write_mp4

WORKDIR = flags.DEFINE_string("workdir", None, "what launch.train wrote")
OUT = flags.DEFINE_string("out", None, "where the videos go; default WORKDIR/samples")
NUM_UPDATES = flags.DEFINE_list(
    "num_updates", None, "network evaluations per clip; default as in the config, for teachers of Wan 50 (40)"
)
SOLVER = flags.DEFINE_enum(
    "solver",
    None,
    sorted({*get_args(Solver), *get_args(TeacherSolver)}),
    "default as in the config, for teachers of Wan unipc",
)
PROMPT = flags.DEFINE_string("prompt", None, "one caption")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "captions, one a line, UTF-8")
COUNT = flags.DEFINE_integer("count", 8, "clips, where no prompts file says it", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
FRAMES = flags.DEFINE_integer(
    "frames", None, "of the video; default as in training, of Wan 81 (4k + 1)", lower_bound=1
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
VBENCH = flags.DEFINE_string(
    "vbench", None, "VBench's list of prompts: writes {prompt}-{index}.mp4 into --out"
)
EXTENDED = flags.DEFINE_string("extended", None, "what to generate for the lines of --vbench instead")


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


def read_updates(usual: Any) -> list[int]:
    """--num_updates. Raises UserError for what are no numbers from 1 up."""
    told = NUM_UPDATES.value or [str(k) for k in usual]
    if not all(k.isdigit() and int(k) for k in told):
        raise UserError(f"--num_updates={','.join(told)} must be whole numbers from 1 up, with commas")
    return [int(k) for k in told]


def sample_wan(run: Trained | None) -> None:
    """Videos of Wan 2.1, see launch.wan."""
    if SWITCH.value or FLUSH.value or CUT.value:
        raise UserError("--switch, --flush and --cut are for Moving Shapes so far; drop them")
    if not (OUT.value or WORKDIR.value):
        raise UserError("name a folder for the videos: --out=DIR")
    model = wan.open_model(run, SOLVER.value, FRAMES.value, MEMORY.value)
    out, updates = Path(OUT.value or f"{WORKDIR.value}/samples"), read_updates(model.num_updates)
    if VBENCH.value:
        jobs = vbench.jobs(
            vbench.read_prompts(Path(VBENCH.value), Path(EXTENDED.value) if EXTENDED.value else None),
            SEED.value,
        )
        seeds = {job.name: job.seed for job in jobs}
        write_bytes(out.with_name(f"{out.name}.seeds.json"), json.dumps(seeds, indent=1).encode())
        asked = [wan.Ask(out / job.name, job.generate, clip_keys(job.seed, 1), updates[0]) for job in jobs]
    else:
        if not (PROMPT.value or PROMPTS_FILE.value):
            raise UserError("give --prompt=... or --prompts_file=FILE")
        prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value, None, COUNT.value)
        keys = clip_keys(SEED.value, len(prompts))
        asked = [
            wan.Ask(out / f"{k}_{i:03d}.mp4", prompt, keys[i : i + 1], k)
            for k in updates
            for i, prompt in enumerate(prompts)
        ]
    wan.make_videos(model, asked)
    print(f"{len(asked)} videos in {out}")


def main(_):
    run = open_workdir(WORKDIR.value) if WORKDIR.value else None
    if run is None or run.recipe.data.kind == "latents":
        sample_wan(run)
        return
    recipe = run.recipe
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value, recipe, COUNT.value)
    updates, text = read_updates(recipe.sample.num_updates), run.embed(prompts)
    out, solver = Path(OUT.value or f"{WORKDIR.value}/samples"), SOLVER.value or recipe.sample.solver
    if solver not in get_args(Solver):
        raise UserError(
            f"--solver={solver} is for teachers of Wan; choose from {', '.join(get_args(Solver))}"
        )
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
