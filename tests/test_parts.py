"""Every part alone and together: the batch agrees with the loop over tasks, MAML's value gives MAML, gradients are
slopes."""
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.func import functional_call

from mamlpp_nb.maml import (MetaParameters, at_step, evaluate, gradient_error, inner_loop, load_meta, maml_parameters,
                            meta_loss, naive_meta_loss, row, save_meta)
from mamlpp_nb.mamlpp import (Method, Schedule, cosine_rate, find_method, loss_parts, method_loop, method_parameters,
                              methods, outer_rate, parts)
from mamlpp_nb.multi_step import multi_step_weights, naive_graded_loss
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.per_step_norm import gather_statistics, per_step_norm, predict_targets, target_norms, with_statistics
from mamlpp_nb.diagnostics import idle_parameters
from mamlpp_nb.step_sizes import step_size_kinds, step_size_tables
from mamlpp_nb.tasks import EpisodeSampler
from test_maml import Smooth, learned_gradients, noise_episodes

schedule = Schedule(n_epochs=6, multi_step_epochs=3, first_order_epochs=2)


def small(method, strided=False, n_steps=5, seed=0):
    net = Conv4(3, filters=6, strided=strided, seed=seed).double()
    return net, method_parameters(method, net, noise_episodes().support_x[0], n_steps)


def shaken(meta, seed=0, size=.05):
    "The meta-parameters with noise on everything learned, so that no two rows are equal."
    g = torch.Generator().manual_seed(seed)
    groups = [{k: ((t + size*torch.randn(t.shape, generator=g, dtype=t.dtype)).detach().requires_grad_()
                   if t.requires_grad else t) for k, t in table.items()} for table in meta]
    return MetaParameters(*groups)


every = [Method(*p) for p in
         itertools.product((False, True), (False, True), step_size_kinds, ('second', 'first'), (False,))]


@pytest.mark.parametrize('strided', [False, True], ids=['pooling', 'strided'])
@pytest.mark.parametrize('method', every, ids=lambda m: (
    f'{m.multi_step:d}{m.per_step_norm:d}-{m.step_sizes}-{m.derivative}'.replace(' ', '_')))
def test_every_subset_of_parts_agrees_with_the_loop_over_tasks(method, strided):
    net, meta = small(method, strided, n_steps=3)
    meta, e, arguments = shaken(meta), noise_episodes(n_tasks=2), loss_parts(method, schedule, 1, n_steps=3)
    loss, _ = meta_loss(task_batched(net), meta, e, **arguments)
    yardstick = naive_graded_loss(net, meta, e, arguments['loss_weights'] or [0, 0, 1.], arguments['second_order'])
    assert abs(loss - yardstick) < 1e-11
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


@pytest.mark.parametrize('n_steps', range(1, 11))
@pytest.mark.parametrize('epoch', [0, 2, 5])
def test_mamlpp_agrees_with_the_loop_over_tasks_at_any_number_of_steps(n_steps, epoch):
    net, meta = small(methods['mamlpp'], n_steps=n_steps)
    meta = shaken(meta)
    e = noise_episodes(n_tasks=2)
    arguments = loss_parts(methods['mamlpp'], schedule, epoch, n_steps)
    loss, _ = meta_loss(task_batched(net), meta, e, **arguments)
    yardstick = naive_graded_loss(net, meta, e, arguments['loss_weights'], arguments['second_order'])
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


def test_the_two_yardsticks_agree():
    net, meta = small(methods['maml'])
    e = noise_episodes(n_tasks=2)
    a, b = naive_meta_loss(net, meta, e), naive_graded_loss(net, meta, e, [0, 0, 0, 0, 1.])
    assert gradient_error(learned_gradients(a, meta), learned_gradients(b, meta)) < 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('change', [
    lambda meta: (meta, {'loss_weights': multi_step_weights(5, 10, 10)}),           # MSL after annealing
    lambda meta: (meta, {'loss_weights': multi_step_weights(5, 0, 0)}),             # MSL never
    lambda meta: (per_step_norm(meta, 5), {}),                                      # BNWB with equal rows
    lambda meta: (per_step_norm(meta, 1), {}),
    lambda meta: (step_size_tables(meta, 'per layer and step', .1, 5), {}),         # LSLR, all rates equal
    lambda meta: (step_size_tables(meta, 'per weight', .1), {}),                    # Meta-SGD, all rates equal
    lambda meta: (step_size_tables(meta, 'constant', .1), {}),
    lambda meta: (meta, loss_parts(find_method('maml+da'), Schedule(first_order_epochs=0), 0)), # DA never
], ids=['msl-annealed', 'msl-none', 'bn', 'bn-1-row', 'lslr', 'per-weight', 'constant', 'da-none'])
def test_a_part_at_its_maml_value_is_maml_to_the_bit(change, dtype):
    net, e = Conv4(3, filters=6).to(dtype), noise_episodes(dtype=dtype)
    plain = maml_parameters(net, .1)
    other, arguments = change(plain)
    a, hits = meta_loss(task_batched(net), plain, e)
    b, other_hits = meta_loss(task_batched(net), other, e, **arguments)
    assert torch.equal(a, b) and torch.equal(hits, other_hits)
    start, other_start = (torch.autograd.grad(l, list(m.start.values())) for l, m in ((a, plain), (b, other)))
    assert all(torch.equal(s, o) for s, o in zip(start, other_start))


def test_constant_cosine_is_the_constant_rate():
    assert {outer_rate(methods['mamlpp'], Schedule(last_outer_lr=1e-3), e) for e in range(100)} == {1e-3}


@pytest.mark.parametrize('epoch', [0, 2, 4], ids=['first order and all losses', 'all losses', 'all annealed'])
def test_the_whole_meta_gradient_is_the_slope(epoch):
    net, method = Smooth().double(), methods['mamlpp']
    e = noise_episodes(way=2, shot=2, n_tasks=2, size=4)
    meta = shaken(method_parameters(method, net, e.support_x[0], n_steps=3, inner_lr=.3), size=.1)
    arguments = loss_parts(method, schedule, epoch, 3)
    kinds = {k.split('/')[0] for k in meta.learned()}
    assert kinds == {'start', 'per_step', 'step_sizes'}
    def value(learned, second_order=True):
        groups = [{k: learned.get(f'{g}/{k}', t) for k, t in table.items()} for g, table in meta._asdict().items()]
        return meta_loss(task_batched(net), MetaParameters(*groups), e,
                         **{**arguments, 'second_order': second_order})[0]
    exact = dict(zip(meta.learned(), torch.autograd.grad(value(meta.learned()), list(meta.learned().values()))))
    whole, h = torch.cat([g.flatten() for g in exact.values()]).norm(), 1e-5
    for name, tensor in meta.learned().items():
        slope = torch.zeros_like(tensor)
        for j in range(tensor.numel()):
            nudge = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            nudge[j] = h
            above, below = (
                value({**meta.learned(), name: (tensor.detach() + s*nudge.view(tensor.shape)).requires_grad_()})
                for s in (1, -1))
            slope.view(-1)[j] = (above - below).item()/(2*h)
        assert (slope - exact[name]).norm() < 1e-6*max(exact[name].norm(), 1e-3*whole), name
    if not arguments['second_order']: # what training uses there is not the slope: that is what 'first order' means
        first = torch.autograd.grad(value(meta.learned(), False), list(meta.learned().values()))
        assert gradient_error(first, list(exact.values())) > 1e-3


@pytest.mark.parametrize('name', [*methods, 'maml+msl+da', 'maml+ca+lslr+bn'])
@pytest.mark.parametrize('strided', [False, True], ids=['pooling', 'strided'])
def test_every_name_trains_and_is_evaluated_with_fewer_and_more_steps(name, strided, drawn):
    net, method = Conv4(5, filters=6, strided=strided), find_method(name)
    deal = EpisodeSampler(drawn['train'], n_target=1)
    meta = method_parameters(method, net, deal(0).support_x[0], n_steps=3)
    before = {k: t.detach().clone() for k, t in meta.learned().items()}
    loop = method_loop(method, task_batched(net), meta, deal, schedule, lambda i: i, n_steps=3, n_tasks=2)
    rates = [p.loss for p in itertools.islice(loop, 4)]
    assert all(0 < r < 20 for r in rates)
    idle = {f'start/{k}' for k in idle_parameters(net, deal(0).support_x[0])}
    assert all((t != before[k]).any() for k, t in meta.learned().items() if k not in idle)
    for n_steps in (1, 2, 5, 8):
        assert (evaluate(task_batched(net), meta, EpisodeSampler(drawn['test'], n_target=1), 3, n_steps).per_task.shape
                == (3, n_steps+1))


def test_a_step_without_a_row_takes_the_last():
    net, meta = small(methods['mamlpp'], n_steps=2)
    meta, e = shaken(meta), noise_episodes()
    for table in (meta.per_step, meta.step_sizes):
        assert all(torch.equal(row(table, 7)[k], t[-1]) for k, t in table.items())
    longer = MetaParameters(meta.start, *(
        {k: torch.cat([t, t[-1:], t[-1:]]) if len(t) > 1 else t for k, t in table.items()} for table in meta[1:]))
    a, b = (list(inner_loop(task_batched(net), m, e.support_x, e.support_y, 4, False)) for m in (meta, longer))
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


@pytest.mark.parametrize('refused, named', [
    (lambda: find_method('maml+lslrr'), 'maml+lslr'),
    (lambda: find_method('mamlplusplus'), 'mamlpp'),
    (lambda: find_method('maml+msl+msl'), 'parts are'),
    (lambda: find_method('mamlpp+msl'), 'join parts'),
    (lambda: Method(step_sizes='per layer'), 'per layer and step'),
    (lambda: Method(derivative='third'), 'annealed'),
    (lambda: step_size_tables(maml_parameters(Conv4()), 'per-weight'), 'per weight'),
    (lambda: predict_targets(Conv4(), 'batch'), 'targets, running, support'),
    (lambda: multi_step_weights(0, 0, 1), 'n_steps'),
    (lambda: multi_step_weights(5, -1, 1), 'epoch'),
    (lambda: multi_step_weights(5, 0, -1), 'anneal_epochs'),
    (lambda: per_step_norm(maml_parameters(Conv4()), 0), 'n_steps'),
    (lambda: step_size_tables(maml_parameters(Conv4()), 'constant', n_steps=0), 'n_steps'),
    (lambda: Schedule(n_epochs=0), 'n_epochs'),
    (lambda: Schedule(outer_lr=-1), 'outer_lr'),
    (lambda: Schedule(first_order_epochs=-1), 'first_order_epochs'),
    (lambda: Schedule(outer_lr=float('nan')), 'outer_lr'),
])
def test_impossible_settings_are_refused_with_the_possible_ones(refused, named):
    with pytest.raises(ValueError) as e: refused()
    assert named in str(e.value)
    with pytest.raises(TypeError): Method(multistep=True)


@given(n_steps=st.integers(1, 12), epoch=st.integers(0, 200), anneal=st.integers(0, 150))
@settings(max_examples=200, deadline=None)
def test_loss_weights_are_weights(n_steps, epoch, anneal):
    w = multi_step_weights(n_steps, epoch, anneal)
    assert len(w) == n_steps and abs(sum(w) - 1) < 1e-12 and min(w) >= 0 and max(w) <= w[-1] + 1e-12
    if epoch >= anneal: assert w == [0.]*(n_steps-1) + [1.]
    else: # the published pair of formulas
        early = max(1/n_steps - epoch/(n_steps*anneal), .03/n_steps)
        last = min(1/n_steps + epoch*(n_steps-1)/(n_steps*anneal), 1 - (n_steps-1)*.03/n_steps)
        assert w[:-1] == [early]*(n_steps-1) and abs(w[-1] - last) < 1e-12


def test_target_passes_that_weigh_nothing_are_not_made():
    net, meta = small(methods['mamlpp'])
    e, seen, forward = noise_episodes(target=4), [], task_batched(net)
    def counted(weights, x):
        seen.append(x.shape[1])
        return forward(weights, x)
    for epoch, passes in ((0, 5), (2, 5), (3, 1), (5, 1)):
        seen.clear()
        meta_loss(counted, meta, e, **loss_parts(methods['mamlpp'], schedule, epoch))
        assert (seen.count(3), seen.count(12)) == (5, passes)


def test_cosine_rate_is_torchs():
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=100, eta_min=1e-5)
    for epoch in range(101):
        assert cosine_rate(epoch, 100) == pytest.approx(adam.param_groups[0]['lr'], rel=1e-9)
        adam.step()
        theirs.step()
    assert cosine_rate(250, 100) == pytest.approx(1e-5)


def test_the_outer_rate_reaches_adam(drawn):
    net, method = Conv4(5, filters=4), find_method('maml+ca')
    deal = EpisodeSampler(drawn['train'], n_target=1)
    meta = method_parameters(method, net, deal(0).support_x[0], 1)
    loop = method_loop(method, task_batched(net), meta, deal,
                       Schedule(n_epochs=4, outer_lr=1e-3, last_outer_lr=1e-9), lambda i: i, 1, 1)
    moves = []
    for _ in range(5):
        before = meta.start['head.weight'].detach().clone()
        next(loop)
        moves.append((meta.start['head.weight'] - before).abs().max().item())
    assert moves[0] == pytest.approx(1e-3, rel=.01) and moves[4] < 1e-8 # Adam's first step is as long as its rate


# batch norm

def ready(method='mamlpp', n_steps=3):
    net, meta = small(find_method(method), n_steps=n_steps)
    return net, shaken(meta)


class Deal:
    "A sampler of noise."
    def __call__(self, first, n): return noise_episodes(n_tasks=n, target=3, seed=first)


def test_statistics_are_those_of_each_task_and_change_nothing():
    net, meta = ready()
    e = noise_episodes(n_tasks=2)
    weights = at_step(meta, {k: w.expand(2, *w.shape) for k, w in meta.start.items()}, 0)
    logits, seen = with_statistics(net)(weights, e.target_x)
    assert (torch.equal(logits, task_batched(net)(weights, e.target_x))
            and not any(m._forward_pre_hooks for m in net.modules()))
    for t in range(2): # by hand, one task at a time, up to the second norm
        own = {k: w[t] for k, w in weights.items()}
        x = torch.nn.functional.conv2d(e.target_x[t], own['conv0.weight'], own['conv0.bias'], padding=1)
        assert (torch.allclose(seen['norm0.running_mean'][t], x.mean((0, 2, 3)))
                and torch.allclose(seen['norm0.running_var'][t], x.var((0, 2, 3))))
    assert ({k: tuple(s.shape) for k, s in seen.items()}
            == {f'norm{i}.running_{s}': (2, 6) for i in range(4) for s in ('mean', 'var')})


@pytest.mark.parametrize('portion', [1, 2, 5])
def test_running_statistics_are_means_over_tasks_for_each_step(portion):
    net, meta = ready()
    kept = {k: t.detach().clone() for k, t in meta.named().items()}
    class Fixed:
        def __call__(self, first, n):
            return dataclasses.replace(all_, **{
                f: getattr(all_, f)[first:first+n]
                for f in ('support_x', 'support_y', 'target_x', 'target_y', 'classes', 'rows', 'turns')})
    all_ = noise_episodes(n_tasks=5, target=3)
    more = gather_statistics(net, meta, Fixed(), 5, 3, portion)
    assert (all(torch.equal(t, meta.named()[k]) for k, t in kept.items())
            and more.learned().keys() == meta.learned().keys())
    for i, fast in enumerate(inner_loop(task_batched(net), meta, all_.support_x, all_.support_y, 3, False)):
        x = torch.stack([torch.nn.functional.conv2d(all_.target_x[t], fast['conv0.weight'][t], fast['conv0.bias'][t],
                                                    padding=1) for t in range(5)])
        assert torch.allclose(more.per_step['norm0.running_mean'][i], x.mean((1, 3, 4)).mean(0), atol=1e-10)
        assert torch.allclose(more.per_step['norm0.running_var'][i],
                              x.transpose(1, 2).flatten(2).var(-1).mean(0), atol=1e-10)


def test_running_statistics_survive_the_file_and_leave_training_alone(tmp_path):
    net, meta = ready()
    more, e = gather_statistics(net, meta, Deal(), 4, 3), noise_episodes()
    save_meta(tmp_path/'m.safetensors', more, {})
    again, _ = load_meta(tmp_path/'m.safetensors')
    assert (all(torch.equal(t, again.named()[k]) for k, t in more.named().items())
            and again.learned().keys() == meta.learned().keys())
    assert torch.equal(meta_loss(task_batched(net), meta, e, 3)[0], meta_loss(task_batched(net), more, e, 3)[0])


@pytest.mark.parametrize('norm', target_norms)
def test_targets_one_at_a_time_differ_only_where_they_share_statistics(norm):
    net, meta = ready()
    more, e = gather_statistics(net, meta, Deal(), 4, 3), noise_episodes(target=2)
    *_, fast = inner_loop(task_batched(net), more, e.support_x, e.support_y, 3, False)
    weights = at_step(more, fast, 2)
    together, alone = (predict_targets(net, norm, one)(weights, e) for one in (False, True))
    assert together.shape == alone.shape == (3, 6, 3)
    assert torch.allclose(together, alone, atol=1e-9) == (norm != 'targets')


def test_support_statistics_by_hand():
    net, meta = ready()
    e = noise_episodes(n_tasks=1)
    *_, fast = inner_loop(task_batched(net), meta, e.support_x, e.support_y, 3, False)
    own = {k: w[0] for k, w in at_step(meta, fast, 2).items()}
    s, t = e.support_x[0], e.target_x[0]
    for l in range(4):
        s, t = (torch.nn.functional.conv2d(x, own[f'conv{l}.weight'], own[f'conv{l}.bias'], padding=1) for x in (s, t))
        mean = s.mean((0, 2, 3), keepdim=True)
        biased, unbiased = ((s.var((0, 2, 3), correction=c, keepdim=True) + 1e-5).sqrt() for c in (0, 1))
        gamma, beta = (own[f'norm{l}.{p}'].view(1, -1, 1, 1) for p in ('weight', 'bias'))
        s, t = (x - mean for x in (s, t))
        s, t = (torch.nn.functional.max_pool2d(torch.nn.functional.leaky_relu(gamma*x/d + beta, .01), 2)
                for x, d in ((s, biased), (t, unbiased)))
    logits = functional_call(torch.nn.Linear(6, 3).double(),
                             {'weight': own['head.weight'], 'bias': own['head.bias']}, (t.flatten(1),))
    assert torch.allclose(predict_targets(net, 'support')(at_step(meta, fast, 2), e)[0], logits, atol=1e-9)


def test_running_needs_statistics():
    net, meta = ready()
    with pytest.raises(ValueError, match='gather_statistics'):
        evaluate(task_batched(net), meta, Deal(), 1, 2, predict=predict_targets(net, 'running'))


# step sizes

def test_idle_parameters_are_the_biases_before_batch_norm():
    x = torch.rand(4, 1, 28, 28)
    assert idle_parameters(Conv4(), x) == {f'conv{i}.bias' for i in range(4)} == idle_parameters(Conv4(strided=True), x)
    assert idle_parameters(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 3)), x) == frozenset()


def test_kinds_of_step_sizes_are_tables_of_different_shapes():
    net = Conv4(3, filters=6)
    idle = idle_parameters(net, torch.rand(4, 1, 28, 28))
    tables = {kind: step_size_tables(maml_parameters(net), kind, .1, 4, idle).step_sizes for kind in step_size_kinds}
    w = 'conv1.weight'
    wanted = { # others may have been added by who imports more
        'constant': ((1,), False), 'per layer and step': ((4,), True), 'per weight': ((1, 6, 6, 3, 3), True),
        'head only': ((1,), False), 'body only': ((1,), False)}
    assert {kind: (tuple(tables[kind][w].shape), tables[kind][w].requires_grad) for kind in wanted} == wanted
    assert not any(t[b].requires_grad for t in tables.values() for b in idle)
    moving = {kind: {k.split('.')[0] for k, a in t.items() if a.detach().abs().sum() > 0} for kind, t in tables.items()}
    assert moving['head only'] == {'head'} and moving['body only'] == {f'conv{i}' for i in range(4)}


def test_the_gradient_of_a_step_size_is_in_closed_form_after_one_step():
    net, meta = small(find_method('maml+lslr'), n_steps=1)
    e, forward = noise_episodes(), task_batched(net)
    loss, _ = meta_loss(forward, meta, e, 1)
    fast = next(inner_loop(forward, meta, e.support_x, e.support_y, 1))
    leaf = {k: w.detach().requires_grad_() for k, w in fast.items()}
    outputs = forward(at_step(meta, leaf, 0), e.target_x)
    target = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), e.target_y.flatten())
    downhill = dict(zip(leaf, torch.autograd.grad(target, list(leaf.values()))))
    for k, alpha in meta.step_sizes.items(): # dL/dα = -<dL/dθ₁, ∇L_S(θ₀)>, and θ₀ - θ₁ = α∇L_S(θ₀)
        if alpha.requires_grad:
            by_hand = -(downhill[k]*(meta.start[k] - fast[k])/alpha[0]).sum()
            assert torch.autograd.grad(loss, alpha, retain_graph=True)[0][0] == pytest.approx(by_hand.item(), rel=1e-9)


def test_step_sizes_may_turn_negative():
    net, method = Conv4(3, filters=6).double(), find_method('maml+lslr')
    meta = step_size_tables(method_parameters(method, net, noise_episodes().support_x[0], 2),
                            'per layer and step', 1e-3, 2)
    adam, e = torch.optim.Adam(meta.step_sizes.values(), lr=.01), noise_episodes(target=1)
    for _ in range(10):
        loss, _ = meta_loss(task_batched(net), meta, e, 2)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert min(a.min().item() for a in meta.step_sizes.values()) < 0
    assert all(w.isfinite().all() for f in inner_loop(task_batched(net), meta, e.support_x, e.support_y, 2)
               for w in f.values())


def test_parts_and_methods_are_one_table():
    assert ({'maml', *(f'maml+{p}' for p in parts), 'mamlpp', 'meta-sgd', 'anil', 'boil', 'first-order-maml'}
            == set(methods))
    assert find_method('maml+msl+bn+lslr+da+ca') == methods['mamlpp'] != methods['maml'] == Method()
