"""python -m tests.same_bits COMMIT [CASE ...]: does this checkout compute what COMMIT did, bit for
bit?

Runs each recipe for three iterations, small, then makes a clip, with the code of COMMIT and with
that of this checkout, on this machine. Compares every array of the checkpoints by name, every
number of the log, and the video's bytes. For changes that must not change numbers: moves, new
names. Both share one cache of compiled programs, so a program that is the same is compiled once.
Exit code 1 and the first differences if there are any.
"""

import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto.event_pb2 import Event

from salt_jax.checkpoint import open_checkpoints
from salt_jax.config import migrate
from tests.helpers import ROOT
from tests.launch.programs import succeed

# What versions up to 0.1 call a config, or a key or flag of today.
CONFIGS = {
    "teacher.py": "shapes_teacher.py",
    "sc_dmd.py": "shapes_sc_dmd.py",
    "self_forcing.py:salt": "shapes_self_forcing.py:salt",
    "causvid.py:salt": "shapes_causvid.py:salt",
    "longlive.py:lora,salt": "shapes_longlive.py:lora_salt",
    "teacher_forcing.py": "shapes_teacher_forcing.py",
    "ode_regression.py": "shapes_ode.py",
    "consistency.py": "shapes_consistency.py",
    "sc_dmd.py:wan": "wan_t2v.py:sc_dmd",
    "self_forcing.py:wan,salt,paper": "wan_causal_self_forcing.py:salt",
}
RENAMED = {new: old for old, new in migrate.RENAMED.items()} | {"num_steps": "num_updates"}
SHORT = {
    "iterations": 3,
    "save_every": 3,
    "log_every": 1,
    "batch_size": 2,
    "critic_ratio": 1,
    "init_from": "",
}
SHORT |= {"data.num_train": 8, "data.num_test": 1, "ema.start": 1, "align.start": 0}
ODE = {"ode.num_steps": 8, "ode.trajectories": 4}
WAN = {"weights": "", "teacher.weights": "", "model.dtype": "float32", "text_encoder": "wan-tiny"}
WAN |= {"mesh.fsdp": 1, "mesh.data": 1, "data.clip": "(3,4,4)", "align.layers": 1}
T2V = WAN | {"model.preset": "wan2.1-t2v-tiny", "teacher.preset": "wan2.1-t2v-tiny"}
ONE = {"memory.chunk": 1, "memory.first": 1}
CASES = {
    "teacher": ("teacher.py", {"student_optimizer.warmup": 1}),
    "sc_dmd": ("sc_dmd.py", {}),
    "self_forcing": ("self_forcing.py:salt", {"accumulate": 2}),
    "causvid": ("causvid.py:salt", {}),
    "longlive": ("longlive.py:lora,salt", {"lora.rank": 2, "stream.switch": 1.0}),
    "teacher_forcing": ("teacher_forcing.py", {}),
    "ode": ("ode_regression.py", ODE),
    "consistency": ("consistency.py", ODE),
    "wan_t2v": ("sc_dmd.py:wan", T2V),
    "wan_self_forcing": ("self_forcing.py:wan,salt,paper", T2V | ONE),
}


def make(case: str, tree: Path, folder: Path, today: bool) -> Path:
    """The run of a case and its clip by the code in `tree`; its workdir."""
    config, changes = CASES[case]
    data = folder.parent / ("wan" if case.startswith("wan") else "shapes")
    before = not today and not (tree / "configs" / "sc_dmd.py").exists()
    config = CONFIGS[config] if before else config
    old = lambda name: RENAMED.get(name, name) if before else name
    options = SHORT | changes | {"data.dir": data}
    if case == "longlive" and "init_critic" in (tree / "salt_jax/config/schema.py").read_text():
        options["init_critic"] = False
    flags = [f"--config.{old(name)}={value}" for name, value in options.items()]
    steps = [
        ("train", f"--config=configs/{config}", *flags),
        ("sample", f"--{old('num_steps')}=2", "--count=1"),
    ]
    steps[1] += ("--prompt=A cat walks.",) * case.startswith("wan")
    if case.startswith("wan") and not data.exists():
        prompts = folder.parent / "prompts.txt"
        prompts.write_text("A cat walks.\nA dog runs.\n", encoding="utf-8")
        made = ["--preset_size=tiny", "--size=32x32", "--frames=9", f"--prompts={prompts}"]
        succeed(
            "encode",
            *made,
            "--teacher",
            "--updates=2" if before else "--num_steps=2",
            f"--dst={data}",
            tree=tree,
        )
    for name, *args in steps if case != "teacher" else steps[:1]:
        succeed(name, f"--workdir={folder}", *args, tree=tree)
    return folder


def differences(before: Path, now: Path) -> Iterator[str]:
    """Names of what is not the same in two workdirs."""
    readers = {"array": lambda folder: arrays(folder, 3), "scalar": logged, "file": clips}
    for kind, read in readers.items():
        was, found = read(before), read(now)
        for name in sorted(was.keys() | found.keys(), key=str):
            if was.get(name) != found.get(name):
                yield f"{kind} {name}"


def logged(folder: Path) -> dict:
    """What does not tell how long something took."""
    (file,) = folder.glob("events.*")
    return {key: value for key, value in scalars(file).items() if "second" not in key[0]}


def clips(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").glob("*.mp4")}


def scalars(file):
    """{(name, update): value} of a TensorBoard file: records of length, checksum, event,
    checksum.
    """
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    return found


def numbers(workdir, step):
    """Every array of a checkpoint by name, whatever mesh it was written on."""
    with open_checkpoints(workdir, 2) as manager:
        assert manager.latest_step() == step
        folder = workdir / "checkpoints" / str(step)
        names = ("student", "student_opt", "ema", "critic", "critic_opt", "stream")
        args = {}
        for name in names:
            if (folder / name).is_dir():
                tree = manager.item_metadata(step)[name].tree
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                args[name] = ocp.args.PyTreeRestore(tree, restore_args=how)
        trees = dict(manager.restore(step, args=ocp.args.Composite(**args)).items())
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(trees)
    }


def arrays(workdir, step):
    """The same as bytes."""
    return {name: x.tobytes() for name, x in numbers(workdir, step).items()}


def main() -> None:
    commit, *cases = sys.argv[1:]
    with tempfile.TemporaryDirectory() as made:
        base, found = Path(made) / "base", 0
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", base, commit], cwd=ROOT, check=True
        )
        try:
            for case in cases or CASES:
                before = make(case, base, Path(made) / f"{case}_before", today=False)
                now = make(case, ROOT, Path(made) / f"{case}_now", today=True)
                different = list(differences(before, now))
                found += len(different)
                print(f"{case}: {', '.join(different[:5]) or 'the same'}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
