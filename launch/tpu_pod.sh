#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, whose hosts are TPU VMs; from a machine with gcloud. docs/pods.md, section 2.
#
#   bash launch/tpu_pod.sh [--dry-run] create     makes the slice; it is billed from now on
#   bash launch/tpu_pod.sh [--dry-run] install    this checkout's HEAD, and what it needs, on every host
#   bash launch/tpu_pod.sh [--dry-run] run [--flag=value ...]      starts or resumes CONFIG in WORKDIR, or PROGRAM
#   bash launch/tpu_pod.sh [--dry-run] logs       follows the output of one host
#   bash launch/tpu_pod.sh [--dry-run] stop       lets the run save and end with exit code 75
#   bash launch/tpu_pod.sh [--dry-run] delete     ends the slice and its cost; what is on its disks is lost
#
# --dry-run, or DRY_RUN=1, prints the commands and runs none; it needs no gcloud. Settings are environment variables:
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-}                     # of the slice, your choice, such as salt
ZONE=${ZONE:-}                     # where you have quota for it, such as us-east5-a
TYPE=${TYPE:-v5p-32}               # v5p counts cores, two a chip: 16 chips on 4 hosts; v6e counts chips
IMAGE=${IMAGE:-}                   # of the VMs; empty: the one that goes with TYPE
SPOT=${SPOT:-}                     # 1: cheaper, and may be taken away at any time
PROGRAM=${PROGRAM:-train}          # or sample, evaluate, export, encode, bench: what `run` runs on every host
CONFIG=${CONFIG:-}                 # such as configs/self_forcing.py:wan,salt
WORKDIR=${WORKDIR:-}               # gs://BUCKET/..., which every host sees; in the region of ZONE
CACHE=${JAX_COMPILATION_CACHE_DIR:-} # of compiled programs, such as gs://BUCKET/jax_cache; empty: on each host's disk
WORKER=${WORKER:-0}                # whose output `logs` shows

fail() {
    echo "error: $*" >&2
    exit 2
}

# Refuses a setting that is missing: needs NAME "what to set".
needs() { [ -n "${!1}" ] || fail "$1 is not set; $2"; }

dry=${DRY_RUN:-}
[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
command=${1:-}
shift || true

# Prints a command as one could type it, and runs it unless this is a dry run.
do_it() {
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_/.:,=@%+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    echo "+$line"
    [ -n "$dry" ] || "$@"
}

# on WORKER COMMAND: on that host, or on all.
on() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

case $command in create | install | run | logs | stop | delete) ;; *)
    fail "say what to do: bash launch/tpu_pod.sh [--dry-run] create, install, run, logs, stop or delete" ;;
esac
needs NAME "choose a name for the slice, such as NAME=salt"
needs ZONE "name the zone of the slice, such as ZONE=us-east5-a"
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI"

case $command in
create)
    case ${IMAGE:-$TYPE} in
    v5litepod-*) IMAGE=v2-alpha-tpuv5-lite ;;
    v5p-*) IMAGE=v2-alpha-tpuv5 ;;
    v6e-*) IMAGE=v2-alpha-tpuv6e ;;
    esac
    needs IMAGE "no image is known for TYPE=$TYPE; name the TPU software version that Google lists for it"
    do_it gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$IMAGE" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
    ;;
install)
    # The commit travels as a bundle, so that config.json of a run names it. uv brings a Python that is new enough.
    do_it mkdir -p build
    do_it git bundle create build/salt_jax.bundle HEAD
    do_it gcloud compute tpus tpu-vm scp build/salt_jax.bundle "$NAME:salt_jax.bundle" --zone="$ZONE" --worker=all
    on all "set -e; git init -q salt_jax; cd salt_jax; \
git fetch -q ../salt_jax.bundle HEAD; git checkout -qf FETCH_HEAD; \
python3 -m pip install -q --user uv; export PATH=\$HOME/.local/bin:\$PATH; \
[ -d .venv ] || uv venv -q --python 3.12 .venv; uv pip install -q -e '.[gcs]' 'jax[tpu]'; \
.venv/bin/python -c 'import jax, libtpu; print(\"installed: jax\", jax.__version__)'"
    ;;
run)
    [ "$PROGRAM" != train ] || needs CONFIG "name the recipe, such as CONFIG=configs/sc_dmd.py:wan"
    [ "$PROGRAM" != train ] || needs WORKDIR "name a folder of a bucket, such as WORKDIR=gs://BUCKET/run"
    case $WORKDIR in gs://?* | "") ;; *)
        fail "WORKDIR=$WORKDIR is on the disk of each host, and they have to share it; use gs://BUCKET/run" ;;
    esac
    run=(env 'JAX_PLATFORMS=tpu,cpu' ${CACHE:+JAX_COMPILATION_CACHE_DIR="$CACHE"} .venv/bin/python -m "launch.$PROGRAM"
        ${CONFIG:+--config="$CONFIG"} ${WORKDIR:+--workdir="$WORKDIR"} "$@")
    # Beyond the connection: a shell that outlives it notes the process for `stop`, and at the end its exit code.
    on all "cd salt_jax; if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then \
echo 'error: a run is under way on this host; stop it first' >&2; exit 2; fi; \
setsid nohup bash -c '\"\$@\" & echo \$! >train.pid; wait \$!; echo \"== exit code \$?\"' run ${run[*]@Q} \
</dev/null >train.log 2>&1 &"
    ;;
logs) on "$WORKER" "tail -n 50 -F salt_jax/train.log" ;;
stop) on all "kill -TERM \$(cat salt_jax/train.pid)" ;;
delete) do_it gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet ;;
esac
