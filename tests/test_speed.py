"The fast meta-step: agreement at full width, compiled and not; the road of other networks; falling back."
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import tape
from conftest import double
from mamlpp_nb import speed
from mamlpp_nb.adjoint import adjoint_gradient, autograd_calculus, join_episodes, operations, stack_seeds
from mamlpp_nb.maml import (Learner, OuterSteps, at_step, gradient_error, inner_loop, maml_parameters, meta_gradient,
                            outer_loop)
from mamlpp_nb.mamlpp import Schedule, find_method, loss_parts, method_parameters
from mamlpp_nb.multi_step import naive_graded_loss
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.per_step_norm import predict_targets, with_statistics
from mamlpp_nb.passes import Fused, conv4_calculus, programs_folder
from mamlpp_nb.speed import (all_at_once, fast_gradient, fast_inner_loop, fast_predicts, fast_statistics, fused_adam,
                             replay_on)
from mamlpp_nb.tasks import Episodes, EpisodeSampler




def naive(net, meta, e, n_steps=5, second_order=True, loss_weights=None):
    loss = naive_graded_loss(net, meta, e, loss_weights or [0.] * (n_steps - 1) + [1.], second_order)
    found = dict(zip(meta.learned(), torch.autograd.grad(loss, list(meta.learned().values()), allow_unused=True)))
    return loss.item(), {k: g for k, g in found.items() if g is not None}


def agree(found, loss, exact, bound):
    assert abs(found[0].item() - loss) <= bound * max(1, abs(loss))
    assert gradient_error([found[2][k] for k in exact], list(exact.values())) <= bound
    assert all(not g.any() for k, g in found[2].items() if k not in exact) # what nothing depends on


def scattered(net, method, e): # no table with equal rows, no gamma with one sign
    meta, g = method_parameters(find_method(method), net, e.support_x[0]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k, t in meta.learned().items():
            t += ((.5 if k.startswith('per_step') else .02) * torch.randn(t.shape, generator=g, dtype=t.dtype)
                  * (2 if 'norm' in k and 'weight' in k else 1))
    return meta


@pytest.mark.parametrize('strided', [False, True])
@pytest.mark.parametrize('filters, compiled', [(12, False), pytest.param(64, False, marks=pytest.mark.weekly),
                                               pytest.param(64, True, marks=pytest.mark.weekly)])
def test_any_width_agrees_with_the_naive_loop_in_float64(drawn, strided, filters, compiled):
    net = Conv4(5, filters=filters, strided=strided).double()
    e = double(EpisodeSampler(drawn['train'], 5, 1, 1, rotate=True)(0, 2))
    gradient = fast_gradient(net, compiled)
    for method, epoch in ((('mamlpp', 0), ('mamlpp', 99), ('maml', 0), ('maml+bn', 0))
                          if not compiled else (('mamlpp', 0), ('maml', 0))):
        meta, parts = scattered(net, method, e), loss_parts(find_method(method), Schedule(first_order_epochs=0), epoch)
        agree(gradient(None, meta, e, **parts), *naive(net, meta, e, **parts), 1e-8)


@pytest.mark.parametrize('method', ['maml', 'maml+msl', 'maml+lslr', 'mamlpp', 'meta-sgd', 'anil', 'boil',
                                    'first-order-maml'])
def test_every_method_with_every_road(drawn, method):
    e = double(EpisodeSampler(drawn['train'], 3, 2, 1)(5, 3))
    for strided, n_steps in ((False, 1), (False, 3), (True, 3)):
        net = Conv4(3, filters=6, strided=strided).double()
        meta = scattered(net, method, e)
        parts = loss_parts(find_method(method), Schedule(first_order_epochs=0), 0, n_steps)
        loss, exact = naive(net, meta, e, **parts)
        for calculus, recompute in itertools.product(
                (conv4_calculus(net), conv4_calculus(net)._replace(portion=lambda x: 2),
                 autograd_calculus(task_batched(net), 2)), (False, True)):
            agree(adjoint_gradient(calculus, meta, e, recompute=recompute, **parts), loss, exact, 1e-9)


@pytest.mark.parametrize('size, channels', [(16, 1), (29, 3), (33, 1)])
def test_any_size_of_image(size, channels):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 6, channels, size, size, generator=g, dtype=torch.float64)
    y = torch.arange(3).repeat(2, 2)
    z = torch.zeros(2, 3, dtype=torch.int64)
    e = Episodes(x, y, x.flip(1), y.flip(1), z, z, z)
    for strided, blocks in ((False, 4), (True, 4), (True, 6), (False, 3), (False, 1)):
        net = Conv4(3, channels, size, 5, strided, blocks=blocks).double()
        meta = scattered(net, 'mamlpp', e)
        agree(fast_gradient(net)(None, meta, e, n_steps=5), *naive(net, meta, e), 1e-9)


def test_what_enters_the_network_is_changed_as_its_hook_says(drawn):
    net, e = Conv4(5, filters=6).double(), double(EpisodeSampler(drawn['train'], 5, 1, 1)(0, 2))
    net.register_forward_pre_hook(lambda net, inputs: ((inputs[0] - .3) * 4,))
    meta = scattered(net, 'mamlpp', e)
    agree(fast_gradient(net)(None, meta, e), *naive(net, meta, e), 1e-9)


class Wide(Conv4):
    "A network of somebody's own."
    def forward(self, x): return super().forward(x) * 1.5


def test_other_networks_take_the_general_road(drawn):
    e = double(EpisodeSampler(drawn['train'], 3, 1, 2)(0, 3))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    hooked = Conv4(3, filters=4).double()
    hooked.norm1.register_forward_hook(lambda m, i, out: out * 2)
    for net in (plain, Wide(3, filters=4).double(), hooked):
        meta, forward = maml_parameters(net, .05), task_batched(net)
        loss, _, exact = meta_gradient(forward, meta, e, n_steps=3)
        agree(fast_gradient(net)(forward, meta, e, n_steps=3), loss.item(), exact, 1e-10)
        if isinstance(net, Conv4):
            with pytest.raises(ValueError, match='unchanged Conv4'): conv4_calculus(net)


def test_float32_is_no_further_from_the_truth_than_the_naive_loop(real):
    sampler, errors = EpisodeSampler(real['train'], 5, 1, 1, rotate=True), {'naive': [], 'fast': []}
    for seed in range(8):
        e, parts = sampler(seed, 1), {'loss_weights': [.2] * 5}
        nets = {t: Conv4(5, filters=16, seed=seed).to(t) for t in (torch.float32, torch.float64)}
        metas = {t: method_parameters(find_method('mamlpp'), net, e.support_x[0].to(t)) for t, net in nets.items()}
        exact = {k: g for k, g in naive(nets[torch.float64], metas[torch.float64], double(e), **parts)[1].items()
                 if k.startswith('start/') and k.endswith('weight')}
        for way, found in (
                ('naive', naive(nets[torch.float32], metas[torch.float32], e, **parts)[1]),
                ('fast', fast_gradient(nets[torch.float32])(None, metas[torch.float32], e, **parts)[2])):
            errors[way].append(gradient_error([found[k].double() for k in exact], list(exact.values())))
    assert sorted(errors['fast'])[4] <= sorted(errors['naive'])[4]


def test_the_outer_loop_learns_the_same_with_either(drawn):
    curves = []
    for fast in (False, True):
        net = Conv4(3, filters=6).double()
        sampler = EpisodeSampler(drawn['train'], 3, 1, 1)
        meta = method_parameters(find_method('mamlpp'), net, double(sampler(0)).support_x[0])
        gradient = fast_gradient(net) if fast else meta_gradient
        loop = outer_loop(task_batched(net), meta, lambda first, n: double(sampler(first, n)),
                          torch.optim.Adam(meta.learned().values(), 1e-3), 2, 0,
                          lambda i: {'loss_weights': [.2] * 5}, gradient=gradient)
        curves.append([next(loop).loss for _ in range(20)])
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-9


def test_impossible_weights_are_refused(drawn):
    net, e = Conv4(3, filters=4), EpisodeSampler(drawn['train'], 3)(0, 2)
    for weights in ([1.], [0.] * 5):
        with pytest.raises(ValueError, match='loss_weights'):
            fast_gradient(net)(None, maml_parameters(net), e, loss_weights=weights)


@pytest.mark.parametrize('strided, size, channels, targets, blocks', [
    (False, 28, 1, 5, 4), (True, 28, 1, 10, 4), (True, 28, 1, 5, 6), (False, 84, 3, 15, 4)])
def test_the_count_is_what_pytorch_counts(strided, size, channels, targets, blocks):
    from torch.utils.flop_counter import FlopCounterMode
    net = Conv4(5, channels, size, 8, strided, blocks=blocks)
    def x(n): return torch.rand(2, n, channels, size, size)
    def y(n): return (torch.arange(n) % 5).repeat(2, 1)
    z = torch.zeros(2, 5, dtype=torch.int64)
    e = Episodes(x(5), y(5), x(targets), y(targets), z, z, z)
    meta = maml_parameters(net, .1)
    for second_order in (False, True):
        with FlopCounterMode(display=False) as counter: naive(net, meta, e, 3, second_order, [.2, 0., .8])
        # autograd does a little that nobody asked for
        assert 1 <= counter.get_total_flops() / operations(net, size, 5, targets, 2, 3, 2, second_order) < 1.1


def test_without_a_compiler_one_line_says_so_and_the_step_runs(tmp_path):
    code = '''
import torch
from mamlpp_nb.network import Conv4
from mamlpp_nb.maml import maml_parameters
from mamlpp_nb.speed import fast_gradient
from mamlpp_nb.tasks import EpisodeSampler, glyphs
e, net = EpisodeSampler(glyphs()['train'], 3)(0, 2), Conv4(3, filters=4)
a, b = (fast_gradient(net, c)(None, maml_parameters(net), e)[2] for c in (False, True))
assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
'''
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'CXX': '/nowhere/c++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path)})
    assert said.returncode == 0, said.stderr
    lines = [l for l in said.stderr.splitlines() if 'uncompiled' in l]
    assert len(lines) == 1 and 'torch.compile does not work here' in lines[0]


def test_programs_are_to_be_kept_in_the_cache_folder_unless_somebody_chose_another(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for chosen, kept in (('/tmp/torchinductor_me', tmp_path / 'mamlpp_nb/compiled'),
                         (str(tmp_path / 'mine'), tmp_path / 'mine')):
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', chosen)
        assert programs_folder() == kept
        Fused(torch.sin).compiled() # compiles at its first call, which never comes
        assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == str(kept)


@pytest.mark.weekly
def test_programs_are_kept_in_the_cache_folder(tmp_path):
    code = """
import torch
from mamlpp_nb.passes import Fused
from mamlpp_nb.speed import fused_adam
from mamlpp_nb.maml import maml_parameters
from mamlpp_nb.network import Conv4
fused_adam(maml_parameters(Conv4(3, filters=4))) # makes torch choose a temporary folder
Fused(lambda x: x.sin() + 1)(torch.zeros(3))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300,
                   env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
    assert list((tmp_path / "mamlpp_nb/compiled").rglob("*.cpp"))


def learner(drawn, seed, method='mamlpp', strided=False, average=False):
    net = Conv4(3, filters=6, strided=strided, seed=seed)
    meta = method_parameters(find_method(method), net, EpisodeSampler(drawn['train'], 3, 1, 1)(0).support_x[0], 3)
    return net, Learner(meta, EpisodeSampler(drawn['train'], 3, 1, 2, seed, rotate=True), fused_adam(meta, 2e-3),
                        {k: t.detach().clone() for k, t in meta.learned().items()} if average else {})


def outer_steps(drawn, seeds, method='mamlpp', captured=False, changed=lambda gradient: gradient, **settings):
    made = [learner(drawn, s, method, average=True) for s in seeds]
    net, learners = made[0][0], [l for _, l in made]
    return OuterSteps(task_batched(net), learners, 2, changed(fast_gradient(net)), decay=.9, longest=8,
                      together=all_at_once, replayed=replay_on('cpu') if captured else None, **settings)


@pytest.fixture
def one_thread():
    "The tape sees what its own thread does."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_threads_change_no_bit(drawn):
    "Tasks go side by side where torch may use more than one core"
    e, net, found = EpisodeSampler(drawn['train'], 5, rotate=True)(0, 5), Conv4(5, filters=8), []
    meta = scattered(net, 'mamlpp', e)
    before = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        try:
            *rest, gradients = fast_gradient(net)(None, meta, e)
            *_, fast = fast_inner_loop(net)(None, meta, e.support_x, e.support_y)
            logits = fast_predicts(net)['support'](at_step(meta, fast, 4), e)
            assert torch.get_num_threads() == n
        finally: torch.set_num_threads(before)
        found.append([*rest, *gradients.values(), *fast.values(), logits])
    for other in found[1:]: assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


plan = [(0, 3, 2e-3, dict(second_order=True, loss_weights=[.2, .3, .5])),
        (3, 2, 1e-3, dict(second_order=True, loss_weights=[.1, .1, .8])),
        (5, 2, 5e-4, dict(second_order=False, loss_weights=[0., 0., 1.])),
        (7, 4, 5e-4, dict(second_order=True)),
        (11, 2, 1e-4, dict(second_order=True, loss_weights=[.2, .3, .5]))]


def go(steps): return torch.cat([steps.run(first, n, rate, n_steps=3, **parts) for first, n, rate, parts in plan])


@pytest.mark.parametrize('seeds, clamp', [
    ([0, 1], .05), *(pytest.param(*more, marks=pytest.mark.weekly)
                     for more in (([0], .05), ([0], 0.), ([0, 1, 2], 0.), ([0, 1, 2], .05)))])
def test_a_captured_step_does_what_an_uncaptured_one_does(drawn, one_thread, monkeypatch, seeds, clamp):
    "Rates, loss weights, iteration, clamping and average are read anew by every replay, and no value is looked at"
    plain, taped = (outer_steps(drawn, seeds, clamp=clamp, captured=c) for c in (False, True))
    monkeypatch.setattr(speed, 'capture', tape.capture)
    assert go(plain).equal(go(taped))
    assert len(taped.programs) == 3 # all targets, the last alone by first order, the last alone by second order
    for a, b in zip(plain.learners, taped.learners):
        assert all(s.equal(t) for s, t in zip(a.moving(), b.moving()))


def test_the_tape_refuses_looks():
    with pytest.raises(RuntimeError, match='capturing'), tape.Tape(): torch.ones(1).item()


def test_what_cannot_be_captured_runs_as_it_is_and_says_so(drawn, one_thread, monkeypatch, capsys):
    "`meta_gradient` looks at labels and at the weights of losses"
    plain, taped = (outer_steps(drawn, [0], captured=c, changed=lambda gradient: meta_gradient) for c in (False, True))
    monkeypatch.setattr('mamlpp_nb.progress._told', set())
    monkeypatch.setattr(speed, 'capture', tape.capture)
    assert go(plain).equal(go(taped))
    assert capsys.readouterr().err.count('cannot be captured') == 1


@pytest.mark.parametrize('method', ['maml', 'mamlpp', 'meta-sgd', 'anil'])
def test_seeds_at_once_learn_what_each_learns_alone(drawn, method):
    together = outer_steps(drawn, [0, 1, 2], method=method)
    logs = go(together)
    for s in range(3):
        alone = outer_steps(drawn, [s], method=method)
        assert go(alone)[:, 0].allclose(logs[:, s], rtol=1e-4, atol=1e-5)
        for a, b in zip(alone.learners[0].moving(), together.learners[s].moving()):
            assert a.allclose(b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('portion', [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize('method', ['mamlpp', 'meta-sgd', 'boil'])
def test_seeds_in_any_portions(drawn, portion, method):
    nets = [Conv4(3, filters=4, seed=s).double() for s in range(3)]
    batches = [double(EpisodeSampler(drawn['train'], 3, 1, 1, s)(0, 3)) for s in range(3)]
    metas = [scattered(n, method, e) for n, e in zip(nets, batches)]
    parts = dict(n_steps=3, loss_weights=[.2, 0., .8])
    found = adjoint_gradient(conv4_calculus(nets[0])._replace(portion=lambda x: portion),
                             stack_seeds(metas), join_episodes(batches), n_seeds=3, **parts)
    for s in range(3):
        alone = adjoint_gradient(conv4_calculus(nets[0]), metas[s], batches[s], **parts)
        assert found[0][s].allclose(alone[0], rtol=1e-10) and found[1][s].allclose(alone[1])
        assert gradient_error([found[2][k][s] for k in alone[2]], list(alone[2].values())) < 1e-9


@pytest.mark.parametrize('captured', [False, True])
def test_steps_before_a_bad_one_are_kept(drawn, monkeypatch, captured):
    monkeypatch.setattr(speed, 'capture', tape.capture)
    rows = EpisodeSampler(drawn['train'], 3, 1, 2, 1, rotate=True)(2 * 4, 2).rows
    def poisoning(fine):
        def poisoned(forward, meta, e, **parts):
            loss, accuracy, g = fine(forward, meta, e, **parts)
            hit = (e.rows[2:] == rows).all() # step 4 of seed 1
            return loss, accuracy, {k: torch.where(hit, torch.inf, t) if k == 'start/head.weight' else t
                                    for k, t in g.items()}
        return poisoned
    good, bad = outer_steps(drawn, [0, 1]), outer_steps(drawn, [0, 1], captured=captured, changed=poisoning)
    assert bad.run(0, 8, 1e-3, n_steps=3).equal(good.run(0, 4, 1e-3, n_steps=3))
    for a, b in zip(good.learners, bad.learners):
        assert all(s.equal(t) for s, t in zip(a.moving(), b.moving()))
    assert not len(bad.run(4, 3, 1e-3, n_steps=3))
    with pytest.raises(ValueError, match='1 to 8'): bad.run(0, 9)


def test_the_inner_loop_without_a_graph(drawn):
    e = double(EpisodeSampler(drawn['train'], 3, 2, 1)(5, 5))
    for net in (Conv4(3, filters=6).double(), Wide(3, filters=6).double()):
        meta = scattered(net, 'mamlpp', e)
        fast = list(fast_inner_loop(net)(task_batched(net), meta, e.support_x, e.support_y, 7))
        plain = list(inner_loop(task_batched(net), meta, e.support_x, e.support_y, 7, second_order=False))
        assert len(fast) == 7
        for a, b in zip(fast, plain):
            for k in b: assert a[k].allclose(b[k], rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match='second'):
        next(fast_inner_loop(net)(None, meta, e.support_x, e.support_y, second_order=True))


@pytest.mark.parametrize('strided, blocks', [(False, 4), (True, 4), (True, 5)])
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.weekly)])
def test_fast_predictions_say_what_the_plain_ones_say(strided, blocks, compiled):
    # colours, an odd size where it matters, more tasks than a portion, shifted pixels
    g, size = torch.Generator().manual_seed(0), 21 if strided else 19
    images = lambda n: torch.rand(5, n, 3, size, size, generator=g, dtype=torch.float64)
    e = Episodes(images(6), torch.arange(3).repeat(5, 2), 1.3 * images(9), torch.arange(3).repeat(5, 3),
                 torch.zeros(5, 3), None, None)
    net = Conv4(3, 3, size, 4, strided, blocks=blocks).double()
    net.register_forward_pre_hook(lambda net, inputs: ((inputs[0] - .4) / .3,))
    meta = scattered(net, 'mamlpp', e)
    for t in (t for k, t in meta.start.items() if k.endswith('bias')):
        t.data += torch.rand(t.shape, generator=g, dtype=t.dtype)
    fast, look = fast_predicts(net, compiled), fast_statistics(net, compiled)
    for i, weights in enumerate(inner_loop(task_batched(net), meta, e.support_x, e.support_y, 2, second_order=False)):
        weights = {k: w.detach() for k, w in at_step(meta, weights, i).items()}
        (logits, seen), (plain, exact) = look(weights, e.target_x), with_statistics(net)(weights, e.target_x)
        assert logits.allclose(plain, rtol=1e-9, atol=1e-9) and set(seen) == set(exact)
        for k in exact: assert seen[k].allclose(exact[k], rtol=1e-9, atol=1e-11)
        with pytest.raises(ValueError, match='gather_statistics'): fast['running'](weights, e)
        weights |= {k: 1.1 * s + .1 for k, s in exact.items()}
        said = {norm: predict(weights, e) for norm, predict in fast.items()}
        for norm, one in said.items(): assert one.allclose(predict_targets(net, norm)(weights, e), rtol=1e-9, atol=1e-9)
        assert (not said['targets'].allclose(said['support'], rtol=1e-3)
                and not said['targets'].allclose(said['running'], rtol=1e-3))


def test_the_compiled_pass_of_a_tiny_network_says_what_the_plain_one_says():
    "The least that still compiles all four blocks; gradient and product, and other sizes, are compiled weekly"
    net = Conv4(2, 1, 16, 2).double()
    weights = {k: w.detach()[None] for k, w in net.named_parameters()}
    x = torch.rand(1, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits, seen), (plain, exact) = (fast_statistics(net, compiled)(weights, x) for compiled in (True, False))
    assert logits.allclose(plain, rtol=1e-9, atol=1e-9)
    for k in exact: assert seen[k].allclose(exact[k], rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere programs are called from Python, part by part')
def test_a_compiled_program_lets_other_threads_run():
    "Another thread wakes every millisecond meanwhile; a program that kept Python to itself would let it wake twice"
    def long(x):
        for _ in range(60): x = x.sin()
        return x
    program, x = Fused(long), torch.rand(4_000_000)
    assert program(x).allclose(long(x), atol=1e-5)
    woken, done = [], threading.Event()
    def other():
        while not done.wait(.001): woken.append(None)
    waiting = threading.Thread(target=other)
    waiting.start()
    before = len(woken)
    program(x)
    counted = len(woken) - before
    done.set()
    waiting.join()
    assert counted > 10


def test_images_made_ready_are_those_that_are_asked_about():
    net, g = Conv4(3, filters=4).double(), torch.Generator().manual_seed(0)
    weights = {k: w.detach().expand(2, *w.shape) for k, w in net.named_parameters()}
    look = fast_statistics(net)
    for _ in range(3): # the second may lie where the first was
        x = torch.rand(2, 4, 1, 28, 28, generator=g, dtype=torch.float64)
        for _ in range(2): assert look(weights, x)[0].allclose(task_batched(net)(weights, x), rtol=1e-9, atol=1e-9)
        del x


def test_predictions_of_other_networks_take_the_plain_road():
    net = Wide(3, filters=4)
    weights = {k: w.detach().expand(2, *w.shape) for k, w in net.named_parameters()}
    x = torch.rand(2, 6, 1, 28, 28)
    e = Episodes(x, torch.arange(6).repeat(2, 1) % 3, x, torch.arange(6).repeat(2, 1) % 3,
                 torch.zeros(2, 3), None, None)
    for norm in ('targets', 'support'):
        assert fast_predicts(net)[norm](weights, e).equal(predict_targets(net, norm)(weights, e))


def test_weights_of_target_losses_are_as_exact_as_the_network(drawn):
    net = Conv4(3, filters=4).double()
    meta = method_parameters(find_method('mamlpp'), net,
                             EpisodeSampler(drawn['train'], 3, 1, 1)(0).support_x[0].double(), 2)
    deal = EpisodeSampler(drawn['train'], 3, 1, 2)
    of = fast_gradient(net)
    exact = lambda forward, m, e, **parts: of(forward, m, double(e), **parts)
    expected = exact(None, meta, deal(0, 2), n_steps=2, loss_weights=[.3, .7])[0].item()
    steps = OuterSteps(task_batched(net), [Learner(meta, deal, fused_adam(meta))], 2, exact)
    assert abs(steps.run(0, 1, n_steps=2, loss_weights=[.3, .7])[0, 0, 0].item() - expected) < 1e-14


def test_the_inner_loop_refuses_labels_without_an_output(drawn):
    e = EpisodeSampler(drawn['train'], 5)(0, 2)
    for net in (Conv4(5, 1, 28, 4), nn.Sequential(nn.Flatten(), nn.Linear(784, 5))): # by either road
        with pytest.raises(ValueError, match=r'\[0, 5\)'):
            next(fast_inner_loop(net)(task_batched(net), maml_parameters(net), e.support_x, e.support_y + 1))
