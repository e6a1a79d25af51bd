"""python -m tests.frozen.make: what test_frozen.py opens, as the code of this checkout writes it.

Run by version 0.1, with every config as JSON, before its files were moved and its words renamed.
Later versions have to open these files, so they are never made anew; only `RUNS`, the flags that go
on with them, follows the words of today.
"""

import tarfile
import tempfile
from pathlib import Path

from tests.launch.programs import succeed

HERE = Path(__file__).parent
SHORT = {"batch_size": 2, "critic_ratio": 1, "log_every": 1, "save_every": 2, "align.start": 0}
SHORT |= {"init_from": "", "align.layers": 1, "mesh.fsdp": 1, "mesh.data": 1}
RUNS = {
    # videos under way that may change their prompt, adapters alone are trained
    "stream": (
        "longlive.py:lora,salt",
        SHORT
        | {"init_critic": False, "lora.rank": 2}
        | {"data.num_train": 8, "data.num_test": 1, "data.dir": "data/shapes"},
    ),
    # Wan in form, small, with fresh weights and nothing but prompts: every parameter is trained
    "wan": (
        "self_forcing.py:wan,salt,paper",
        SHORT
        | {"weights": "", "model.preset": "wan2.1-t2v-tiny", "text_encoder": "wan-tiny"}
        | {"teacher.weights": "", "teacher.preset": "wan2.1-t2v-tiny", "model.dtype": "float32"}
        | {"memory.chunk": 1, "memory.first": 1, "data.clip": "(3,4,4)", "data.dir": "data/wan"},
    ),
}


def train(name: str, folder: Path, updates: int) -> None:
    """A run of `RUNS` in FOLDER/NAME up to a number of steps, from where it stands."""
    config, changes = RUNS[name]
    changes = changes | {"iterations": updates, "data.dir": folder / str(changes["data.dir"])}
    options = [f"--config.{key}={value}" for key, value in changes.items()]
    succeed("train", f"--config=configs/{config}", f"--workdir={folder / name}", *options)


def unpack(name: str, folder: Path) -> Path:
    """Its archive, in a folder; where that is then."""
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prompts = folder / "prompts.txt"
        prompts.write_text("A cat walks.\nA dog runs.\n", encoding="utf-8")
        succeed(
            "encode", "--preset_size=tiny", f"--prompts={prompts}", f"--dst={folder / 'data/wan'}"
        )
        for name in RUNS:
            train(name, folder, 2)
        succeed(
            "convert_wan",
            "--to=official",
            f"--src={folder / 'wan'}",
            f"--dst={folder / 'exported'}",
        )
        for name in (*RUNS, "data", "exported"):  # the shapes are drawn again
            with tarfile.open(HERE / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(folder / name, name, filter=lambda f: None if "shapes" in f.name else f)


if __name__ == "__main__":
    main()
