#!/usr/bin/env bash
# What is too slow for every day: the tests marked weekly. The same assertions as in `tests/all.sh`, on more or larger instances; and the chapters in quick mode.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

python -m pytest -q -m weekly

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git archive HEAD | tar -x -C "$copy"
PYTHONPATH="$copy" python "$copy/.ci/run_notebooks.py" # every chapter as committed, in quick mode; nothing here changes
