#!/usr/bin/env bash
# Every table of docs/scaling.md: compiles the programs of all Wan recipes for GPUs and TPUs that are not there, then those
# that tell what an iteration costs on up to 1,024 of them (launch.scaling_cost). Six to eleven hours on 2 CPU cores; run it
# again to go on where it stopped. What docs/scaling/ holds is not compiled again.
#
#   PYTHON=python3.12 bash launch/scaling.sh [--only=TEXT]     with TEXT in a row's name, those rows alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
    echo "docs/scaling.md is made with jax 0.12, which counts the memory that cuDNN needs; it needs Python 3.12 or" \
        "newer: PYTHON=python3.12 bash $0 in a checkout without .venv" >&2
    exit 1
}
if ! up_to_date scaling requirements.txt requirements-tpu.txt requirements-gpu-compile.txt; then
    python -m pip install -r requirements.txt
    python -m pip install --no-deps -r requirements-tpu.txt -r requirements-gpu-compile.txt # 3.5 GB
    mark_installed scaling requirements.txt requirements-tpu.txt requirements-gpu-compile.txt
fi
python -m launch.scaling "$@"
python -m launch.scaling_cost "$@"
