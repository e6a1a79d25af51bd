"""Programs for TPU, made by the real compiler on whatever machine this is. None of them runs."""

import pytest

from tests.compile.described import check_compiled, check_lowered, run

pytestmark = [pytest.mark.compile, pytest.mark.slow]


def test_every_wan_config_lowers_at_full_size(tmp_path):
    check_lowered(run("lower", "tpu:v5p:2x2x4", tmp_path))


def test_two_layers_compile_and_keep_no_scores(tmp_path):
    check_compiled(run("compile", "tpu:v5p:2x2x1", tmp_path), 4, "splash_mha")
