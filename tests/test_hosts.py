"""What processes agree on, with as many as a test plays; real ones are in
launch/test_processes.py.
"""

import threading

import jax
import numpy as np
import pytest
from orbax.checkpoint import multihost

from salt_jax import hosts
from salt_jax.errors import Stopped, UserError
from salt_jax.sharding import batch_sharding, local_rows, put, put_rows, replicated
from tests.helpers import mesh_of, without_type_checks


class Play:
    """Processes as threads, in place of what JAX and Orbax offer."""

    def __init__(self, count, monkeypatch, late=False):
        self.me, self.count = threading.local(), count
        self.meet, self.value, self.late = threading.Barrier(count), None, late
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self.me.index)
        monkeypatch.setattr(multihost, "get_barrier_sync_fn", lambda: self.barrier)
        monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", self.broadcast)
        monkeypatch.setattr(hosts.multihost_utils, "process_allgather", self.gather)
        self.every = [None] * count

    def barrier(self, key, timeout_ms):
        if self.late and self.me.index:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key} {timeout_ms}")
        if not self.late:
            self.meet.wait(10)

    def gather(self, x):
        self.every[self.me.index] = x
        self.meet.wait(10)
        every = np.stack(self.every)
        self.meet.wait(10)
        return every

    def broadcast(self, x, is_source):
        if is_source:
            self.value = x
        self.meet.wait(10)
        value = self.value
        assert value.shape == x.shape and value.dtype == x.dtype
        self.meet.wait(10)
        return value

    def run(self, work):
        """(index) -> what `work()` returned or raised in that process."""
        found = {}

        def process(index):
            self.me.index = index
            try:
                found[index] = work(index)
            except Exception as error:
                found[index] = str(error)

        threads = [threading.Thread(target=process, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return found


def test_the_first_alone_works_and_all_have_the_result(monkeypatch):
    made = []

    def work(index):
        return hosts.only_first(lambda: made.append(index) or {"ä": [1, None]}, "it")

    assert Play(3, monkeypatch).run(work) == {i: {"ä": [1, None]} for i in range(3)}
    assert made == [0]


def test_what_the_first_refuses_all_refuse(monkeypatch):
    def refuse():
        raise UserError("no such file; name another")

    found = Play(2, monkeypatch).run(lambda _: hosts.only_first(refuse, "it"))
    assert found == dict.fromkeys(range(2), "no such file; name another")


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("kind", [UserError, Stopped])
def test_what_one_refuses_all_refuse_and_then_go_on_in_step(monkeypatch, who, kind):
    def work(index):
        try:
            with hosts.agreed("it"):
                if index == who:
                    raise kind("no such file; name another")
        except kind as error:
            return [str(error), hosts.only_first(lambda: 7, "more")]

    wanted = ["no such file; name another", 7]
    assert Play(3, monkeypatch).run(work) == dict.fromkeys(range(3), wanted)


def test_where_one_fails_the_others_say_which_and_how(monkeypatch):
    def work(index):
        with hosts.agreed("it"):
            if index == 1:
                raise OSError("cut off\nhere")

    found = Play(3, monkeypatch).run(work)
    assert found[1] == "cut off\nhere"
    assert found[0] == found[2] == "process 1 has failed (OSError: cut off); see its output"


def test_work_is_shared_and_each_piece_done_once(monkeypatch):
    found = Play(3, monkeypatch).run(lambda _: hosts.share([0, 1, 2, 3, 4, 5, 6]))
    assert found == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}


def test_who_waits_too_long_says_for_whom(monkeypatch):
    play = Play(2, monkeypatch, late=True)
    play.meet = threading.Barrier(1)
    found = play.run(lambda _: hosts.only_first(lambda: 1, "the data set in D", limit=7.0))
    assert found[1].startswith("process 1 waited 7 s for the others (the data set in D)")


def test_the_others_come_after_the_first(monkeypatch):
    order = []

    def work(index):
        return hosts.first_then_others(lambda: order.append(index) or index, "it")

    assert Play(3, monkeypatch).run(work) == {0: 0, 1: 1, 2: 2}
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_with_one_process_a_vote_is_known_at_once():
    votes = hosts.Votes(mesh_of(fsdp=4))
    assert votes(True, False) == [True, False] and votes(False, False) == [False, False]


def test_of_several_processes_a_vote_is_known_an_iteration_later(monkeypatch):
    votes = hosts.Votes(mesh_of(data=2, fsdp=4))
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # and all devices are ours
    assert votes(True, False) == [False, False]
    assert votes(False, True) == [True, False]
    assert votes(False, False) == [False, True]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2}, {}])
def test_rows_go_to_the_devices_that_hold_them(sizes):
    where = batch_sharding(mesh_of(**sizes))
    rows = local_rows(where, 8)
    np.testing.assert_array_equal(rows, np.arange(8))  # all devices are ours
    whole = np.arange(24.0).reshape(8, 3)
    placed = put_rows(whole, rows, 8, where)
    assert placed.sharding == where
    np.testing.assert_array_equal(placed, whole)


class Half:
    """The sharding as a process sees it that has only some of the devices."""

    def __init__(self, where, devices):
        self.where, self.devices = where, devices

    def addressable_devices_indices_map(self, shape):
        every = self.where.devices_indices_map(shape)
        return {device: every[device] for device in self.devices}


@pytest.mark.parametrize(
    "sizes, first, second",
    [
        ({"data": 2, "fsdp": 2}, [0, 1, 2, 3], [4, 5, 6, 7]),
        ({"fsdp": 2, "tensor": 2}, [0, 1, 2, 3], [4, 5, 6, 7]),
        ({"tensor": 4}, range(8), range(8)),  # both feed the whole batch
        ({"context": 2, "tensor": 2}, range(8), range(8)),
    ],
)
def test_what_a_process_feeds_follows_from_where_the_batch_lies(sizes, first, second):
    where, devices = batch_sharding(mesh_of(**sizes)), jax.devices()[:4]
    for mine, rows in ((devices[:2], first), (devices[2:], second)):
        with without_type_checks():
            np.testing.assert_array_equal(local_rows(Half(where, mine), 8), list(rows))


def test_what_lies_where_it_should_is_not_copied():
    where = replicated(mesh_of(data=2))
    placed = put({"a": np.arange(3)}, where)
    assert put(placed, where)["a"] is placed["a"]
    np.testing.assert_array_equal(placed["a"], np.arange(3))
