"""What the models of a table get right, task by task: makes nbs/results/paired.json, for chapter 20.

    python benchmarks/paired.py         what the record still lacks: a minute or two for each model of 20-way tasks

The tables' records keep means over tasks. All rows and seeds of a table are tested on the same tasks, so methods can be
compared task by task, which asks for the models themselves: the best of each run lies beside its record. Targets are
normalised together.
"""
import json
import sys
from pathlib import Path

from mamlpp_nb.config import Config, set_up
from mamlpp_nb.evaluation import grade_models
from mamlpp_nb.files import write_safely
from mamlpp_nb.machine import provenance
from mamlpp_nb.maml import keep_freed_memory, load_meta
from mamlpp_nb.reproduce import tables
from mamlpp_nb.tasks import load_data

results = Path(__file__).parent.parent / 'nbs/results'
path, compared = results / 'paired.json', ('omniglot-20w1s-tenth', 'omniglot-20w1s-best', 'omniglot-small')


def right_answers(model, record, data):
    "Of each test task, how many targets are named rightly after the last inner step: in the mean what the record says"
    meta, notes = load_meta(model)
    config = Config(**notes['config'])
    setup = set_up(config, data, compiled=False)
    graded = grade_models(setup.net, [meta], setup.test, config.test_tasks, adapt=setup.adapt, predicts=setup.predicts)
    share = graded['targets']['single'].per_task[:,-1]
    known = record['test']['norms']['targets']['single']['accuracy'][-1]
    if abs(share.mean().item() - known) > 1e-3:
        raise ValueError(f'{model.stem}: {share.mean():.4f}, recorded {known:.4f}')
    return (share*config.n_way*config.test_targets).round().int().tolist()


if __name__ == '__main__':
    keep_freed_memory()
    made = json.loads(path.read_text()) if path.exists() else {'tables': {}}
    data = load_data('omniglot')
    for table in compared:
        for model in sorted((results/'tables'/table).glob('*.safetensors')):
            row, _, seed = model.stem.rpartition('-seed')
            done = made['tables'].setdefault(table, {}).setdefault(row, {})
            if row not in tables[table] or seed in done: continue
            right = right_answers(model, json.loads(model.with_suffix('.json').read_text()), data)
            done[seed] = {'right': right}
            made |= provenance('cpu') # of the latest
            write_safely(path, lambda draft: draft.write_text(json.dumps(made) + '\n'))
            print(table, row, seed, sum(right)/len(right), file=sys.stderr, flush=True)
