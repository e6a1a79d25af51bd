#!/usr/bin/env bash
# Everything that only an accelerator can tell, in ten minutes: kernels of attention, updates, streaming, memory, and
# diffusers beside ours. Writes runs/measure/measure.json and of it measure.md, a section for docs/results.md.
#
#   bash launch/measure.sh [--minutes=10] [--into=runs/measure] [--parts=TEXT]
#
# What is installed is used as it is: jax for the accelerator at hand, and where they are there torch, diffusers and
# tokamax. What is absent or fails is told in one sentence, and the rest goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
python -c 'import jax' 2>/dev/null || {
    echo "jax is not installed in .venv: pip install -r requirements.txt, and on a GPU pip install 'jax[cuda13]'" >&2
    exit 1
}
python -m launch.measure "$@"
