"""Chapter 3's instruments along training: makes nbs/results/instruments.json. Not part of the tests.

    python benchmarks/instruments.py                  what the record still lacks; a minute or two per run on one core
    python benchmarks/instruments.py --only maml      runs whose name has this in it
"""
import argparse
import json
import time
from pathlib import Path

import torch

from mamlpp_nb.diagnostics import idle_parameters, step_times_curvature
from mamlpp_nb.files import write_safely
from mamlpp_nb.machine import provenance
from mamlpp_nb.maml import inner_loop, keep_freed_memory
from mamlpp_nb.mamlpp import Schedule, find_method, method_loop, method_parameters
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.speed import fast_gradient
from mamlpp_nb.tasks import EpisodeSampler, characters

path = Path(__file__).parent.parent / 'nbs/results/instruments.json'
n_outer, every, per_epoch, n_tasks, n_steps = 200, 50, 10, 4, 5
schedule = Schedule(n_epochs=n_outer // per_epoch, multi_step_epochs=2, first_order_epochs=7)
n_probe, n_paths = 32, 2 # tasks of a look; tasks whose way is followed
wanted = {.1: ('maml', 'mamlpp'), .4: ('maml', 'mamlpp')}
runs = {f'{method}, α {alpha}': (method, alpha) for alpha, methods in wanted.items() for method in methods}


def cosine(a, b): return torch.cosine_similarity(a, b, dim=-1)


def gradients(forward, meta, probe, idle, second_order, gradient):
    "(tasks, weights): of each task by itself, what the target loss after the last step sends back to θ₀"
    each = []
    for t in range(len(probe)):
        found = gradient(forward, meta, probe[t:t+1], n_steps=n_steps, second_order=second_order)[2]
        each.append(torch.cat([g.flatten() for k, g in found.items() if k.startswith('start/') and k.removeprefix('start/') not in idle]))
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
        found.append([step_times_curvature(forward, meta._replace(start=p), one, i, n_rounds=10).item() for i, p in enumerate(places)])
    return found


def look(forward, meta, probe, idle, gradient):
    "All instruments at one point of training"
    exact, first = (gradients(forward, meta, probe, idle, order, gradient) for order in (True, False))
    steep = step_times_curvature(forward, meta, probe[:n_tasks], n_rounds=10).abs().median().item()
    return {**of_gradients(exact, first), 'αλ at the start': steep}


def train(method, alpha, seed, splits):
    "One run, looked at every fifty outer steps; what is learned doesn't depend on the looks"
    begin, net = time.monotonic(), Conv4(5, filters=32, seed=seed)
    deal = EpisodeSampler(splits['train'], n_target=1, rotate=True, seed=seed)
    probe = EpisodeSampler(splits['train'], n_target=1, rotate=True, seed=1000 + seed)(0, n_probe)
    idle, forward = idle_parameters(net, probe.support_x[0]), task_batched(net)
    method = find_method(method)
    meta = method_parameters(method, net, probe.support_x[0], n_steps, alpha)
    gradient = fast_gradient(net)
    loop = method_loop(method, forward, meta, deal, schedule, lambda i: i // per_epoch, n_steps, n_tasks, gradient=gradient)
    looks, history = {0: look(forward, meta, probe, idle, gradient)}, []
    ways = [along_the_way(forward, meta, probe)]
    for p in loop:
        history.append(p)
        if len(history) % every == 0: looks[len(history)] = look(forward, meta, probe, idle, gradient)
        if len(history) == n_outer: break
    return {'loss': [p.loss for p in history], 'gradient_norm': [p.gradient_norm for p in history], 'looks': looks,
            'αλ along the way': [*ways, along_the_way(forward, meta, probe)], 'seconds': time.monotonic() - begin}


def rounded(value):
    "Four digits are enough for a figure"
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list): return [rounded(v) for v in value]
    return float(f'{value:.4g}') if isinstance(value, float) else value


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--only', default='', help='runs whose name has this in it')
    only = options.parse_args().only
    keep_freed_memory()
    data, splits = characters()
    settings = {'data': data, 'n_way': 5, 'k_shot': 1, 'n_target': 1, 'filters': 32, 'n_tasks': n_tasks, 'n_steps': n_steps,
                'outer_steps': n_outer, 'probe_tasks': n_probe, 'multi_step_until': schedule.multi_step_epochs*per_epoch,
                'first_order_until': schedule.first_order_epochs*per_epoch}
    record = json.loads(path.read_text()) if path.exists() else {'settings': settings, **provenance('cpu'), 'runs': {}}
    for name, (method, alpha) in runs.items():
        for seed in range(3):
            if only not in name or str(seed) in record['runs'].get(name, {}): continue
            found = rounded(train(method, alpha, seed, splits))
            record['runs'].setdefault(name, {})[str(seed)] = found
            write_safely(path, lambda draft: draft.write_text(json.dumps(record, ensure_ascii=False) + '\n'))
            print(f"{name}, seed {seed}: {found['seconds']:.0f} s", flush=True)
