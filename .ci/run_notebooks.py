"""Execute notebooks top to bottom, each in a fresh kernel, keep their outputs and note how long they took.

    python .ci/run_notebooks.py            all of them, in order
    python .ci/run_notebooks.py 02_maml    some of them

The seconds go to nbs/results/chapters.json, which the README's table of chapters reads.
"""
import base64
import io
import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from PIL import Image

from mamlpp_nb.machine import provenance
from mamlpp_nb.tasks import characters

# a progress bar says nothing on a page, and photographs of mini-ImageNet must not be passed on
os.environ |= {'TQDM_DISABLE': '1', 'MAMLPP_PHOTOS': '0'}
nbs = Path(__file__).parent.parent / 'nbs'
log = nbs / 'results/chapters.json'


def smaller(notebook):
    "Figures have few colours: a palette of 256 halves their size."
    for output in (o for c in notebook.cells for o in c.get('outputs', ())):
        whole = output.get('data', {}).get('image/png')
        if not whole: continue
        kept, drawn = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(whole))).convert('RGB')
        drawn.quantize(256, dither=Image.Dither.NONE).save(kept, 'PNG', optimize=True)
        if kept.tell() < len(base64.b64decode(whole)):
            output['data']['image/png'] = base64.b64encode(kept.getvalue()).decode() + '\n'


names = sys.argv[1:] or sorted(p.stem for p in nbs.glob('[!_]*.ipynb'))
taken = json.loads(log.read_text()) if log.exists() else {}
for name in names:
    path, start = nbs / f'{name}.ipynb', time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={'metadata': {'path': str(nbs)}}).execute()
    smaller(notebook)
    nbformat.write(notebook, path)
    nbdev_clean(str(path))
    taken[name] = {'seconds': round(time.monotonic() - start, 1), 'data': characters()[0], **provenance('cpu')}
    print(f"{name}: {taken[name]['seconds']} s", flush=True)
    if name != 'index': log.write_text(json.dumps({k: taken[k] for k in sorted(taken)}, indent=1) + '\n')
