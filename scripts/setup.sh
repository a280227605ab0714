#!/usr/bin/env bash
# Finds or makes an interpreter that satisfies pyproject.toml, and prints its path: the only line on stdout.
#
#   python=$(scripts/setup.sh)        what training needs
#   python=$(scripts/setup.sh dev)    what the tests need too
#
# The active interpreter is taken if it satisfies pyproject's ranges. Otherwise a virtual environment is made in .venv with
# the exact versions of constraints.txt. Running it again costs nothing; a run that was cut off is finished by the next.
set -euo pipefail

extra=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.installed-${extra:-core}
say() { echo "setup: $*" >&2; }

wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
ready() { [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; }

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && ready; then
    echo "$venv/bin/python"
    exit 0
fi

for name in python3 python3.13 python3.12 python3.11 python3.14; do
    candidate=$(command -v "$name" || true)
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        break
    fi
    candidate=
done
if [ -z "$candidate" ]; then
    say "no Python 3.11 or newer on PATH: install one (python3 with its venv module)"
    exit 2
fi

# `python` is what an activated environment puts first; it may be missing or old elsewhere.
active=$(command -v python || echo "$candidate")
if "$active" "$root/scripts/satisfied.py" $extra 2>/dev/null; then
    echo "$active"
    exit 0
fi

# One set-up at a time; a second waits for the first and then finds it done.
if command -v flock >/dev/null; then
    exec 9>"$root/.setup.lock"
    flock 9
fi
if ! ready; then
    say "installing into .venv (once; about two minutes)"
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null && ! "$candidate" -m venv --clear "$venv" >&2; then
        say "cannot make a virtual environment with $candidate: install Python's venv module (python3-venv)"
        exit 2
    fi
    log=$venv/setup.log
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root${extra:+[$extra]}" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        say "pip could not install the packages (above; whole log: .venv/setup.log). Mend it and run the same command again"
        exit 2
    fi
    echo "$wanted" >"$stamp"
    [ "$extra" = dev ] && echo "$wanted" >"$venv/.installed-core"
    say "done"
fi
echo "$venv/bin/python"
