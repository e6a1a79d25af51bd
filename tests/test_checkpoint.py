"""What was saved comes back bit for bit, or not at all and with a reason."""

import gc
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salt_jax.checkpoint import open_checkpoints, restore, restore_params, save
from salt_jax.checkpoint_files import checkpoint_digest, make_writable, newest_step
from salt_jax.config.sections import Optimizer
from salt_jax.errors import UserError
from salt_jax.io.files import as_path, below
from salt_jax.models.kv_cache import KVCache
from salt_jax.optimizer import make_optimizer
from salt_jax.sharding import make_mesh, state_shardings
from salt_jax.state import Stream, apply_gradients, init_learner, init_state
from tests.helpers import same_bits

# Orbax abandons its other reads when one fails; Python reports those coroutines when it collects
# them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
)


def mesh_of(count):
    return make_mesh({"data": 1, "fsdp": count, "context": 1, "tensor": 1}, jax.devices()[:count])


def make(step=0, width=64, critic=True, tx=TX):
    """A state in which no two arrays are equal and some numbers are awkward: -0, subnormal, NaN."""

    def learner(seed):
        k_kernel, k_head, k_grad = jax.random.split(jax.random.key(seed), 3)
        params = {
            "blocks": {
                "self_attn": {"q": {"kernel": jax.random.normal(k_kernel, (2, width, width))}}
            },
            "head": {
                "kernel": jax.random.normal(k_head, (width, 4)),
                "bias": jnp.array([-0.0, 1e-40, 1.0]),
            },
        }
        grads = jax.tree.map(lambda x: jax.random.normal(k_grad, x.shape), params)
        moved = apply_gradients(init_learner(params, tx), grads, jnp.float32(0), tx)
        return moved.replace(skipped=jnp.int32(seed + 3), skipped_in_a_row=jnp.int32(seed + 1))

    learners = {"student": learner(10 * step)}
    state = init_state(learners | ({"critic": learner(10 * step + 1)} if critic else {}))
    ema = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan) * 0.5, state.ema)
    return state.replace(iteration=jnp.int32(step), ema=ema)


def on(mesh, make=make, **how):
    state = make(**how)
    return jax.device_put(state, state_shardings(mesh, state))


def abstract(mesh, make=make, **how):
    state = jax.eval_shape(lambda: make(**how))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(mesh, state),
    )


def meta_of(step):
    return {
        "config": json.dumps({"seed": step}),
        "mesh": {"data": 1, "fsdp": 1, "context": 1, "tensor": 1},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2, written from 8 devices. Tests that damage it take a copy."""
    workdir = tmp_path_factory.mktemp("saved")
    with open_checkpoints(workdir, keep=3) as manager:
        for step in (1, 2):
            save(manager, on(mesh_of(8), step=step), meta_of(step))
    yield workdir
    gc.collect()


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def largest_file(directory: Path) -> Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def test_nothing_saved_is_none(tmp_path):
    with open_checkpoints(tmp_path / "new" / "run", keep=1) as manager:
        assert restore(manager, abstract(mesh_of(1))) is None


@pytest.mark.parametrize("count", [8, 4, 1])
def test_round_trip_is_bit_exact_on_this_and_on_another_mesh(saved, count):
    wanted = abstract(mesh_of(count))
    with open_checkpoints(saved, keep=3) as manager:
        state, meta = restore(manager, wanted)
    same_bits(state, make(step=2))
    assert meta == meta_of(2)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding == like.sharding
    kernel = state.learners["student"].params["blocks"]["self_attn"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // count, 64)


def streaming(step=5, slots=6):
    """A state with videos under way: a cache, half of it in half precision, and prompts."""
    k_cache, k_text = jax.random.split(jax.random.key(step))
    kv = jax.random.normal(k_cache, (2, 8, slots, 4, 2, 4), jnp.bfloat16)
    x0, frames = kv[0].astype(jnp.float32), jnp.arange(slots, dtype=jnp.int32) + 3
    cache = KVCache(kv, -kv, x0, frames, jnp.int32(slots), jnp.int32(9))
    return make(step=step).replace(stream=Stream(cache, jax.random.normal(k_text, (8, 3, 5))))


def test_videos_under_way_come_back_bit_for_bit_on_this_and_on_another_mesh(tmp_path):
    with open_checkpoints(tmp_path, keep=1) as manager:
        save(manager, on(mesh_of(8), streaming), meta_of(5))
        manager.wait_until_finished()
        for count in (8, 1):
            state, _ = restore(manager, abstract(mesh_of(count), streaming))
            same_bits(state, streaming())
            assert state.stream.cache.k.addressable_shards[0].data.shape[1] == 8 // count
        with pytest.raises(
            UserError, match=r"stream/cache/end is int32\[\] there and absent in this"
        ):
            restore(manager, abstract(mesh_of(1), step=5))
        with pytest.raises(
            UserError, match=r"stream/cache/frames is int32\[6\] there and int32\[3\] in this"
        ):
            restore(manager, abstract(mesh_of(1), streaming, slots=3))
    # needs none of them
    same_bits(restore_params(tmp_path, "ema", mesh_of(1)), make(step=5).ema)


def test_a_step_whose_videos_under_way_are_lost_is_damaged(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        for step in (4, 5):
            save(manager, on(mesh_of(1), streaming, step=step), meta_of(step))
    (tmp_path / "checkpoints" / "5" / "stream" / "commit_success.txt").unlink()
    with open_checkpoints(tmp_path, keep=2) as manager:
        same_bits(restore(manager, abstract(mesh_of(1), streaming))[0], streaming(4))


def test_a_teacher_in_the_making_has_no_critic(tmp_path):
    with open_checkpoints(tmp_path, keep=1) as manager:
        save(manager, on(mesh_of(1), step=7, critic=False), meta_of(7))
        manager.wait_until_finished()
        state, _ = restore(manager, abstract(mesh_of(1), critic=False))
    same_bits(state, make(step=7, critic=False))


def test_what_is_saved_does_not_change_when_the_next_step_overwrites_the_donated_state(tmp_path):
    x = jnp.arange(2**21, dtype=jnp.float32)
    state = init_state({"student": init_learner({"w": x}, optax.sgd(0.1))})
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    with open_checkpoints(tmp_path, keep=1) as manager, jax.transfer_guard("disallow"):
        save(manager, state, meta_of(0))
        for _ in range(5):
            state = step(state)
    with open_checkpoints(tmp_path, keep=1) as manager:
        found, _ = restore(manager, shapes)
    np.testing.assert_array_equal(
        found.learners["student"].params["w"], np.arange(2**21, dtype=np.float32)
    )


def test_the_newest_few_are_kept_and_a_step_is_saved_once(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        for step in (1, 2, 3, 3):
            save(manager, on(mesh_of(1), step=step), meta_of(step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert not [path for path in tmp_path.rglob("*") if "teacher" in path.name]


@pytest.mark.parametrize(
    ("keep", "every", "left"), [(2, 3, "3 6 7 8"), (1, 4, "4 8"), (3, 0, "6 7 8")]
)
def test_every_so_many_updates_a_checkpoint_stays_beside_the_newest(tmp_path, keep, every, left):
    """Also when the run is started again in between, and without a deprecated option of Orbax."""
    state = init_state({"student": init_learner({"w": jnp.arange(3.0)}, optax.sgd(0.1))})
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for steps in (range(1, 5), range(5, 9)):
            with open_checkpoints(tmp_path, keep, every) as manager:
                for step in steps:
                    save(manager, state.replace(iteration=jnp.int32(step)), meta_of(step))
    assert " ".join(sorted(path.name for path in (tmp_path / "checkpoints").iterdir())) == left


@pytest.mark.parametrize(
    "damage",
    [
        *("array cut in half", "array empty", "array gone", "no commit", "item lost"),
        *("learner lost", "record lost"),
    ],
)
def test_a_damaged_step_is_named_set_aside_and_the_one_before_it_is_used(copy, caplog, damage):
    step, item = copy / "checkpoints" / "2", copy / "checkpoints" / "2" / "student"
    if damage == "no commit":
        (step / "commit_success.txt").unlink()
    elif damage == "item lost":
        shutil.rmtree(step / "ema")
    elif damage == "learner lost":  # and not another preset's
        shutil.rmtree(step / "critic")
        shutil.rmtree(step / "critic_opt")
    elif damage == "record lost":
        (step / "_CHECKPOINT_METADATA").unlink()
    else:
        path = largest_file(item)
        data = path.read_bytes()
        path.unlink()
        if damage != "array gone":
            path.write_bytes(data[: len(data) // 2] if damage == "array cut in half" else b"")
    with caplog.at_level(logging.WARNING), open_checkpoints(copy, keep=3) as manager:
        state, meta = restore(manager, abstract(mesh_of(8)))
        same_bits(state, make(step=1))
        assert meta == meta_of(1)
        told = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
        assert len(told) == 1 and "checkpoint step 2 in" in told[0] and "the one before" in told[0]
        # Training goes on from 1 and reaches 2 again: it has to be saved, and the broken one is not
        # lost.
        save(manager, on(mesh_of(8), step=2), meta_of(2))
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names[:2] == ["1", "2"] and re.fullmatch(r"2\.damaged\.\d+", names[2])
    with open_checkpoints(copy, keep=3) as manager:
        same_bits(restore(manager, abstract(mesh_of(8)))[0], make(step=2))


@pytest.mark.slow
@pytest.mark.parametrize("left", [0.5, 0.0, None])
def test_whatever_file_is_cut_or_lost_a_state_comes_back_whole_or_from_the_step_before(copy, left):
    others = ("student_opt", "ema", "critic", "critic_opt")  # the same format as "student"
    files = [
        path.relative_to(copy) for path in (copy / "checkpoints" / "2").rglob("*") if path.is_file()
    ]
    wanted, steps = abstract(mesh_of(1)), []
    for file in (file for file in files if not set(file.parts) & set(others)):
        shutil.copytree(copy / "checkpoints", copy / "trial" / "checkpoints")
        path = copy / "trial" / file
        data = path.read_bytes()
        path.unlink()
        if left is not None:
            path.write_bytes(data[: int(len(data) * left)])
        with open_checkpoints(copy / "trial", keep=3) as manager:
            state, meta = restore(manager, wanted)
        same_bits(state, make(step=int(state.iteration)))
        assert meta == meta_of(int(state.iteration))
        steps.append(int(state.iteration))
        shutil.rmtree(copy / "trial")
    assert set(steps) == {1, 2}  # some files are redundant, the others are noticed


def test_no_readable_step_is_an_error_and_never_a_fresh_start(copy):
    for step in ("1", "2"):
        path = largest_file(copy / "checkpoints" / step / "student_opt")
        path.write_bytes(path.read_bytes()[:100])
    before = sorted(path.name for path in (copy / "checkpoints").iterdir())
    with open_checkpoints(copy, keep=3) as manager, pytest.raises(UserError) as error:
        restore(manager, abstract(mesh_of(8)))
    told = str(error.value)
    assert "could be read" in told and "step 1" in told and "step 2" in told and "--workdir" in told
    assert (
        "\n" not in told
        and sorted(path.name for path in (copy / "checkpoints").iterdir()) == before
    )


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            {"width": 96},
            r"critic/blocks/self_attn/q/kernel is float32\[2, 64, 64\] there "
            r"and float32\[2, 96, 96\] in this",
        ),
        (
            {"critic": False},
            r"critic/blocks/self_attn/q/kernel is float32\[2, 64, 64\] there and absent in this",
        ),
        (
            {"tx": optax.sgd(0.1, momentum=0.9)},
            r"critic_opt/opt_state/0/trace/\S+ is absent there and float32",
        ),
    ],
)
def test_another_preset_or_optimizer_is_refused_by_name_and_nothing_is_touched(copy, how, told):
    before = sorted(copy.rglob("*"))
    with open_checkpoints(copy, keep=3) as manager, pytest.raises(UserError, match=told) as error:
        restore(manager, abstract(mesh_of(1), **how))
    assert "checkpoint step 2" in str(error.value) and "--workdir" in str(error.value)
    assert "\n" not in str(error.value) and sorted(copy.rglob("*")) == before


def test_a_first_moment_of_earlier_versions_is_left_where_it_is(tmp_path):
    """They kept it also where b1 is 0, where it is of no use."""
    how = dict(
        learning_rate=1e-2, warmup=0, decay=False, b2=0.999, eps=1e-8, weight_decay=0.1, clip=1.0
    )
    before = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.0, weight_decay=0.1))
    now = make_optimizer(Optimizer(b1=0.0, **how), 10)
    with open_checkpoints(tmp_path, keep=1) as manager:
        save(manager, on(mesh_of(8), step=2, tx=before), meta_of(2))
        manager.wait_until_finished()
        for mu in (tmp_path / "checkpoints" / "2").rglob("*mu*"):
            shutil.rmtree(mu)  # not read, so not missed
        state, _ = restore(manager, abstract(mesh_of(4), step=2, tx=now))
        same_bits(state, make(step=2, tx=now))
        with pytest.raises(UserError, match=r"opt_state/1/0/mu/\S+ is absent there and float32"):
            save(manager, on(mesh_of(8), step=3, tx=now), meta_of(3))
            manager.wait_until_finished()
            restore(manager, abstract(mesh_of(4), step=3, tx=before))


@pytest.mark.parametrize("what", ["ema", "student"])
def test_parameters_load_alone_and_nothing_is_written(copy, what):
    for item in ("student_opt", "critic", "critic_opt", "ema" if what == "student" else "student"):
        largest_file(copy / "checkpoints" / "2" / item).unlink()  # not read, so not missed
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    params = restore_params(copy, what, mesh_of(4))
    state = make(step=2)
    same_bits(params, state.ema if what == "ema" else state.learners["student"].params)
    assert params["blocks"]["self_attn"]["q"]["kernel"].addressable_shards[0].data.shape == (
        2,
        16,
        64,
    )
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_parameters_of_a_damaged_step_come_from_the_one_before(copy, caplog):
    path = largest_file(copy / "checkpoints" / "2" / "ema")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    same_bits(restore_params(copy, "ema", mesh_of(1)), make(step=1).ema)
    assert "checkpoint step 2" in caplog.text and (copy / "checkpoints" / "2").is_dir()


def test_a_step_that_is_named_is_read_or_refused(copy):
    for step in (1, 2):
        same_bits(
            restore_params(copy, "student", mesh_of(1), step),
            make(step=step).learners["student"].params,
        )
    with pytest.raises(
        UserError, match=r"no checkpoint of step 3 in \S+checkpoints; there are 2, 1$"
    ):
        restore_params(copy, "ema", mesh_of(1), 3)
    path = largest_file(copy / "checkpoints" / "2" / "ema")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"step 2 in .* is damaged \(.*choose another step \(1\)"
    ) as error:
        restore_params(copy, "ema", mesh_of(1), 2)
    assert "\n" not in str(error.value)
    for number in range(3, 15):
        (copy / "checkpoints" / str(number)).mkdir()
    with pytest.raises(UserError, match=r"there are 14, 13, .*, 5 \.\.\. and 4 more$"):
        restore_params(copy, "ema", mesh_of(1), 99)


def test_the_newest_step_is_the_newest_that_was_finished(copy, caplog):
    assert newest_step(copy) == 2
    (copy / "checkpoints" / "2" / "ema" / "commit_success.txt").unlink()
    (copy / "checkpoints" / "3.damaged.1").mkdir()
    assert newest_step(copy) == 1 and "checkpoint step 2" in caplog.text
    with pytest.raises(UserError, match=r"no whole checkpoint in .*absent"):
        newest_step(copy / "absent")


def test_the_digest_of_an_item_is_that_of_its_files(saved, copy):
    item, read = copy / "checkpoints" / "2" / "ema", []
    names = sorted(str(path.relative_to(item)) for path in item.rglob("*") if path.is_file())
    whole = "".join(
        f"{name}\0{hashlib.sha256((item / name).read_bytes()).hexdigest()}\0" for name in names
    )
    wanted = hashlib.sha256(whole.encode()).hexdigest()
    assert (
        checkpoint_digest(copy, 2, "ema", read.append)
        == wanted
        == checkpoint_digest(saved, 2, "ema")
    )
    assert sum(read) == sum((item / name).stat().st_size for name in names)
    others = {checkpoint_digest(copy, step, what) for step in (1, 2) for what in ("ema", "student")}
    path = largest_file(item)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert len(others | {checkpoint_digest(copy, 2, "ema")}) == 5
    with pytest.raises(UserError, match=r"there is no \S+checkpoints/9/ema"):
        checkpoint_digest(copy, 9, "ema")


def test_sampling_without_a_checkpoint_says_what_to_do(tmp_path):
    for workdir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            UserError, match=r"there is no checkpoint in .*train with this --workdir first"
        ):
            restore_params(workdir, "ema", mesh_of(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="POSIX paths")
def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("I am no directory")  # binds root too, unlike permissions
    with pytest.raises(
        UserError, match=r"cannot write to the workdir .*file/run \(.+\); pass a --workdir"
    ):
        make_writable(tmp_path / "file" / "run")


def test_a_process_that_dies_while_saving_leaves_the_step_before(tmp_path):
    program = f"""
        import os, jax, jax.numpy as jnp, optax
        from salt_jax.checkpoint import open_checkpoints, save
        from salt_jax.state import init_learner, init_state
        learner = init_learner({{"w": jnp.arange(2.0**23)}}, optax.sgd(0.1))
        state = init_state({{"student": learner}})
        manager = open_checkpoints({str(tmp_path)!r}, keep=3)
        save(manager, state.replace(iteration=jnp.int32(1)), {{}})
        manager.wait_until_finished()
        save(manager, jax.tree.map(lambda x: x + 2, state.replace(iteration=jnp.int32(0))), {{}})
        os._exit(9)
    """
    root = Path(__file__).parents[1]
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=120,
    )
    assert died.returncode == 9
    assert not (tmp_path / "checkpoints" / "2").exists(), (
        "the save was over before the process died"
    )
    shapes = jax.eval_shape(
        lambda: init_state({"student": init_learner({"w": jnp.zeros(2**23)}, optax.sgd(0.1))})
    )
    shardings = state_shardings(mesh_of(1), shapes)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    with open_checkpoints(tmp_path, keep=3) as manager:
        state, _ = restore(manager, shapes)
    assert int(state.iteration) == 1
    np.testing.assert_array_equal(
        state.learners["student"].params["w"], np.arange(2**23, dtype=np.float32)
    )


@pytest.mark.slow
def test_in_a_bucket_a_damaged_step_is_set_aside_and_the_one_before_it_is_used(bucket):
    make_writable(bucket)
    with open_checkpoints(bucket, keep=3) as manager:
        for step in (1, 2):
            save(manager, on(mesh_of(8), step=step), meta_of(step))
    assert newest_step(bucket) == 2
    item = as_path(bucket) / "checkpoints" / "2" / "student"
    for file in below(item):
        if file.name == "manifest.ocdbt":
            file.unlink()
    with open_checkpoints(bucket, keep=3) as manager:
        state, meta = restore(manager, abstract(mesh_of(4)))
    same_bits(state, make(step=1))
    assert meta == meta_of(1) and newest_step(bucket) == 1
    names = {path.name.partition(".")[0] for path in (as_path(bucket) / "checkpoints").iterdir()}
    assert names == {"1", "2"} and not item.exists()
    same_bits(restore_params(bucket, "ema", mesh_of(2)), make(step=1).ema)
    gc.collect()
