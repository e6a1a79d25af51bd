#!/usr/bin/env bash
# Every number of docs/results.md about students: methods, teachers and seeds, then the sweep. Hours on 2 CPU cores;
# run it again to go on where it stopped.
#
#   bash launch/results.sh [DIR] [train options]     DIR defaults to runs/results
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv
dir=${1:-runs/results}
shift || true

# run NAME CONFIG [options]: trains and evaluates DIR/NAME unless that is done.
run() {
    local work=$dir/$1 config=$2
    shift 2
    [ -f "$work/evaluation.json" ] && return
    python -m launch.train --config="configs/$config.py" --workdir="$work" --config.keep=1 "$@"
    python -m launch.evaluate --workdir="$work" --count=192 --teacher_updates=0 # the teacher is the same in all
}

for seed in 0 1 2; do
    for teacher in network closed_form; do
        for method in dmd4 dmd8 sc_dmd; do
            run "main/$teacher/$method/$seed" "shapes_$method" \
                --config.teacher.kind=$teacher --config.seed=$seed "$@"
        done
    done
done
for weight in 0.1 0.3 3 10; do # 0 is dmd8, 1 is sc_dmd, both above
    run "sweep/lambda $weight/0" shapes_sc_dmd --config.loss.self_consistency=$weight \
        --config.teacher.kind=closed_form "$@"
done
for stop in composed direct midpoint; do
    run "sweep/stop $stop/0" shapes_sc_dmd --config.loss.stop_gradient=$stop --config.teacher.kind=closed_form "$@"
done
python -m launch.tabulate --dir="$dir"
