"""Configs, workdirs and an export of 0.1, kept in tests/frozen: later versions read them and go on
with them.

What is compared bit for bit is what does not depend on the machine: parameters that were stored and
are read. Whether training itself keeps its bits, `python -m tests.same_bits` asks on one machine.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax.config.method import Stream
from salt_jax.config.reading import from_json, read_recipe
from tests.every_config import OPTIONS, get_config
from tests.frozen.make import HERE, RUNS, train, unpack
from tests.launch.programs import frames, succeed

CONFIGS = json.loads((HERE / "configs.json").read_text())


# What 0.1 called a config: two files for each, by size, with one variant after the colon.
FILES = {"ode": "ode_regression", "dmd4": "sc_dmd", "dmd8": "sc_dmd", "t2v": "sc_dmd"}
FILES |= {"i2v": "sc_dmd", "forcing": "causal_forcing"}
VARIANTS = {"plain": "", "chunk": "", "sc_dmd": "", "frame_salt": "frame,salt"}
# What was changed on purpose since, by the name of 0.1.
NO_DROPOUT = {"caption_dropout": 0.0}
CHANGED = dict.fromkeys(
    ("wan_causal_teacher_forcing", "wan_causal_ode", "wan_causal_consistency"), NO_DROPOUT
)
CHANGED |= {"shapes_longlive": {"init_critic": True}}
CHANGED |= {"wan_causal_longlive": {"init_critic": True, "stream": Stream(240, 3, 1.0, 19)}}
VARIANTS |= {"lora_salt": "lora,salt", "causvid_salt": "causvid,salt"}


def of_today(name):
    """Its name and options now."""
    stem, _, variant = name.partition(":")
    if stem in OPTIONS:
        return stem, None
    size, short = stem.removesuffix(".py").split("_", 1)
    short = short.removeprefix("causal_") if size == "wan" else short
    before = {"i2v": "i2v", "dmd4": "dmd4", "dmd8": "dmd8"}.get(short, "")
    options = ",".join(filter(None, [size, before, VARIANTS.get(variant, variant)]))
    file = FILES.get(short, short)
    if size == "wan" and "salt" in options and file != "ode_regression":
        options += ",paper"  # there was one reading, now the authors' is the default
    return file, None if None in OPTIONS[file] else options


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_0_1_is_the_recipe_of_today(name):
    before, stem = from_json(json.dumps(CONFIGS[name])), name.partition(":")[0]
    now = replace(before, **CHANGED.get(stem.removesuffix(".py"), {}))
    assert now == read_recipe(get_config(*of_today(name)))


def test_every_config_of_0_1_is_there_and_none_is_another():
    assert len({of_today(name) for name in CONFIGS}) == len(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_workdir_of_0_1_goes_on(name, tmp_path):
    run = unpack(name, tmp_path)
    unpack("data", tmp_path)
    train(name, tmp_path, 3)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    succeed(
        "sample", f"--workdir={run}", "--step=2", "--num_steps=2", "--prompt=A cat", "--count=1"
    )
    assert len(frames(run / "samples" / "2_000.mp4")[0]) == 9


@pytest.mark.slow
def test_an_export_of_0_1_is_what_its_workdir_holds_and_is_read(tmp_path):
    unpack("data", tmp_path)
    run, (stored,) = unpack("wan", tmp_path), unpack("exported", tmp_path).glob("*.safetensors")
    succeed("convert_wan", "--to=official", f"--src={run}", f"--dst={tmp_path / 'again'}")
    (again,) = (tmp_path / "again").glob("*.safetensors")
    wanted, found = load_file(stored), load_file(again)
    assert wanted.keys() == found.keys() and len(wanted) > 50
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value)
    shutil.rmtree(tmp_path / "again")
    succeed("convert_wan", f"--src={stored.parent}", f"--dst={tmp_path / 'again'}")
    assert (tmp_path / "again").is_dir()
