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

# Two processes, a core each: threads that wait for each other cost more than they bring where all is small.
OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 nbdev_test --n_workers 2 --timing --do_print
python -m pytest -q
