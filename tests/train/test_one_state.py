"""A start and a resumption hold one state on the devices, and what is frozen: no second copy, not
even for a moment.
"""

import sys
import threading
import time

import jax
import pytest

from configs import base
from salt_jax.checkpoint import open_checkpoints, save
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.sharding import make_mesh
from salt_jax.stages import make_stage
from salt_jax.train import loop
from salt_jax.train.setup import setup

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# What the student starts from is frozen, as its own teacher; or it is of no more use once there is
# a state.
TEACHERS = {
    "itself": {},
    "another": {"teacher.kind": "closed_form", "world.starts": (2.0,), "world.speeds": (1.0,)},
}


def held(tree):
    """{address: bytes} of all buffers, on all devices."""
    shards = [
        s.data for x in jax.tree.leaves(tree) if not x.is_deleted() for s in x.addressable_shards
    ]
    return {s.unsafe_buffer_pointer(): s.nbytes for s in shards}


def live():
    return sum(held(jax.live_arrays()).values())


class Watch(threading.Thread):
    """The most that was held at any time, looked at all the time."""

    peak, over = 0, False

    def run(self):
        while not self.over:
            try:
                self.peak = max(self.peak, live())
            except (RuntimeError, ValueError):  # an array went away while it was looked at
                continue
            time.sleep(1e-3)


class Reached(Exception):
    pass


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("resumed", [False, True], ids=["start", "resume"])
def test_there_is_one_state(tmp_path, monkeypatch, teacher, resumed):
    config = base.get_config()
    config.update_from_flattened_dict(TEACHERS[teacher] | {"data.dir": str(tmp_path / "data")})
    recipe = read_recipe(config)
    if resumed:
        mesh = make_mesh({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
        parts = setup(make_stage(recipe, mesh))
        with open_checkpoints(tmp_path, 1) as manager:
            save(manager, parts.fresh(), {"config": to_json(recipe)})
        del parts
    found = {}

    def make_run(parts, start, workdir, files_may_move):
        (state,) = (f.f_locals["state"] for f in [sys._getframe(1)])
        sizes = [sum(held(tree).values()) for tree in (state, parts.frozen)]
        found.update(state=sizes[0], both=sum(sizes), live=live() - before)
        raise Reached

    monkeypatch.setattr(loop, "make_run", make_run)
    before, watch = live(), Watch()
    watch.start()
    with pytest.raises(Reached):
        loop.train(recipe, tmp_path)
    watch.over = True
    watch.join()
    assert found["live"] <= 1.05 * found["both"]
    assert watch.peak - before <= 1.1 * found["both"]
