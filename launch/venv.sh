# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `.venv` in the root of the repository, made once.

# Exits with a remedy unless the Python that was asked for, or found, is new enough.
make_venv() {
    local python=${PYTHON:-python3}
    if [ ! -x .venv/bin/pip ]; then # pip comes last, so this is a whole .venv
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "salt_jax needs Python 3.11 or newer, but '$python' is $("$python" --version 2>&1 || true)." \
                "Install one and name it: PYTHON=python3.12 bash $0" >&2
            exit 1
        fi
        "$python" -m venv .venv || {
            echo "'$python -m venv .venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2
            rm -rf .venv
            exit 1
        }
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

# up_to_date NAME FILE...: have these requirement files been installed, as they read now?
up_to_date() {
    local stamp=.venv/installed-$1
    shift
    [ -f "$stamp" ] && cat "$@" | cmp -s - "$stamp"
}

# mark_installed NAME FILE...: remembers their contents for up_to_date.
mark_installed() {
    local stamp=.venv/installed-$1
    shift
    cat "$@" >"$stamp"
}
