"""Loss and gradient of every outer step of rows of a table: makes nbs/results/traces.json, for chapter 3.

    python benchmarks/traces.py                                 what the record still lacks
    python benchmarks/traces.py --rows '5w1s-maml-steps-*'      other rows of the table, beside those

The runs are those of `mamlpp reproduce claims-small`, whose records keep a mean for each epoch only; nothing is tested here.
"""
import argparse
import dataclasses
import fnmatch
import json
import time
from pathlib import Path

from mamlpp_nb.config import set_up
from mamlpp_nb.files import write_safely
from mamlpp_nb.machine import provenance
from mamlpp_nb.maml import keep_freed_memory
from mamlpp_nb.reproduce import tables
from mamlpp_nb.runs import first_state
from mamlpp_nb.tasks import load_data
from mamlpp_nb.training import advance, outer_steps

path = Path(__file__).parent.parent / 'nbs/results/traces.json'
table = 'claims-small'


def trace(config, splits):
    "One run without its validations: loss and gradient norm of every outer step"
    begin, setup = time.monotonic(), set_up(config, splits, 'cpu', compiled=False)
    state = first_state(config, setup)
    steps = outer_steps(config, [(setup, state)])
    ended = [advance(steps, config, config.iterations) for _ in range(config.epochs)]
    loss, _, norm = ([float(f'{v:.4g}') for v in column] for column in zip(*state.log))
    return {'loss': loss, 'gradient_norm': norm, 'diverged': not all(ended), 'seconds': round(time.monotonic() - begin, 1)}


def wanted(record, pattern):
    "(row, seed) of what the record lacks: seed after seed, so that what is there is even"
    rows = [row for row in tables[table] if fnmatch.fnmatch(row, pattern)]
    return [(row, seed) for seed in range(3) for row in rows if str(seed) not in record['runs'].get(row, {})]


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--rows', default='20w1s-*-strided-blocks-*', help='a pattern of rows')
    pattern = options.parse_args().rows
    keep_freed_memory()
    record = json.loads(path.read_text()) if path.exists() else {'table': table, **provenance('cpu'), 'runs': {}}
    for row, seed in wanted(record, pattern):
        config = dataclasses.replace(tables[table][row].config, seed=seed)
        found = trace(config, load_data(config.data))
        record['runs'].setdefault(row, {})[str(seed)] = found
        write_safely(path, lambda draft: draft.write_text(json.dumps(record) + '\n'))
        print(f"{row}, seed {seed}: {found['seconds']:.0f} s", flush=True)
