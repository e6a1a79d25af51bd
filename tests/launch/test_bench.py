"""python -m launch.bench at the smallest size: what it says is whole and counted right.

No time is judged.
"""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import longlive, self_forcing
from salt_jax.config.reading import read_recipe
from salt_jax.models import vae
from salt_jax.planning import bench, bench_attention, flops
from salt_jax.planning.memory import fresh_state
from salt_jax.planning.random_params import random_params
from salt_jax.planning.updates import programs, update_name
from salt_jax.rollout.draws import Terms
from salt_jax.stages import make_stage
from salt_jax.stages.networks import runs_flash
from tests.helpers import shapes_of
from tests.launch.programs import program

SIZE = ["--preset=wan2.1-t2v-tiny", "--frames=3", "--height=4", "--width=4", "--vae=tiny"]
PARTS = [
    "matmul",
    "teacher forward",
    "student step",
    "critic step",
    "text encoder",
    "streaming",
    "VAE encode",
]


def run(*args):
    return program("bench", *args)


def tiny():
    config = self_forcing.get_config("wan")
    config.model.preset, config.text_encoder, config.data.clip = (
        "wan2.1-t2v-tiny",
        "wan-tiny",
        (3, 4, 4),
    )
    config.teacher.preset = config.teacher.weights = config.weights = ""
    config.batch_size = 1
    return read_recipe(config)


@pytest.mark.slow
def test_all_parts_are_measured_and_told(tmp_path):
    done = run(*SIZE, "--runs=2", f"--json={tmp_path / 'bench.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "bench.json").read_text())
    parts = {row["part"]: row for row in told["results"]}
    assert list(parts) == [*PARTS, "VAE decode"]
    for name, row in parts.items():
        assert name in done.stdout
        rate = row["flops"] / row["seconds"]
        assert (
            row["tflops_per_second"] == pytest.approx(rate / 1e12) and row["compile_seconds"] >= 0
        )
        best = parts["matmul"]["flops"] / parts["matmul"]["seconds"]
        assert math.isfinite(row["of_matmul"]) and row["of_matmul"] == pytest.approx(rate / best)
        assert len(row["every"]) == 2 and min(row["every"]) <= row["seconds"] <= max(row["every"])
        assert row["xla_bytes"] is None if name == "streaming" else row["xla_bytes"] > 0
    assert set(told) == {
        *("command", "commit", "device", "devices", "host", "versions", "peak_bytes", "results")
    }
    assert "--frames=3" in told["command"] and told["versions"]["jax"] == jax.__version__

    r = tiny()
    stage = make_stage(r)
    steps = {update_name(update): (update, draw) for update, draw in programs(stage).items()}
    assert list(steps) == ["student step", "critic step"]
    for name, (update, draw) in steps.items():
        counted = flops.update_flops(r, stage.passes(update, draw), runs_flash(r, "cpu"))
        assert parts[name]["flops"] == sum(counted.values())
        assert parts[name]["more"]["evaluations_per_chunk"] == draw.exit_step + 2
    config, params = (vae.PRESETS["tiny"], shapes_of(vae.PRESETS["tiny"], vae.init_vae))
    decode = lambda p, z: vae.decode_video(p, z, config, jnp.bfloat16)
    latents = jax.ShapeDtypeStruct((1, 3, 4, 4, 16), jnp.float32)
    assert parts["VAE decode"]["flops"] == flops.traced_flops(decode, params, latents)
    stream = parts["streaming"]["more"]
    assert stream["frames"] == 9 and stream["num_steps"] == 4
    both = stream["transformer_seconds"] + stream["vae_seconds"]
    # the median of two runs is their mean
    assert both == pytest.approx(parts["streaming"]["seconds"])
    assert stream["first_chunk_seconds"] == pytest.approx(both + parts["text encoder"]["seconds"])


@pytest.mark.slow
def test_a_stage_without_a_critic_has_a_step_of_the_student_alone(tmp_path):
    args = (*SIZE, "--config=configs/consistency.py:wan", "--what=student_step,critic_step")
    done = run(*args, "--runs=1", f"--json={tmp_path / 'bench.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [row["part"] for row in rows] == ["matmul", "student step"]
    assert rows[1]["flops"] > 0 and rows[1]["xla_bytes"] > 0


@pytest.mark.slow
def test_what_cannot_be_measured_is_named():
    done = run(*SIZE[:1], "--frames=4")
    assert done.returncode == 2 and "4 latent frames do not split" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_donated_comes_back_for_the_next_run():
    step = jax.jit(lambda state, x: (state + x, x.sum()), donate_argnums=0)
    found = bench.measure("sum", step, (jnp.zeros(3), jnp.ones(3)), 6.0, 3, size=3)
    assert (
        found.part == "sum"
        and found.flops == 6.0
        and len(found.every) == 3
        and found.more == {"size": 3}
    )
    # Two arguments and two results of 12, 12 and 4 bytes, of which the state is both; with
    # temporaries more.
    assert found.xla_bytes is not None and found.xla_bytes >= 28


def test_chunks_are_timed_without_the_time_of_those_who_take_them(monkeypatch):
    clock = iter(
        [0.0, 2.0, 10.0, 13.0, 20.0, 21.0]
    )  # 2 for the first, 8 elsewhere, 3 for the second, 7 elsewhere
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    seconds = []
    assert list(bench._clocked("ab", seconds)) == ["a", "b"]
    assert seconds == [2.0, 3.0]


def test_random_weights_have_the_form_that_is_asked():
    r = tiny()
    shapes = bench.shapes_of(bench.init_wan, r.wan)
    params = random_params(shapes, jnp.bfloat16, 0)
    chex.assert_trees_all_equal_shapes(params, shapes)
    leaves = jax.tree.leaves(params)
    assert {x.dtype for x in leaves} == {jnp.dtype(jnp.bfloat16)} and all(x.any() for x in leaves)


def test_no_two_arrays_of_random_weights_are_alike():
    shapes, _ = jax.eval_shape(lambda: fresh_state(make_stage(tiny())))
    state = random_params(shapes, None, 0)
    student = state.learners["student"]
    to = student.params["blocks"]["self_attn"]
    assert not np.array_equal(to["q"]["kernel"], to["k"]["kernel"])
    assert np.std(to["q"]["kernel"]) == pytest.approx(48**-0.5, rel=0.1)
    assert np.mean(student.params["blocks"]["norm_cross"]["scale"]) == pytest.approx(1, abs=0.1)
    assert not any(x.any() for x in jax.tree.leaves(student.opt_state))


def test_every_program_of_a_run_is_found():
    found = programs(make_stage(read_recipe(self_forcing.get_config("wan,salt"))))
    of = lambda learner: {update.terms for update in found if update.moves == learner}
    assert of("student") == {Terms(), Terms(self_consistency=True), Terms(alignment=True)}
    assert of("critic") == {Terms()}
    assert all(draw is not None for draw in found.values())


@pytest.mark.parametrize("seed", range(4))
def test_so_are_those_that_few_calls_ask_for(seed):
    """Self-consistency at the start of a video is asked for in one of 37 updates of the student."""
    config = longlive.get_config("wan,salt")
    config.seed = seed
    stage = make_stage(read_recipe(config))
    found = {update_name(update) for update in programs(stage)}
    terms, ways = ("", " + self_consistency", " + alignment"), ("", " + on")
    assert found == {f"student step{term}{way}" for term in terms for way in ways} | {
        f"critic step{way}" for way in ways
    }


@pytest.mark.slow
@pytest.mark.parity
def test_beside_diffusers_the_numbers_agree_and_ratios_are_told(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    size = (*SIZE[:1], "--frames=6", *SIZE[2:], "--config.model.dtype=float32")
    options = ("--peer=diffusers", "--runs=3", "--config.model.remat=none", "--vae=tiny")
    done = run(*size, *options, f"--json={tmp_path / 'bench.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["part"]: row for row in told["results"]}
    assert list(rows) == ["forward", "gradient", "rollout", "decode"]
    for name, row in rows.items():
        assert name in done.stdout
        mine = [who for who in row["seconds"] if who.startswith("ours")]
        assert len(mine) == (2 if name == "gradient" else 1)
        for who in mine:
            assert row["distance"][who] < 1e-4  # float32 sums in another order
            low, middle, high = row["ratios"][who]["diffusers"]
            assert 0 < low <= middle <= high
        assert all(len(taken) == 3 for taken in row["seconds"].values())
    assert told["dtype"] == "float32" and "torch" in told["versions"]


def test_flags_of_a_peer_are_for_it_alone():
    done = run("--compile")
    assert done.returncode == 2 and "--compile is for ours beside a peer" in done.stderr
    done = run("--peer=diffusers", "--what=streaming")
    assert done.returncode == 2 and "parts other than forward, gradient" in done.stderr
    done = run("--peer=diffusers", "--matmul=64")
    assert done.returncode == 2 and "--matmul is for parts of ours alone" in done.stderr


def test_a_kernel_is_timed_in_the_shapes_of_the_student():
    config = tiny()
    rows = list(bench_attention.attention_kernel(config, "blocks", 1))
    assert [row.part for row in rows] == [
        f"blocks {size}{what}" for size in ["12 x 12"] * 3 for what in ("", ", gradient")
    ]
    dim, tokens = config.wan.dim, 12
    assert [row.flops for row in rows[:2]] == [4 * dim * tokens**2, 14 * dim * tokens**2]


def test_a_plain_kernel_stays_within_the_device(monkeypatch):
    config = tiny()
    scores = 4 * config.wan.num_heads * 12**2
    for memory, count in ((2 * scores, 6), (2 * scores - 1, 0)):
        monkeypatch.setattr(bench_attention, "_memory", lambda memory=memory: memory)
        assert len(list(bench_attention.attention_kernel(config, "plain", 1))) == count
