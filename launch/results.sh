#!/usr/bin/env bash
# Every number of docs/results.md about students: the sweep of lambda_SC and stop-gradient over training length, then
# methods, teachers and seeds, then the students that work chunk by chunk. Two hours on 2 CPU cores in two parts; run it
# again to go on where it stopped. ONLY=whole or ONLY=causal does one half.
#
#   bash launch/results.sh [DIR] [train options]     DIR defaults to runs/results
#
#   PART=1/2 taskset -c 0 bash launch/results.sh & PART=2/2 taskset -c 1 bash launch/results.sh     both halves at once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
dir=${1:-runs/results}
shift || true
part=${PART:-1/1}
count=0
options=("$@")
evaluate=()

# mine: whether the next piece of work belongs to this process.
mine() {
    count=$((count + 1))
    [ $((count % ${part#*/})) -eq $((${part%/*} - 1)) ]
}

# run WORKDIR CONFIG[:VARIANT] [train options]: trains and evaluates, unless that is done.
run() {
    local work=$1 config=configs/${2/:/.py:}
    [[ $config == *.py:* ]] || config=$config.py
    shift 2
    [ -f "$work/evaluation.json" ] && return
    python -m launch.train --config="$config" --workdir="$work" --config.keep=1 "$@" "${options[@]}"
    python -m launch.evaluate --workdir="$work" --teacher_updates=0 "${evaluate[@]}" # the teacher is the same in all
}

# sweep NAME [train options]: one student, measured after 30, 60 and 120 updates.
sweep() {
    local name=$1 updates before=
    shift
    mine || return 0
    for updates in 30 60 120; do
        local work="$dir/sweep/$updates/$name/0"
        if [ -n "$before" ] && [ ! -d "$work" ]; then
            rm -rf "$dir/copy $name" && mkdir -p "$dir/copy $name" "${work%/0}"
            cp -r "$before/checkpoints" "$before/config.json" "$dir/copy $name"
            mv "$dir/copy $name" "$work"
        fi
        run "$work" shapes_sc_dmd --config.updates=$updates "$@"
        before=$work
    done
}

# Students of whole clips.
whole() {
    local weight stop seed teacher method
    for weight in 0 0.1 0.3 1 3 10; do
        sweep "lambda $weight" --config.loss.self_consistency=$weight --config.loss.stop_gradient=none
    done
    for stop in composed direct midpoint; do
        sweep "stop $stop" --config.loss.self_consistency=1 --config.loss.stop_gradient=$stop
    done
    # Network, seed 0: dmd8 and sc_dmd are two of the sweep's students again, never stopped at 30: their numbers must agree.
    for seed in 0 1 2; do
        for teacher in network closed_form; do
            for method in dmd4 dmd8 sc_dmd; do
                mine || continue
                run "$dir/main/$teacher/$method/$seed" "shapes_$method" \
                    --config.teacher.kind=$teacher --config.seed=$seed
            done
        done
    done
    # Where every student starts: the teacher's own network, without guidance, in few updates.
    if mine; then
        run "$dir/main/network/undistilled/0" shapes_dmd8 --config.updates=1 \
            --config.student_optimizer.learning_rate=0
    fi
}

# Students that work chunk by chunk: the rows of the paper's Tab. 5, from one causal start.
causal() {
    local seed row start=$dir/causal
    evaluate=(--solvers=cm)
    if [ "${part%/*}" = 1 ]; then
        run "$start/stages/teacher_forcing/0" shapes_teacher_forcing
        run "$start/stages/consistency/0" shapes_consistency --config.init_from="$start/stages/teacher_forcing/0"
    fi
    until [ -f "$start/stages/consistency/0/evaluation.json" ]; do sleep 10; done
    for seed in 0 1 2; do
        for row in plain naive mixed mixed_sc salt; do
            mine || continue
            evaluate=(--solvers=cm)
            case $row in plain | salt) evaluate+=(--memory=0:0:absolute,6:0:absolute,9:3:absolute,6:1:relative) ;; esac
            run "$start/main/$row/$seed" "shapes_self_forcing:$row" \
                --config.init_from="$start/stages/consistency/0" --config.seed=$seed
        done
    done
}

[ "${ONLY:-whole}" != whole ] || whole
[ "${ONLY:-causal}" != causal ] || causal
[ "$part" != 1/1 ] || python -m launch.tabulate --dir="$dir"
