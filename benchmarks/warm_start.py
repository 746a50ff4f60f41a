"""Chapter 18's question of many classes of one's own: makes nbs/results/warm_start/. Not part of the tests.

    python benchmarks/warm_start.py drawings         minutes a run; what the record still lacks
    python benchmarks/warm_start.py drawings 0 1     these seeds alone; another process may have the others
    python benchmarks/warm_start.py photographs      wants mini-ImageNet under the data root

A few classes of one's own, none of which the packaged model has seen, and tasks of other classes of the same kind.
Meta-training on the own classes, from the packaged model and from scratch, stands against the packaged model as it is
and three ways to use it that learn from a task's support set alone: the nearest class mean on its features,
fine-tuning of the last layer, and of all layers. All answer the same tasks, by the statistics of the support set.
"""
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mamlpp_nb.classifier import FewShotClassifier, as_module
from mamlpp_nb.config import configure
from mamlpp_nb.files import write_safely
from mamlpp_nb.machine import provenance
from mamlpp_nb.maml import at_step, keep_freed_memory
from mamlpp_nb.runs import read_pretrained, settings_from
from mamlpp_nb.speed import fast_statistics
from mamlpp_nb.tasks import EpisodeSampler, load_data
from mamlpp_nb.training import train_runs

root = Path(__file__).parent.parent
results, runs = root / 'nbs/results/warm_start', root / 'runs/warm_start'
n_seeds = 3


class Kind(NamedTuple):
    "Pictures, the packaged model for them, and how long a run takes"
    model: str
    preset: str
    sizes: tuple # numbers of own classes
    n_tasks: int # of a test
    rates: tuple # outer learning rates from the model; a preset's is 0.002
    changes: dict # of the preset


_brief = {'epochs': 4, 'first_order_epochs': 2, 'validation_tasks': 20}
kinds = {'drawings': Kind('omniglot', 'grey-images-5w1s', (8, 20, 47), 100, (2e-4, 2e-3), _brief),
         'photographs': Kind('photos', 'colour-images-5w1s', (8, 20), 60, (2e-4,), {**_brief, 'iterations': 30})}


def classes_of(kind):
    "Classes to draw one's own from, and others to test on; the packaged model has seen none of them"
    if kind == 'drawings':
        glyphs = load_data('glyphs')
        return glyphs['train'], glyphs['test']
    photographs = load_data('mini-imagenet')
    return photographs['test'], photographs['val'] # the larger part for oneself


def own_classes(kind, n, seed):
    pool = classes_of(kind)[0]
    return pool.select(np.random.default_rng(seed).permutation(len(pool))[:n].tolist(), 'train')


def settings(kind, seed, rate=None):
    "Of a run from scratch, or of one from the packaged model at a rate of its own"
    k = kinds[kind]
    data = 'glyphs' if kind == 'drawings' else 'mini-imagenet'
    if rate is None: start = {'filters': read_pretrained(k.model).config.filters}
    else: start = {**settings_from(k.model), 'image_size': 0, 'outer_lr': rate, 'last_outer_lr': rate/100}
    return configure(k.preset, **{**k.changes, **start, 'data': data, 'seed': seed})


def trained(kind, n, seed, rate=None):
    "The folder of a run on one's own classes; who has few of them has no others to validate on"
    folder = runs / kind / f'own-{n}-{"scratch" if rate is None else f"from-{rate:g}"}-seed{seed}'
    own = own_classes(kind, n, seed)
    ended = train_runs([settings(kind, seed, rate)], [folder], {'train': own, 'val': own, 'test': own}, compiled=False)
    if ended != 'complete': sys.exit(f'{folder}: {ended}; the same command goes on')
    return str(folder)


def adapted(model): return lambda x, y, targets: FewShotClassifier(model).fit(x, y).predict_proba(targets)


def body_of(model, x):
    "The packaged network without its head, in training mode's place: normalised by the support set's statistics"
    start = at_step(model.meta, {k: w[None] for k, w in model.meta.start.items()}, 0)
    start = {k: w for k, w in start.items() if '.running_' not in k}
    with torch.no_grad(): start |= fast_statistics(model.net)(start, x[None])[1]
    *before, net, _ = as_module(model, {k: w[0] for k, w in start.items()})
    net.head = nn.Identity()
    return nn.Sequential(*before, net)


def nearest_mean(model):
    @torch.no_grad()
    def answer(x, y, targets):
        body = body_of(model, x)
        features = body(x)
        means = torch.stack([features[y == c].mean(0) for c in range(int(y.max()) + 1)])
        return -torch.cdist(body(targets), means).numpy()
    return answer


def fine_tuned(model, whole, n_steps, rate):
    "A new last layer on the packaged body, by Adam on the support set; the whole network, or that layer alone"
    def answer(x, y, targets):
        body = body_of(model, x)
        with torch.no_grad(): width = body(x[:1]).shape[1]
        head = nn.Linear(width, int(y.max()) + 1)
        for p in head.parameters(): nn.init.zeros_(p)
        body.requires_grad_(whole)
        adam = torch.optim.Adam([*head.parameters(), *(body.parameters() if whole else ())], rate)
        with torch.no_grad(): features = body(x)
        for _ in range(n_steps):
            adam.zero_grad()
            F.cross_entropy(head(body(x) if whole else features), y).backward()
            adam.step()
        with torch.no_grad(): return head(body(targets)).numpy()
    return answer


def accuracies(rule, kind, shot):
    "(tasks,), in %; the same tasks for all rules"
    deal, scores = EpisodeSampler(classes_of(kind)[1], 5, shot, 5, seed=77), []
    for i in range(kinds[kind].n_tasks):
        e = deal(i)
        answer = rule(e.support_x[0], e.support_y[0], e.target_x[0])
        scores.append(100*float((answer.argmax(-1) == e.target_y[0].numpy()).mean()))
    return scores


def rules(kind, seeds):
    "What is to be measured: (name, number of own classes, seed) and a function that makes the rule"
    k = kinds[kind]
    model = read_pretrained(k.model)
    yield ('as packaged', 0, 0), lambda: adapted(k.model)
    yield ('nearest class mean', 0, 0), lambda: nearest_mean(model)
    yield ('last layer', 0, 0), lambda: fine_tuned(model, False, 100, 1e-2)
    yield ('all layers', 0, 0), lambda: fine_tuned(model, True, 30, 1e-3)
    usual, *others = k.rates
    for seed, n in itertools.product(seeds, k.sizes):
        yield ('from scratch', n, seed), lambda: adapted(trained(kind, n, seed))
        yield (f'from the model, {usual:g}', n, seed), lambda: adapted(trained(kind, n, seed, usual))
    for rate, seed, n in itertools.product(others, seeds, k.sizes):
        yield (f'from the model, {rate:g}', n, seed), lambda: adapted(trained(kind, n, seed, rate))


def read(kind):
    path = results / f'{kind}.json'
    new = {'settings': dataclasses.asdict(settings(kind, 0)), 'tasks': kinds[kind].n_tasks, 'processes': [], 'rows': []}
    return json.loads(path.read_text()) if path.exists() else new


def write(kind, record):
    write_safely(results / f'{kind}.json', lambda draft: draft.write_text(json.dumps(record) + '\n'))


def measure(kind, seeds):
    record, here = read(kind), provenance('cpu')
    write(kind, {**record, **here, 'processes': [*record['processes'], here]})
    for (name, n, seed), make in rules(kind, seeds):
        if (name, n, seed) in {(r['rule'], r['own'], r['seed']) for r in read(kind)['rows']}: continue
        rule = make()
        row = {'rule': name, 'own': n, 'seed': seed, 'shots': {str(s): accuracies(rule, kind, s) for s in (1, 5)}}
        record = read(kind) # another process may have added to it
        record['rows'].append(row)
        write(kind, record)
        print(kind, name, n, seed, {s: round(float(np.mean(a)), 1) for s, a in row['shots'].items()}, flush=True)


if __name__ == '__main__':
    keep_freed_memory()
    results.mkdir(exist_ok=True)
    chosen, *seeds = sys.argv[1:]
    measure(chosen, [int(s) for s in seeds] or range(n_seeds))
