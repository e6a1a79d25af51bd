#!/usr/bin/env bash
# Installs what the tests need into .venv, then lints, checks types and runs the tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]         the fast suite
#   bash launch/test.sh --all [PYTEST ARGUMENTS]   also the slow tests and the parity tests
#
# The parity tests need torch, which of salt_jax only launch.bench --peer loads. Its CPU build is installed where pip finds
# one. Where pip finds only the build with several GB of CUDA, PARITY=1 asks for that; without it the parity
# tests skip and say so. PYTHON=python3.12 chooses the interpreter that .venv is made with. COMPILE=1 fetches the
# compilers for TPU (0.7 GB) and GPU (2.8 GB) where pip finds them; tests marked `compile` skip without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

if [ "${1:-}" = --all ]; then
    shift
else
    set -- -m "not slow and not parity" "$@"
fi

make_venv
name=dev${PARITY:+-parity}
if ! up_to_date "$name" requirements.txt requirements-dev.txt; then
    echo "== Installing what the tests need (2 to 4 minutes, once)"
    # A second pip command cannot replace this torch, because requirements-dev.txt pins the same release.
    if [ -n "${PARITY:-}" ] || python -m pip install "torch==$(sed -n 's/^torch==//p' requirements-dev.txt)+cpu"; then
        python -m pip install -r requirements-dev.txt
    else
        echo "== No CPU build of torch for this Python: parity tests will skip (PARITY=1 installs any build)"
        python -m pip install -r requirements.txt -r <(grep -Ev '^(-r|torch==|peft==)' requirements-dev.txt)
    fi
    mark_installed "$name" requirements.txt requirements-dev.txt
fi

if [ -n "${COMPILE:-}" ] && ! up_to_date compile requirements-tpu.txt requirements-gpu-compile.txt; then
    echo "== Installing the compilers for TPU and GPU (3.5 GB)"
    if python -m pip install --no-deps -r requirements-tpu.txt -r requirements-gpu-compile.txt; then
        mark_installed compile requirements-tpu.txt requirements-gpu-compile.txt
    else
        echo "== They cannot be had here: tests of programs for TPU and GPU will skip"
    fi
fi

echo "== Lint"
ruff check
ruff format --check
echo "== Types"
basedpyright
echo "== Tests"
# One file stays in one process, so that it compiles its programs once. The longest begin first (tests/conftest.py); xdist
# by itself would begin with those of the most tests.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
