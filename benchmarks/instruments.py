"""Chapter 3's instruments before and after training: makes nbs/results/instruments.json. Not part of the tests.

    python benchmarks/instruments.py        what the record still lacks, some seconds per look

The runs are those of the table omniglot-small, 5-way 1-shot; what they ended with lies beside their records. What
happens on the way is looked at in short runs, as those of the table claims-small, which are trained here with every
epoch kept: a minute or two each, in runs/instruments.
"""
import dataclasses
import json
from pathlib import Path

import torch

from mamlpp_nb.config import set_up
from mamlpp_nb.diagnostics import idle_parameters, step_times_curvature
from mamlpp_nb.files import write_safely
from mamlpp_nb.machine import provenance
from mamlpp_nb.maml import inner_loop, keep_freed_memory, load_meta
from mamlpp_nb.reproduce import tables
from mamlpp_nb.runs import load_models
from mamlpp_nb.tasks import EpisodeSampler, load_data
from mamlpp_nb.training import train_runs

results = Path(__file__).parent.parent / 'nbs/results'
path, table, n_tasks, n_steps = results / 'instruments.json', 'omniglot-small', 4, 5
n_probe, n_paths = 32, 3 # tasks of a look; tasks whose way is followed
methods = 'maml', 'mamlpp', 'maml+msl', 'maml+bn', 'maml+lslr'
short, runs = tables['claims-small']['5w1s-maml-tasks-2'].config, results.parent.parent / 'runs/instruments'


def cosine(a, b): return torch.cosine_similarity(a, b, dim=-1)


def gradients(setup, meta, probe, idle, second_order):
    "(tasks, weights): of each task by itself, what the target loss after the last step sends back to θ₀"
    each = []
    for t in range(len(probe)):
        found = setup.gradient(setup.forward, meta, probe[t:t+1], n_steps=n_steps, second_order=second_order)[2]
        start = {k.removeprefix('start/'): g for k, g in found.items() if k.startswith('start/')}
        each.append(torch.cat([g.flatten() for k, g in start.items() if k not in idle]))
    return torch.stack(each)


def of_gradients(exact, first):
    "How long they are, what of them is second order, and how well they agree: by task, by outer step, by all tasks"
    batches, firsts = (g.unflatten(0, (-1, n_tasks)).mean(1) for g in (exact, first))
    others = (exact.sum(0) - n_tasks*batches) / (len(exact) - n_tasks) # of the tasks that are not in the batch
    return {'norm': batches.norm(dim=1).mean().item(), 'first-order norm': firsts.norm(dim=1).mean().item(),
            'share': ((exact - first).norm(dim=1) / exact.norm(dim=1)).median().item(),
            'cosine of a task': cosine(first, exact).mean().item(),
            'cosine of a batch': cosine(firsts, batches).mean().item(),
            'cosine of all': cosine(first.mean(0), exact.mean(0)).item(),
            'exact to other tasks': cosine(batches, others).mean().item(),
            'first order to other tasks': cosine(firsts, others).mean().item()}


def along_the_way(forward, meta, probe):
    "αλ at θ₀ ... θ₄, of each task"
    found = []
    for t in range(n_paths):
        one = probe[t:t+1]
        steps = inner_loop(forward, meta, one.support_x, one.support_y, n_steps, second_order=False)
        places = [meta.start, *({k: w[0].detach() for k, w in fast.items()} for fast in steps)][:n_steps]
        metas = [meta._replace(start=p) for p in places]
        found.append([step_times_curvature(forward, m, one, i, n_rounds=10).item() for i, m in enumerate(metas)])
    return found


def look(setup, meta, probe):
    "All instruments at one point of training"
    idle = idle_parameters(setup.net, probe.support_x[0])
    found = of_gradients(*(gradients(setup, meta, probe, idle, order) for order in (True, False)))
    return {**found, 'αλ along the way': along_the_way(setup.forward, meta, probe)}


def rounded(value):
    "Four digits are enough for a figure"
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list): return [rounded(v) for v in value]
    return float(f'{value:.4g}') if isinstance(value, float) else value


def tasks_to_look_at(splits, seed):
    "Those of no run"
    return EpisodeSampler(splits['train'], n_target=1, rotate=True, seed=1000 + seed)(0, n_probe)


def on_the_way(method, seed, splits):
    "After every epoch of a short run"
    config = dataclasses.replace(short, method=method, seed=seed, keep=short.epochs)
    folder = runs / f'{method}-seed{seed}'
    train_runs([config], [folder], splits, compiled=False)
    setup, found = set_up(config, splits, 'cpu', compiled=False), {}
    for model, name in zip(*load_models(folder, config, setup)):
        for w in model.start.values(): w.requires_grad_()
        found[(int(name[-3:]) + 1)*config.iterations] = look(setup, model, tasks_to_look_at(splits, seed))
    return dict(sorted(found.items()))


def one_look(method, seed, when, splits):
    "What the record says of a method at a time: by outer steps done"
    if when == 'on the way': return on_the_way(method, seed, splits)
    config = dataclasses.replace(tables[table][f'5w1s-{method}'].config, seed=seed)
    setup = set_up(config, splits, 'cpu', compiled=False)
    probe = tasks_to_look_at(splits, seed)
    if when == 'start': return {0: look(setup, setup.meta, probe)}
    trained, _ = load_meta(results / f'tables/{table}/5w1s-{method}-seed{seed}.safetensors')
    for w in trained.start.values(): w.requires_grad_()
    return {config.epochs*config.iterations: look(setup, trained, probe)}


if __name__ == '__main__':
    keep_freed_memory()
    new = {'table': table, 'probe_tasks': n_probe, **provenance('cpu'), 'runs': {}, 'done': []}
    record = json.loads(path.read_text()) if path.exists() else new
    splits = load_data('omniglot')
    plan = [('maml', 'start'), *((m, 'end') for m in methods), *((m, 'on the way') for m in ('maml', 'mamlpp'))]
    for method, when in plan:
        for seed in range(3):
            if [method, seed, when] in record['done']: continue
            found = rounded(one_look(method, seed, when, splits))
            kind = 'short runs' if when == 'on the way' else 'runs'
            looks = record.setdefault(kind, {}).setdefault(method, {}).setdefault(str(seed), {})
            looks.update({str(k): v for k, v in found.items()})
            record['done'].append([method, seed, when])
            write_safely(path, lambda draft: draft.write_text(json.dumps(record, ensure_ascii=False) + '\n'))
            print(method, seed, when, flush=True)
