"""Execute notebooks top to bottom, each in a fresh kernel, keep their outputs and note how long they took.

    python .ci/run_notebooks.py            all of them, in order
    python .ci/run_notebooks.py 02_maml    some of them

The seconds go to nbs/results/chapters.json, which the README's table of chapters reads.
"""
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

from mamlpp_nb.machine import provenance
from mamlpp_nb.tasks import characters

os.environ |= {'TQDM_DISABLE': '1', 'MAMLPP_PHOTOS': '0'} # a progress bar says nothing on a page, and photographs of mini-ImageNet must not be passed on
nbs = Path(__file__).parent.parent / 'nbs'
log = nbs / 'results/chapters.json'
names = sys.argv[1:] or sorted(p.stem for p in nbs.glob('[!_]*.ipynb'))
taken = json.loads(log.read_text()) if log.exists() else {}
for name in names:
    path, start = nbs / f'{name}.ipynb', time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={'metadata': {'path': str(nbs)}}).execute()
    nbformat.write(notebook, path)
    nbdev_clean(str(path))
    taken[name] = {'seconds': round(time.monotonic() - start, 1), 'data': characters()[0], **provenance('cpu')}
    print(f"{name}: {taken[name]['seconds']} s", flush=True)
    if name != 'index': log.write_text(json.dumps({k: taken[k] for k in sorted(taken)}, indent=1) + '\n')
