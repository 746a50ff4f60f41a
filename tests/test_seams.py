"What a user may bring: a network, a loss, an update, an optimizer, episodes, a log, a method; and traps for them."
import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import double, no_clock, quiet
from torch import nn

from mamlpp_nb import progress
from mamlpp_nb.maml import (Learner, MetaParameters, OuterSteps, evaluate, gradient_error, gradient_step, inner_loop,
                            load_meta, maml_parameters, meta_gradient, meta_loss, outer_loop, row, save_meta)
from mamlpp_nb.mamlpp import InnerUpdate, Method, find_method, inner_parts, method_parameters, methods, updates
from mamlpp_nb.names import find_object
from mamlpp_nb.network import Conv4, is_norm, resting, task_batched
from mamlpp_nb.per_step_norm import per_step_norm
from mamlpp_nb.speed import fast_gradient, fast_inner_loop
from mamlpp_nb.tasks import Episodes, EpisodeSampler
from mamlpp_nb.config import Config, set_up
from mamlpp_nb.runs import first_state, load_state, read_metrics, read_run
from mamlpp_nb.training import csv_log, train_and_test, train_run

own_file = Path(__file__).parent.parent / 'nbs/own_parts.py'
before = set(methods), set(updates)
find_object(f'{own_file}:momentum') # registers its parts
own_methods, own_updates = ({k: table.pop(k) for k in set(table) - names}
                            for table, names in zip((methods, updates), before))


@pytest.fixture(autouse=True)
def own_parts():
    "The tables have them for these tests, and for no others."
    updates.update(own_updates)
    methods.update(own_methods)
    yield
    for table, names in ((methods, own_methods), (updates, own_updates)):
        for name in names: table.pop(name, None)


class RMS(nn.Module): # a layer of one's own that normalises
    def __init__(self, n):
        super().__init__()
        self.scale, self.is_norm = nn.Parameter(torch.ones(n)), True

    def forward(self, x): return self.scale*x/(x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def small(*layers): return nn.Sequential(nn.Flatten(), nn.Linear(784, 6), *layers, nn.Linear(6, 3))


def both(net, e, dropout=False, seed=1, **parts):
    "The plain and the fast gradient under the same seed"
    meta = maml_parameters(net)
    found = []
    for gradient in (meta_gradient, fast_gradient(net)):
        torch.manual_seed(seed)
        found.append(gradient(task_batched(net, dropout), meta, e, n_steps=2, **parts))
    return found


def same(a, b, limit=1e-9):
    assert a[0].allclose(b[0]) and a[1].allclose(b[1].to(a[1]))
    names = [k for k in b[2] if k in a[2]]
    assert gradient_error([a[2][k] for k in names], [b[2][k] for k in names]) < limit


@pytest.fixture
def e(drawn): return double(EpisodeSampler(drawn['train'], 3, 1, 2)(0, 2))


# --- networks with habits

def test_dropout_rests_unless_it_is_asked_for(drawn, e, capsys):
    torch.manual_seed(0)
    net = small(nn.ReLU(), nn.Dropout(.5)).double()
    same(*both(net, e))
    meta, deal = maml_parameters(net), lambda first, n: double(EpisodeSampler(drawn['test'], 3)(first, n))
    assert evaluate(task_batched(net), meta, deal, 10).accuracy == evaluate(task_batched(net), meta, deal, 10).accuracy
    assert net[3].training # put back as it was
    progress._told.clear()
    same(*both(net, e, dropout=True), limit=1e-12) # the plain road, with the same draws
    assert not capsys.readouterr().err # a network of one's own is found by autograd anyway
    assert not torch.equal(both(net, e, True, 1)[0][0], both(net, e, True, 2)[0][0])


def test_dropout_in_training_is_a_function_of_seed_and_iteration(drawn):
    torch.manual_seed(0)
    net = small(nn.Dropout(.5))
    def losses(first, n, before):
        torch.manual_seed(before) # whatever was drawn elsewhere
        meta = maml_parameters(net)
        loop = outer_loop(task_batched(net, dropout=True), meta, EpisodeSampler(drawn['train'], 3),
                          torch.optim.SGD(meta.learned().values(), 0.), first=first)
        return [next(loop).loss for _ in range(n)]
    whole = losses(0, 4, 5)
    assert whole == losses(0, 2, 6) + losses(2, 2, 7)
    assert len(set(losses(0, 1, 0) + losses(1, 1, 0))) == 2


def test_home_made_functional_dropout_rests_too(e):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(784, 3)

        def forward(self, x): return self.head(F.dropout(x.flatten(1), .5, self.training))
    same(*both(Noisy().double(), e))


def test_frozen_weights_stay_where_they_are(drawn, e):
    torch.manual_seed(0)
    net = small(nn.ReLU()).double()
    net[1].requires_grad_(False)
    for name in ('mamlpp', 'meta-sgd', 'anil', 'maml'):
        meta = method_parameters(find_method(name), net, e.support_x[0], 2)
        assert not any('1.weight' in k or '1.bias' in k for k in [*meta.learned(), *meta.step_sizes])
        for fast in inner_loop(task_batched(net), meta, e.support_x, e.support_y, 2):
            assert torch.equal(fast['1.weight'][0], net[1].weight)
        for fast in fast_inner_loop(net)(task_batched(net), meta, e.support_x, e.support_y, 2):
            assert torch.equal(fast['1.weight'][1], net[1].weight)
        same(meta_gradient(task_batched(net), meta, e, n_steps=2),
             fast_gradient(net)(task_batched(net), meta, e, n_steps=2))
    with pytest.raises(ValueError, match='all parameters are frozen'): maml_parameters(net.requires_grad_(False))


def test_a_frozen_convolution_of_conv4(e):
    net = Conv4(3, filters=4).double()
    net.conv0.requires_grad_(False)
    net.norm1.requires_grad_(False)
    meta = per_step_norm(maml_parameters(net), 2)
    assert len(meta.per_step['norm1.weight']) == 1 and len(meta.per_step['norm2.weight']) == 2
    same(meta_gradient(task_batched(net), meta, e, n_steps=2),
         fast_gradient(net)(task_batched(net), meta, e, n_steps=2))


@pytest.mark.parametrize('norm', [lambda: nn.RMSNorm(6), lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6),
                                  lambda: RMS(6)])
def test_layers_that_normalise_are_left_alone(e, norm):
    net = small(norm(), nn.ReLU()).double()
    meta = maml_parameters(net)
    assert {k.partition('.')[0] for k in meta.per_step} == {'2'} and '2.weight' not in meta.start
    same(*both(net, e))


def test_what_counts_as_a_norm():
    class Normal(nn.Linear): pass
    assert not is_norm(Normal(1, 1)) and is_norm(nn.InstanceNorm2d(2)) and not is_norm(nn.Sequential())


def test_unused_and_shared_parameters(e):
    net = small(nn.ReLU()).double()
    net.unused = nn.Linear(2, 2).double()
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    same(*both(net, e))
    method_parameters(find_method('mamlpp'), net, e.support_x[0], 2)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(784, 3)
            self.b.weight = self.a.weight

        def forward(self, x): return self.out(self.b(self.a(x.flatten(1)/28).tanh()))
    same(*both(Tied().double(), e))


class Reads(nn.Module): # an image as a sequence of rows
    def __init__(self, layer, width=28):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x):
        x = x.flatten(1, 2)
        out = (self.layer(x, x, x, need_weights=False) if isinstance(self.layer, nn.MultiheadAttention)
               else self.layer(x))
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


@pytest.mark.parametrize('make, line', [
    (lambda: Reads(nn.LSTM(28, 5, batch_first=True), 5), "layer 'layer' (LSTM)"),
    (lambda: Reads(nn.GRU(28, 5, batch_first=True), 5), "layer 'layer' (GRU)"),
    (lambda: Reads(nn.MultiheadAttention(28, 2, batch_first=True)), ''),
    (lambda: Reads(nn.TransformerEncoderLayer(28, 2, 16, batch_first=True)), ''),
    (lambda: small(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), ''),
    (lambda: small(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), '')])
def test_layers_that_vmap_cannot_do_are_named_and_done_one_by_one(e, capsys, make, line):
    torch.manual_seed(0)
    net = make().double()
    progress._told.clear()
    plain, fast = both(net, e)
    same(fast, plain)
    assert plain[0].isfinite() and all(g.isfinite().all() for g in plain[2].values()) and len(plain[2]) > 3
    assert capsys.readouterr().err.count(f'{line} cannot be batched over tasks') == bool(line)


def test_a_wrapper_that_spreads_images_over_devices_is_refused():
    with pytest.raises(ValueError, match='give its .module'): task_batched(nn.DataParallel(small()))


# --- inner updates

def nudged(meta, forward, few, update):
    "The meta loss as a function of all learned tensors, for a comparison with difference quotients"
    def f(*tensors):
        values = dict(zip(meta.learned(), tensors))
        groups = [{k: values.get(f'{g}/{k}', t) for k, t in table.items()} for g, table in meta._asdict().items()]
        return meta_loss(forward, MetaParameters(*groups), few, n_steps=3, loss_weights=[.2, .3, .5], update=update)[0]
    return f


@pytest.mark.parametrize('name', ['momentum', 'alfa', 'bounded', 'gradient step'])
def test_an_updates_gradient_is_the_difference_quotient(name):
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)

        def forward(self, x): return self.head(self.norm(x.flatten(1)).tanh())
    torch.manual_seed(0)
    net, x, y = Tiny().double(), torch.randn(2, 4, 1, 1, 3, dtype=torch.float64), torch.tensor([[0, 0, 1, 1]]*2)
    meta = maml_parameters(net, inner_lr=.5)
    if name != 'gradient step': meta = meta._replace(added=updates[name].added(meta, 3))
    if 'second' in meta.added: meta.added['second'].data.normal_(0, .1) # else half of ALFA's gradients are zero
    few = Episodes(x, y, x.flip(1), y.flip(1))
    assert torch.autograd.gradcheck(nudged(meta, task_batched(net), few, updates[name].step),
                                    tuple(meta.learned().values()))


def test_momentum_by_hand(e):
    net = small().double()
    meta = maml_parameters(net, .1)
    meta = meta._replace(added={'decay': torch.tensor(.5, dtype=torch.float64)})
    one, two = list(inner_loop(task_batched(net), meta, e.support_x, e.support_y, 2, update=updates['momentum'].step))
    plain, = inner_loop(task_batched(net), meta, e.support_x, e.support_y, 1)
    for k in one: assert one[k].equal(plain[k])
    first = {k: (meta.start[k] - one[k])/.1 for k in one}
    again = meta._replace(start={k: w[0] for k, w in one.items()}) # the second gradient of task 0
    after, = inner_loop(task_batched(net), again, e.support_x[:1], e.support_y[:1], 1)
    for k in one:
        second = (one[k][0] - after[k][0])/.1
        assert two[k][0].allclose(one[k][0] - .1*(second + .5*first[k][0]))


def test_alfa_begins_as_plain_descent(e):
    net = small().double()
    meta = maml_parameters(net)
    with_alfa = meta._replace(added=updates['alfa'].added(meta, 2))
    a = list(inner_loop(task_batched(net), with_alfa, e.support_x, e.support_y, 2, update=updates['alfa'].step))
    b = list(inner_loop(task_batched(net), meta, e.support_x, e.support_y, 2))
    for s, t in zip(a, b):
        for k in t: assert s[k].allclose(t[k])


# what was written out for Conv4 would be faster
@pytest.mark.parametrize('make, lines', [(small, 0), (lambda: Conv4(3, filters=4), 1)])
def test_another_update_takes_the_plain_road_and_says_so_once(e, capsys, make, lines):
    net = make().double()
    progress._told.clear()
    meta = method_parameters(find_method('momentum'), net, e.support_x[0], 2)
    parts = {'n_steps': 2, **inner_parts(find_method('momentum'))}
    for _ in range(2):
        same(fast_gradient(net)(task_batched(net), meta, e, **parts),
             meta_gradient(task_batched(net), meta, e, **parts), limit=1e-12)
    assert capsys.readouterr().err.count('not plain gradient descent') == lines
    assert 'added/decay' in meta.learned()


def test_what_a_part_adds_is_kept_in_files(tmp_path):
    meta = maml_parameters(small())._replace(added={'a': torch.ones(2, requires_grad=True), 'b': torch.zeros(())})
    save_meta(tmp_path / 'm.safetensors', meta, {})
    back, _ = load_meta(tmp_path / 'm.safetensors')
    assert (back.learned().keys() == meta.learned().keys() and back.added['a'].equal(meta.added['a'])
            and not back.added['b'].requires_grad)


def test_groups_that_are_not_known_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({'start/w': torch.ones(1), 'strange/w': torch.ones(1)}, tmp_path / 'm.safetensors',
              {'about': '{}', 'learned': '[]'})
    with pytest.raises(ValueError, match='tensors of strange'): load_meta(tmp_path / 'm.safetensors')


# --- loops

def test_any_optimizer_and_any_callable_that_deals(drawn):
    net, deal = small(), EpisodeSampler(drawn['train'], 3)
    def run(optimizer, sampler):
        meta = maml_parameters(net)
        loop = outer_loop(task_batched(net), meta, sampler, optimizer(meta.learned().values(), .1))
        return [next(loop).loss for _ in range(3)]
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        assert run(optimizer, deal) == run(optimizer, lambda first, n: deal(first, n))


def test_a_bad_step_of_a_plain_callable_is_named(drawn):
    from mamlpp_nb.maml import Diverged
    net, deal = small(), EpisodeSampler(drawn['train'], 3)
    meta = maml_parameters(net)
    loop = outer_loop(task_batched(net), meta, lambda first, n: deal(first, n),
                      torch.optim.SGD(meta.learned().values(), 1e30))
    with pytest.raises(Diverged, match='episodes'):
        for _ in range(5): next(loop)
    assert all(t.isfinite().all() for t in meta.learned().values())


# --- runs

tiny = Config(data='glyphs', n_way=3, n_target=2, filters=8, n_steps=2, n_tasks=2, epochs=2, iterations=3,
              validation_tasks=4, test_tasks=4, keep=1)


@pytest.mark.parametrize('changes', [
    {'network': f'{own_file}:Residual'},
    {'network': f'{own_file}:Residual', 'dropout': True},
    {'loss': f'{own_file}:smooth_labels'},
    {'method': 'momentum'},
    {'optimizer': 'torch.optim:SGD', 'outer_lr': .01},
    *(pytest.param(more, marks=pytest.mark.weekly) for more in (
        {'method': f'{own_file}:bounded'}, {'network': f'{own_file}:Residual', 'shared_head': True}))])
def test_a_run_with_a_part_of_ones_own_stops_and_goes_on(drawn, tmp_path, changes):
    config = dataclasses.replace(tiny, **changes)
    assert train_and_test([config], [tmp_path / 'whole'], drawn, say=quiet) == 'complete'
    for _ in range(7): status = train_run(config, tmp_path / 'pieces', drawn, minutes=1e-9, say=quiet)
    assert status == 'complete' and no_clock(tmp_path / 'whole') == no_clock(tmp_path / 'pieces')
    tested = read_run(tmp_path / 'whole')['test']
    assert set(tested['norms']) == ({'targets'} if 'network' in changes else {'targets', 'support', 'running'})
    if config.method == 'momentum':
        rates = [r['added']['decay'][0] for r in read_metrics(tmp_path / 'whole')]
        assert .5 not in rates and len(set(rates)) == 2


def test_logs_are_told_each_epoch(drawn, tmp_path):
    told = []
    train_run(tiny, tmp_path / 'run', drawn, say=quiet, log=[told.append, csv_log])
    assert [r['epoch'] for r in told] == [0, 1] and {r['seed'] for r in told} == {0}
    lines = (tmp_path / 'run/metrics.csv').read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith('epoch,loss,accuracy') and lines[2].startswith('1,')


def test_names_that_mean_nothing_are_refused_before_any_work(drawn, tmp_path):
    for changes, said in (({'network': 'conv5'}, "no network 'conv5'; choose from conv4"),
                          ({'network': 'nowhere:net'}, 'cannot be imported'),
                          ({'loss': 'hinge'}, "no loss 'hinge'"),
                          ({'network': 'math:sqrt'}, 'sqrt'),
                          ({'network': f'{own_file}:nothing'}, "no 'nothing'"),
                          ({'network': f'{own_file}:Residual', 'strided': True}, "does not take 'strided'"),
                          ({'network': 'resnet12', 'blocks': 5}, "does not take 'blocks'")):
        with pytest.raises((ValueError, TypeError), match=said): set_up(dataclasses.replace(tiny, **changes), drawn)
    with pytest.raises(ValueError, match='is no method'): Config(method=f'{own_file}:smooth')


@pytest.mark.parametrize('changes', [{'network': f'{own_file}:Residual'}, {'method': 'momentum'},
                                     pytest.param({'network': 'resnet12', 'n_tasks': 1}, marks=pytest.mark.weekly)])
def test_a_model_of_ones_own_network_adapts_to_pictures(drawn, tmp_path, changes):
    from mamlpp_nb.classifier import FewShotClassifier
    import pickle
    train_run(dataclasses.replace(tiny, **changes, epochs=1, iterations=1), tmp_path / 'run', drawn, say=quiet)
    x = drawn['test'].images[:60:10]
    fitted = FewShotClassifier(str(tmp_path / 'run')).fit(x, list('aabbcd'))
    proba = fitted.predict_proba(x)
    assert proba.shape == (6, 4) and abs(proba.sum(1) - 1).max() < 1e-5
    fitted.save(tmp_path / 'fitted.safetensors')
    assert (FewShotClassifier.load(tmp_path / 'fitted.safetensors').predict_proba(x) == proba).all()
    assert (pickle.loads(pickle.dumps(fitted)).predict_proba(x) == proba).all()
    exported = torch.export.export(fitted.module(), (x.float()/255,)).module()
    assert exported(x.float()/255).allclose(torch.from_numpy(proba), atol=1e-5)


@pytest.mark.parametrize('words, norms', [
    (['--data', f'{own_file}:sine_waves', '--network', f'{own_file}:curve', '--loss', 'squared error',
      '--inner-lr', '.01'], {'targets'}),
    (['--data', f'{own_file}:fake_pictures', '--n_way', '3', '--rotate', 'false',
      '--method', f'{own_file}:bounded'], {'targets', 'support', 'running'})])
def test_a_user_never_leaves_the_command_line(tmp_path, capsys, words, norms):
    from mamlpp_nb.cli import main
    sizes = ('--filters 4 --n_steps 2 --n_tasks 2 --epochs 2 --iterations 2 --validation_tasks 3 --test_tasks 3 '
             '--keep 1 --device cpu --csv').split()
    all_words = ['train', 'omniglot-5w1s', *words, *sizes, '--out', str(tmp_path / 'run')]
    assert main([*all_words, '--minutes', '1e-9']) == 3 and main(all_words) == 0
    assert set(read_run(tmp_path / 'run')['test']['norms']) == norms
    for command in (['evaluate', '--tasks', '3', '--device', 'cpu'], ['show'], ['replay', '--iteration', '3']):
        assert main([command[0], str(tmp_path / 'run'), *command[1:]]) == 0
    assert main(['runs', str(tmp_path)]) == 0 and (tmp_path / 'run/metrics.csv').exists()
    said = capsys.readouterr().out
    assert (' %' in said.split('targets normalised by')[1].splitlines()[1]) == ('squared error' not in words)
    again = next(r for r in read_metrics(tmp_path / 'run') if r['epoch'] == 1)['losses'][1]
    assert f'loss {again:.6f}, on record {again:.6f}' in said


def test_whatever_file_or_folder_holds_a_model_can_be_evaluated(drawn, tmp_path, capsys):
    from mamlpp_nb.cli import main
    run_folder, quick = tmp_path / 'run', tmp_path / 'quick'
    train_run(tiny, run_folder, drawn, say=quiet)
    (run_folder / 'last.safetensors').rename(quick.with_suffix('.safetensors'))
    quick.mkdir()
    about = {'config': dataclasses.asdict(tiny)}
    save_meta(quick / 'meta.safetensors', load_meta(quick.with_suffix('.safetensors'))[0], about)
    save_meta(tmp_path / 'no.safetensors', maml_parameters(small()), {})
    for path in (run_folder, quick, quick.with_suffix('.safetensors')):
        assert main(['evaluate', str(path), '--tasks', '3', '--device', 'cpu', '--norm', 'targets']) == 0, path
    assert capsys.readouterr().out.count('tasks per second') == 3
    assert (main(['evaluate', str(tmp_path / 'no.safetensors'), '--device', 'cpu']) == 2
            and 'does not say by which settings' in capsys.readouterr().err)


def test_a_run_that_goes_on_elsewhere_says_so(drawn, tmp_path):
    said = []
    train_run(tiny, tmp_path, drawn, minutes=1e-9, say=quiet)
    path = tmp_path / 'config.json'
    path.write_text(path.read_text().replace('threads)', 'threads, another)'))
    train_run(tiny, tmp_path, drawn, minutes=1e-9, say=said.append)
    assert any('the same numbers up to rounding, not to the bit' in s for s in said)
