#!/usr/bin/env bash
# Everything that must hold: lint, types, import contracts, generated pages, tests. The whole check, as CI runs it.
#
#   scripts/test.sh               all of it
#   scripts/test.sh --slow        the slow sets instead of the fast tests
#   scripts/test.sh tests/trainer  only the tests named, without the rest
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(scripts/setup.sh dev)
bin=$(dirname "$python")
export PATH=$bin:$PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "${1:-}" = --slow ]; then
    shift
    exec "$python" -m pytest -m "slow and not gpu" "$@"
fi
if [ $# -eq 0 ]; then
    echo "== lint"
    ruff check .
    ruff format --check .
    echo "== types"
    pyrefly check --summarize-errors
    echo "== import contracts"
    lint-imports
    echo "== generated pages"
    "$python" scripts/generate_docs.py --check
    echo "== tests"
fi
# Two files at a time: most tests take one core, and those of ranks wait for each other much of their time.
exec "$python" -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --durations=15 "$@"
