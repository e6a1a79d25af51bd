"""Programs for NVIDIA GPUs, made by the real compiler on whatever machine this is.

None of them runs.
"""

import pytest

from tests.compile.described import check_compiled, check_lowered, run

pytestmark = [pytest.mark.compile, pytest.mark.slow]


def test_every_wan_config_lowers_at_full_size(tmp_path):
    check_lowered(run("lower", "gpu:h100:2x8", tmp_path), "gpu")


def test_two_layers_compile_and_keep_no_scores(tmp_path):
    check_compiled(run("compile", "gpu:h100:8", tmp_path), 8, "__cudnn$fmha", "gpu")
