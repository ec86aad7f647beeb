#!/usr/bin/env bash
# Create .venv if needed and install this project into it with the extras that are named: tools/setup.sh dev torch plot
# A failed step stops with what to do; running again picks up where it stopped. Set PYTHON to choose the interpreter.
set -euo pipefail
# Shells start what runs in the background with SIGINT ignored, which bash cannot undo; Ctrl-C shall end it nevertheless.
if [ -z "${INTERRUPTIBLE:-}" ] && env --default-signal=INT true 2>/dev/null; then
    INTERRUPTIBLE=1 exec env --default-signal=INT bash "$0" "$@"
fi
cd "$(dirname "$0")/.."
extras=$(IFS=,; echo "$*")
log=.setup.log

fail() { printf '\n\033[1mSetup stopped:\033[0m %s\n' "$1" >&2; exit 1; }

is_recent() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if is_recent "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

explain() {  # the end of pip's log, and what it means
    tail -n 12 "$log" >&2
    if grep -qi "no space left" "$log"; then fail "the disk is full. Free about 4 GB and run the same command again."; fi
    if grep -qiE "connection|resolve host|name resolution|network|timed out|proxy|SSLError|from versions: none" "$log"; then
        fail "the package index could not be reached. Check the network and run the same command again."
    fi
    fail "pip could not install .[$extras]; the whole log is in $log. Fix what it names and run the same command again, or start over with 'make clean'."
}

if ! is_recent .venv/bin/python; then
    python=$(find_python) || fail "Python 3.11 or newer with venv is needed${PYTHON:+ (PYTHON=$PYTHON is not)}. Install it (Debian: apt install python3 python3-venv), or point to it: make ${MAKE_TARGET:-site} PYTHON=/path/to/python3.12"
    echo "→ creating .venv with $($python --version)"
    rm -rf .venv
    "$python" -m venv .venv >"$log" 2>&1 || { rm -rf .venv; explain; }
fi

free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
if [ "$free" -lt 2000 ]; then fail "only $free MB of disk are free, and the packages need up to 4 GB. Free some and run the same command again."; fi

echo "→ installing keras_mml[$extras] into .venv (some minutes the first time)"
install() {
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 | tee "$log" |
        { grep --line-buffered -E "^(Collecting|Downloading|Building|Installing collected)" || true; } | cut -c 1-70 || explain
}
install setuptools ziglang  # what the build takes, once, and not in an environment of its own for each
install --no-build-isolation -e ".[$extras]"
rm -f "$log"
