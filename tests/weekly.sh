#!/usr/bin/env bash
# What is too slow for every day: the tests marked weekly. The same assertions as in `tests/all.sh`, on more or larger instances.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

python -m pytest -q -m weekly
# The chapters in quick mode go here: `python .ci/run_notebooks.py` in a copy, so that nothing committed changes.
