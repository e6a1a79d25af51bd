#!/usr/bin/env bash
# The long world's teacher and causal start, from nothing: the teacher at high noise, then everywhere, then teacher
# forcing and consistency distillation. Run it again to go on from the newest checkpoints; a stage that is done is left
# as it is. Needs hours on two CPU cores.
#
#   bash launch/long_world.sh [DIR] [train options]     DIR defaults to runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
dir=${1:-runs}
shift || true
options=(--config.data.dir="$dir/data" "$@")

# train NAME CONFIG [train options]: to its end, and then as DIR/NAME.safetensors.
train() {
    local name=$1 config=configs/$2.py:long
    shift 2
    [ -f "$dir/$name.safetensors" ] && return
    python -m launch.train --config="$config" --workdir="$dir/$name" "$@" "${options[@]}"
    python -m launch.export --workdir="$dir/$name" --dst="$dir/$name.safetensors"
}

train long_teacher_1 teacher
train long_teacher teacher --config.weights="$dir/long_teacher_1.safetensors" --config.renoise.shift=4 \
    --config.iterations=6000 --config.student_optimizer.decay=True --config.student_optimizer.warmup=50
student=(--config.weights="$dir/long_teacher.safetensors")
train long_teacher_forcing teacher_forcing "${student[@]}"
train long_consistency consistency "${student[@]}" --config.init_from="$dir/long_teacher_forcing"
python -m launch.evaluate --workdir="$dir/long_teacher" --count=48
python -m launch.evaluate --workdir="$dir/long_consistency" --teacher_steps=0 --solvers=cm --count=48 \
    --memory=0:0:absolute,12:3:relative
