#!/usr/bin/env bash
# Every number of docs/results.md about students: the sweep of lambda_SC and stop-gradient over training length, then
# methods, teachers and seeds, then the students that work chunk by chunk, then each other recipe once. Two and a half
# hours on 2 CPU cores in two parts; run it again to go on where it stopped. ONLY=whole, causal, recipes, readings,
# switches or memories does one of the six; the third needs the second, the last the fourth.
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
    python -m launch.evaluate --workdir="$work" --teacher_steps=0 "${evaluate[@]}" # the teacher is the same in all
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
        run "$work" sc_dmd --config.iterations=$updates "$@"
        before=$work
    done
}

# Students of whole clips.
whole() {
    local weight stop seed teacher config
    for weight in 0 0.1 0.3 1 3 10; do
        sweep "lambda $weight" --config.loss.self_consistency=$weight --config.loss.stop_gradient=none
    done
    for stop in composed direct midpoint; do
        sweep "stop $stop" --config.loss.self_consistency=1 --config.loss.stop_gradient=$stop
    done
    # Network, seed 0: dmd8 and sc_dmd are two of the sweep's students again, never stopped at 30: their numbers must agree.
    for seed in 0 1 2; do
        for teacher in network closed_form; do
            for config in sc_dmd:dmd4 sc_dmd:dmd8 sc_dmd; do
                mine || continue
                run "$dir/main/$teacher/${config#*:}/$seed" $config \
                    --config.teacher.kind=$teacher --config.seed=$seed
            done
        done
    done
    for seed in 0 1 2; do
        mine || continue
        run "$dir/main/network/shortcut/$seed" shortcut --config.seed=$seed
    done
    # Where every student starts: the teacher's own network, without guidance, in few steps.
    if mine; then
        run "$dir/main/network/undistilled/0" sc_dmd:dmd8 --config.iterations=1 \
            --config.student_optimizer.learning_rate=0
    fi
}

# Students that work chunk by chunk: the rows of the paper's Tab. 5, from one causal start.
causal() {
    local seed row start=$dir/causal
    evaluate=(--solvers=cm)
    if [ "${part%/*}" = 1 ]; then
        run "$start/stages/teacher_forcing/0" teacher_forcing
        run "$start/stages/consistency/0" consistency --config.init_from="$start/stages/teacher_forcing/0"
    fi
    until [ -f "$start/stages/consistency/0/evaluation.json" ]; do sleep 10; done
    for seed in 0 1 2; do
        # Alignment in every update of a short rollout: three times as many as after a warm-up and by a coin.
        if mine; then
            evaluate=(--solvers=cm)
            run "$dir/causal/main/salt_always/$seed" self_forcing:salt --config.seed=$seed \
                --config.init_from="$start/stages/consistency/0" --config.align.start=0 --config.align.probability=1.0
        fi
        for row in plain naive mixed mixed_sc salt; do
            mine || continue
            evaluate=(--solvers=cm)
            case $row in plain | salt) evaluate+=("--memory=0:0:absolute,6:0:absolute,9:3:absolute,6:1:relative") ;; esac
            run "$start/main/$row/$seed" "self_forcing:${row/plain/}" \
                --config.init_from="$start/stages/consistency/0" --config.seed=$seed
        done
    done
}

# The same rows by both readings of the method, from the shipped causal start; `launch.claims` compares them.
readings() {
    local seed row
    evaluate=(--solvers=cm --count=384 --long=0)
    for seed in 0 1 2; do
        for row in plain mixed naive naive,release mixed_sc mixed_sc,release salt salt,release; do
            mine || continue
            run "$dir/readings/$row/$seed" "self_forcing:${row/plain/}" --config.init_from=shapes_causal --config.seed=$seed
        done
    done
}

# What the peers do otherwise, one by one and together, in Self Forcing's update; `readings` has it without.
switches() {
    local seed row live=--config.rollout.live_cache=True noise=--config.rollout.context_noise=0.00498
    local table=--config.renoise.score_shift=8
    declare -A set=([live_cache]=$live [context_noise]=$noise [score_shift]=$table [all]="$live $noise $table")
    evaluate=(--solvers=cm --count=384 --long=0)
    for seed in 0 1 2; do
        for row in live_cache context_noise score_shift all; do
            mine || continue
            # shellcheck disable=SC2086 # options with spaces between them
            run "$dir/readings/peers_$row/$seed" self_forcing --config.init_from=shapes_causal --config.seed=$seed ${set[$row]}
        done
    done
}

# Long videos of three of these rows, under every memory.
memories() {
    local seed row ways=0:0:absolute,9:3:cyclic:9,9:3:cyclic:9:last_step,9:3:absolute,9:0:relative,6:0:relative,9:3:relative
    evaluate=(--solvers=cm "--memory=$ways")
    for seed in 0 1 2; do
        for row in plain salt salt,release; do
            mine || continue
            local work="$dir/memories/$row/$seed"
            if [ ! -d "$work" ]; then
                mkdir -p "${work%/*}"
                cp -r "$dir/readings/$row/$seed" "$work"
                rm "$work/evaluation.json"
            fi
            run "$work" "self_forcing:${row/plain/}" --config.init_from=shapes_causal --config.seed=$seed
        done
    done
}

# The recipes of the peers that the table above does not hold, one seed each, from their own starts.
recipes() {
    local variant stages=$dir/causal/stages to=$dir/recipes
    if mine; then # frame by frame
        evaluate=(--solvers=cm --count=48)
        run "$to/teacher_forcing_frame/0" teacher_forcing:frame
        run "$to/consistency_frame/0" consistency:frame --config.init_from="$to/teacher_forcing_frame/0"
        for variant in frame frame,salt two one; do
            run "$to/causal_forcing_${variant/,/_}/0" "causal_forcing:$variant" \
                --config.init_from="$to/consistency_frame/0" --config.sample.num_steps="(1,2,4,8)"
        done
    fi
    if mine; then
        # Streaming: window and sink, then one video over many updates.
        evaluate=(--solvers=cm --memory=9:3:absolute)
        run "$to/longlive_init/0" longlive_init --config.init_from="$stages/consistency/0"
        run "$to/longlive_plain/0" longlive --config.init_from="$to/longlive_init/0"
        evaluate=(--solvers=cm --count=48)
        run "$to/ode/0" ode_regression --config.init_from="$stages/teacher_forcing/0"
        for variant in plain salt; do
            run "$to/causvid_$variant/0" "causvid:${variant/plain/}" --config.init_from="$to/ode/0"
        done
        evaluate=(--solvers=cm --memory=9:3:absolute)
        run "$to/longlive_salt/0" longlive:salt --config.init_from="$to/longlive_init/0"
    fi
}

[ "${ONLY:-whole}" != whole ] || whole
[ "${ONLY:-causal}" != causal ] || causal
[ "${ONLY:-recipes}" != recipes ] || recipes
[ "${ONLY:-readings}" != readings ] || readings
[ "${ONLY:-switches}" != switches ] || switches
[ "${ONLY:-memories}" != memories ] || memories
[ "$part" != 1/1 ] || python -m launch.tabulate --dir="$dir"
