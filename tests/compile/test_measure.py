"""What is told of one program: its memory, or in one sentence why there is none; and the programs
of a recipe.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import longlive, ode_regression, sc_dmd, self_forcing, teacher
from salt_jax.compile.measure import bytes_given, compile_program, memory_row, refusal
from salt_jax.compile.programs import Program, parts
from salt_jax.config.reading import read_recipe
from salt_jax.sharding import make_mesh
from salt_jax.stages import make_stage

PARTS = ("student", "critic", "teacher", "stream", "vae", "text")


def account(argument, output, temp, alias, **more):
    sizes = dict(argument=argument, output=output, temp=temp, alias=alias, generated_code=7)
    return SimpleNamespace(
        **{f"{name}_size_in_bytes": size for name, size in sizes.items()}, **more
    )


@pytest.mark.parametrize(
    ("platform", "more", "peak"),
    [
        ("gpu", {"peak_memory_in_bytes": 3}, 100 + 20 + 50 - 10),
        ("cpu", {"peak_memory_in_bytes": 3}, 100 + 20 + 50 - 10),
        ("tpu", {"peak_memory_in_bytes": 155}, 155),
        ("tpu", {"peak_memory_in_bytes": 155, "total_allocation_bytes": 156}, 156),
    ],
)
def test_the_peak_is_the_compilers_where_it_is_whole(platform, more, peak):
    row = memory_row(account(100, 20, 50, 10, **more), platform)
    assert row["peak_bytes"] == peak and ("own" in row["peak_is"]) == (peak < 160)
    assert (
        row["argument_bytes"],
        row["output_bytes"],
        row["temporary_bytes"],
        row["alias_bytes"],
    ) == (*(100, 20, 50, 10),)


def test_a_small_program_is_measured_and_a_device_may_be_too_small(tmp_path):
    mesh = make_mesh(dict(data=1, fsdp=-1, context=1, tensor=1))
    x = jax.ShapeDtypeStruct((1024, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    program = Program(jax.jit(lambda x: x * 2, donate_argnums=0), (x,))
    row = compile_program(program, "cpu", None, tmp_path)
    assert row["problem"] is None and row["share"] is None and row["memory_bytes"] is None
    assert row["argument_bytes"] == row["alias_bytes"] == row["output_bytes"] == 1024 * 8 * 4 // 8
    assert row["peak_bytes"] == 4096 + row["temporary_bytes"] and row["compile_seconds"] > 0
    fits = lambda platform, memory: (
        compile_program(program, platform, memory, tmp_path)["problem"] is None
    )
    peak = row["peak_bytes"]
    assert fits("gpu", round(peak / 0.89)) and not fits(
        "gpu", round(peak / 0.91)
    )  # 0.9 of a GPU, all of a TPU
    assert fits("tpu", 1 << 40)
    told = compile_program(program, "gpu", 2**12, tmp_path)["problem"]
    assert told == "does not fit: 0.00 GiB at its peak, 0.00 GiB may be filled"


def test_what_does_not_trace_is_told(tmp_path):
    program = Program(
        jax.jit(lambda x: x @ jnp.ones(3)), (jax.ShapeDtypeStruct((2,), jnp.float32),)
    )
    told = compile_program(program, "cpu", None, tmp_path)["problem"]
    assert told.startswith(
        "does not compile: TypeError: dot_general requires contracting dimensions"
    )
    assert "\n" not in told


@pytest.mark.parametrize(
    "told",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO "
        "temporaries (98.06G) exceeds available HBM (95.73G). HLO module: jit_f.\nSee "
        "https://openxla.org",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 98.06G of 95.73G hbm. "
        "Exceeded by 2.33G.",
    ],
)
def test_what_a_tpu_refuses_is_one_sentence(told, tmp_path):
    row = refusal(RuntimeError(told), tmp_path)
    assert row["problem"] == "does not fit: 98.06 GiB at its peak, 95.73 GiB may be filled"
    assert row["peak_bytes"] == round(98.06 * 2**30) and row["share"] == pytest.approx(
        98.06 / 95.73
    )


def names(config, part):
    return set(parts(make_stage(read_recipe(config)), part))


def test_a_recipe_has_the_programs_that_its_run_needs():
    ode = ode_regression.get_config("wan")
    assert [names(ode, part) for part in PARTS[:3]] == [{"student step"}, set(), {"trajectories"}]
    assert names(ode, "stream") == {"stream: read text", "stream: chunk of 3", "stream: new prompt"}
    assert names(ode, "vae") == {
        "VAE decode: first frame",
        "VAE decode: 2 more",
        "VAE decode: 3 more",
    }
    whole = sc_dmd.get_config("wan,i2v")
    assert names(whole, "student") == {"student step + self_consistency"} and not names(
        whole, "stream"
    )
    assert names(whole, "vae") == {"VAE decode: first frame", "VAE decode: 20 more"}
    ways, terms = ("", " + on"), ("", " + self_consistency", " + alignment")
    long = longlive.get_config("wan,salt")
    assert names(long, "student") == {f"student step{term}{way}" for term in terms for way in ways}
    assert names(long, "critic") == {f"critic step{way}" for way in ways}
    shapes = sc_dmd.get_config()
    assert not names(shapes, "vae") and names(shapes, "text") == {"text encoder"}
    assert not names(teacher.get_config(), "teacher")  # it is the one that is made


@pytest.mark.parametrize(
    "config", [teacher, sc_dmd, self_forcing, ode_regression], ids=lambda module: module.__name__
)
def test_programs_of_small_runs_lower(config):
    mesh = make_mesh(dict(data=2, fsdp=4, context=1, tensor=1))
    stage = make_stage(read_recipe(config.get_config()), mesh)
    for part in PARTS:
        for make in parts(stage, part).values():
            program = make()
            program.jitted.lower(*program.args)


def test_what_a_program_does_not_read_waits_beside_it(tmp_path):
    """Arrays on the device count whole, by their share; what waits in the host's memory does
    not.
    """
    mesh = make_mesh(dict(data=1, fsdp=-1, context=1, tensor=1))
    on = lambda rows, **more: jax.ShapeDtypeStruct(
        (rows, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"), **more)
    )
    args = {"read": on(1024), "not read": on(2048)}
    host = {"host": on(4096, memory_kind="pinned_host")}
    double = jax.jit(lambda tree: tree["read"] * 2)
    row = compile_program(Program(double, (args,)), "cpu", None, tmp_path)
    assert (row["argument_bytes"], row["beside_bytes"]) == (4096, 8192)
    assert bytes_given(Program(double, (args | host, "a value", jax.random.key(0)))) == 4096 + 8192
    needed = row["peak_bytes"] + 8192
    problem = lambda memory: compile_program(Program(double, (args,)), "gpu", memory, tmp_path)[
        "problem"
    ]
    assert problem(round(needed / 0.89)) is None and problem(round(needed / 0.91)) is not None
