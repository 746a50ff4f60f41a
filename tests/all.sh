#!/usr/bin/env bash
# Every test: nbdev_export, nbdev_clean and the README leave no difference, the notebooks run, pytest passes.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
python -m pip check

kept=$(mktemp -d)
trap 'rm -rf "$kept"' EXIT
cp -r nbs mamlpp_nb README.md "$kept"
nbdev_export
nbdev_clean
python .ci/readme.py
for part in nbs mamlpp_nb README.md; do
  diff -r -x __pycache__ -x .ipynb_checkpoints "$kept/$part" "$part" || { echo "$part: not as its source makes it; commit what export, clean and .ci/readme.py left"; exit 1; }
done
echo "nbdev_export, nbdev_clean and README leave no difference"

nbdev_test --n_workers 1 --timing --do_print
python -m pytest -q
