"""Configs, workdirs and an export of 0.1, kept in tests/frozen: later versions read them and go on
with them.

What is compared bit for bit is what does not depend on the machine: parameters that were stored and
are read. Whether training itself keeps its bits, `python -m tests.same_bits` asks on one machine.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax.config.schema import from_json, read_recipe
from tests.frozen.make import HERE, RUNS, train, unpack
from tests.launch.test_programs import frames, succeed
from tests.test_configs import CASES, load

CONFIGS = json.loads((HERE / "configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_0_1_is_the_recipe_of_today(name):
    path, variant = next(case.values for case in CASES if case.id == name)
    assert from_json(json.dumps(CONFIGS[name])) == read_recipe(load(path).get_config(*variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_workdir_of_0_1_goes_on(name, tmp_path):
    run = unpack(name, tmp_path)
    unpack("data", tmp_path)
    train(name, tmp_path, 3)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    succeed(
        "sample", f"--workdir={run}", "--step=2", "--num_updates=2", "--prompt=A cat", "--count=1"
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
