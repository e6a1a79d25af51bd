"""Programs for TPU, made by the real compiler on whatever machine this is. None of them runs."""

import pytest

from tests.compile.described import check_compiled, check_lowered, run

pytestmark = [pytest.mark.compile, pytest.mark.slow]


def test_every_wan_config_lowers_at_full_size(tmp_path):
    check_lowered(run("lower", "tpu:v5p:2x2x4", tmp_path), "tpu")


def test_two_layers_compile_and_keep_no_scores(tmp_path):
    check_compiled(run("compile", "tpu:v5p:2x2x1", tmp_path), 4, "splash_mha", "tpu")


def test_the_peak_is_what_a_tpu_refuses_by(tmp_path):
    """Arguments stand among libtpu's temporaries: with both the first would not fit, and it
    does.
    """
    fits, refused = run("fill", "tpu:v5p:2x2x1", tmp_path)
    memory = fits["memory_bytes"]
    assert fits["problem"] is None and fits["peak_bytes"] < memory
    assert fits["argument_bytes"] + fits["temporary_bytes"] > memory
    assert refused["problem"].startswith("does not fit: 98.0")
    assert refused["peak_bytes"] == pytest.approx(fits["peak_bytes"] * 14 / 13, rel=1e-3)
