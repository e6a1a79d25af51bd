#!/usr/bin/env bash
# From nothing to videos: installs salt_jax into .venv, distils two 2-8 step students from the shipped teacher of
# Moving Shapes, one of whole clips and one that works chunk by chunk on a KV cache, samples and evaluates both. Run it
# again to go on where it stopped.
#
#   bash launch/quickstart.sh [WORKDIR]     WORKDIR defaults to runs/quickstart; the second student is in WORKDIR/causal
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
workdir=${1:-runs/quickstart}
peaks=$(mktemp)
second=
# The second student runs in a process group of its own, which an interrupt does not reach.
trap 'rm -f "$peaks"; [ -z "$second" ] || kill -- "-$second" 2>/dev/null || true' EXIT

# Runs a command; notes its peak memory where GNU time is installed.
measured() {
    echo "== $*"
    if /usr/bin/time -f %M true 2>/dev/null; then
        /usr/bin/time -f %M -a -o "$peaks" "$@"
    else
        "$@"
    fi
}

make_venv
if ! up_to_date runtime requirements.txt; then
    echo "== Installing requirements.txt (about a minute, once)"
    python -m pip install -q --upgrade "pip>=25.1" # shows how far an installation is
    python -m pip install --no-compile -r requirements.txt # what is imported is compiled then
    mark_installed runtime requirements.txt
fi

# Whole clips.
first_student() {
    measured python -m launch.train --config=configs/sc_dmd.py --workdir="$workdir"
    measured python -m launch.sample --workdir="$workdir" --num_steps=2,4,8
    measured python -m launch.evaluate --workdir="$workdir" --count=48
}

# Chunk by chunk, from the shipped causal start; half of the config's updates.
second_student() {
    measured python -m launch.train --config=configs/salt.py --workdir="$workdir/causal" \
        --config.iterations=30 --config.align.start=10
    measured python -m launch.sample --workdir="$workdir/causal" --num_steps=2,4,8
    measured python -m launch.evaluate --workdir="$workdir/causal" --teacher_steps=0 --solvers=cm --count=48
}

# Both at once: much of the time one core compiles.
log=$workdir/second_student.log
mkdir -p "$workdir"
set -m
(set -e; second_student) >"$log" 2>&1 &
second=$!
set +m
first_student
echo "== The second student (chunk by chunk), from $log"
tail -n +1 -f --pid="$second" "$log"
wait "$second"
second=

echo "== Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ -s "$peaks" ]; then
    echo "Peak memory of a process: $(($(sort -n "$peaks" | tail -1) / 1024)) MiB; two run at once"
fi
echo "Videos: $workdir/samples/, $workdir/causal/samples/"
echo "Reports: $workdir/report.html, $workdir/causal/report.html (open them in a browser)"
echo "Curves: $workdir holds TensorBoard event files"
