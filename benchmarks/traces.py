"""The loss of every outer step of the runs behind a table: makes nbs/results/traces.json, for chapter 3.

    python benchmarks/traces.py RUNS        RUNS: the folder that `mamlpp reproduce claims-small --out RUNS` worked in
    python benchmarks/traces.py RUNS --table stability-tenth
                                            makes nbs/results/traces-stability-tenth.json, for chapter 20

The table's records keep means for each epoch; a run's own folder (chapter 15) has every step's loss. Nothing is
trained here. Runs that the file has from other folders stay in it.
"""
import argparse
import fnmatch
import json
from pathlib import Path

from mamlpp_nb.files import write_safely
from mamlpp_nb.runs import read_config, read_metrics

results = Path(__file__).parent.parent / 'nbs/results'
rows = {'claims-small': ('20w1s-*-strided-*', '5w1s-maml-steps-*', '5w1s-maml-rate-*', '5w1s-maml-tasks-2'),
        'stability-tenth': ('*',)}


def trace(folder):
    "What a run's folder says of its training: every outer step's loss, every epoch's gradient"
    epochs, (config, starts) = read_metrics(folder), read_config(folder)
    per_epoch = {k: [float(f'{e[k]:.4g}') for e in epochs] for k in ('gradient_norm', 'largest_gradient_norm')}
    origin = {k: starts[0][k] for k in ('commit', 'device', 'versions')}
    loss = [float(f'{v:.4g}') for e in epochs for v in e['losses']]
    return origin, {'method': config.method, 'seed': config.seed, 'loss': loss, 'steps_per_epoch': config.iterations,
                    'whole': len(epochs) == config.epochs, **per_epoch}


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('runs', type=Path, help='the folder of the runs')
    options.add_argument('--table', default='claims-small', choices=list(rows), help='whose runs')
    asked = options.parse_args()
    path = results / ('traces.json' if asked.table == 'claims-small' else f'traces-{asked.table}.json')
    before = json.loads(path.read_text()) if path.exists() else {'runs': {}, 'origins': []}
    found, origins = before['runs'], before['origins']
    for folder in sorted((asked.runs/asked.table).iterdir()):
        row, _, seed = folder.name.rpartition('-seed')
        wanted = any(fnmatch.fnmatch(row, r) for r in rows[asked.table])
        if not wanted or not (folder/'test.json').exists(): continue # not whole
        origin, found.setdefault(row, {})[seed] = trace(folder)
        if origin not in origins: origins.append(origin)
    record = {'table': asked.table, **origins[-1], 'origins': origins, 'runs': found}
    write_safely(path, lambda draft: draft.write_text(json.dumps(record) + '\n'))
    print(*(f'{row}: seeds {", ".join(seeds)}' for row, seeds in found.items()), sep='\n')
