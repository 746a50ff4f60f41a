"""The road of a GPU: the same numbers as a CPU's, steps replayed as graphs, seeds at once,
and a run that goes on to the bit."""
import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from conftest import double
from mamlpp_nb.maml import Learner, OuterSteps, at_step, gradient_error
from mamlpp_nb.mamlpp import Schedule, find_method, loss_parts, method_parameters
from mamlpp_nb.multi_step import naive_graded_loss
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.per_step_norm import predict_targets
from mamlpp_nb.config import Config
from mamlpp_nb.machine import provenance, use_float32
from mamlpp_nb.processes import World
from mamlpp_nb.speed import all_at_once, fast_gradient, fast_inner_loop, fast_predicts, fused_adam, replay_on
from mamlpp_nb.tasks import EpisodeSampler
from mamlpp_nb.training import train_and_test

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
use_float32()

run = Config(data='glyphs', n_way=3, filters=8, n_steps=2, n_tasks=2, epochs=3, iterations=4, multi_step_epochs=1,
             first_order_epochs=1, average=.5, validation_tasks=4, test_tasks=4, keep=2)


@pytest.mark.parametrize('strided', [False, True])
@pytest.mark.parametrize('method', ['maml', 'maml+msl', 'maml+bn', 'mamlpp', 'meta-sgd', 'anil'])
def test_a_gpu_agrees_with_the_naive_loop_on_a_cpu(drawn, method, strided):
    e = double(EpisodeSampler(drawn['train'], 3, 2, 1)(0, 3))
    net, moved = (Conv4(3, filters=8, strided=strided).double() for _ in range(2))
    moved.cuda()
    parts = loss_parts(find_method(method), Schedule(first_order_epochs=0), 0, 3)
    meta = method_parameters(find_method(method), net, e.support_x[0], 3)
    weights = parts['loss_weights'] or [0., 0., 1.]
    loss = naive_graded_loss(net, meta, e, weights, parts['second_order'])
    exact = torch.autograd.grad(loss, list(meta.learned().values()), materialize_grads=True)
    there = e.each(torch.Tensor.cuda)
    found = fast_gradient(moved)(task_batched(moved),
                                 method_parameters(find_method(method), moved, there.support_x[0], 3), there,
                                 n_steps=3, **{k: v for k, v in parts.items() if k != 'n_steps'})
    assert abs(found[0].item() - loss.item()) < 1e-9
    assert gradient_error([found[2][k].cpu() for k in meta.learned() if k in found[2]],
                          [g for k, g in zip(meta.learned(), exact) if k in found[2]]) < 1e-8


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.weekly)])
@pytest.mark.parametrize('strided', [False, True])
def test_full_width(drawn, strided, compiled):
    e = EpisodeSampler(drawn['train'], 5, 1, 1)(0, 4)
    net, exact = Conv4(5, strided=strided).cuda(), Conv4(5, strided=strided).double()
    parts = loss_parts(find_method('mamlpp'), Schedule(first_order_epochs=0), 0, 5)
    meta = method_parameters(find_method('mamlpp'), exact, double(e).support_x[0])
    truth = fast_gradient(exact)(task_batched(exact), meta, double(e), **parts)[2]
    there = e.each(torch.Tensor.cuda)
    g = fast_gradient(net, compiled)(task_batched(net),
                                     method_parameters(find_method('mamlpp'), net, there.support_x[0]), there,
                                     **parts)[2]
    # a maximum may fall to another place
    assert gradient_error([g[k].cpu().double() for k in truth], list(truth.values())) < 1e-3


def learners(drawn, seeds):
    found = []
    for seed in seeds:
        net = Conv4(3, filters=8, seed=seed).cuda()
        deal = EpisodeSampler(drawn['train'].to('cuda'), 3, 1, 1, seed=seed, rotate=True)
        meta = method_parameters(find_method('mamlpp'), net, deal(0).support_x[0], 2)
        found.append(Learner(meta, deal, fused_adam(meta)))
    return net, found


def test_a_replayed_step_is_the_launched_step_and_seeds_go_on_at_once(drawn):
    parts, ends = {'n_steps': 2, 'loss_weights': [.5, .5], 'second_order': True}, {}
    for mark, replayed, seeds in (('launched', None, (0,)), ('replayed', replay_on('cuda'), (0,)),
                                  ('three', replay_on('cuda'), (0, 1, 2))):
        net, ls = learners(drawn, seeds)
        steps = OuterSteps(task_batched(net), ls, 2, fast_gradient(net), longest=5, together=all_at_once,
                           replayed=replayed)
        log = torch.cat([steps.run(0, 5, **parts), steps.run(5, 5, 1e-4, **parts)])
        ends[mark] = log[:, 0], torch.cat([t.detach().flatten() for t in ls[0].meta.learned().values()])
    assert (torch.equal(ends['launched'][1], ends['replayed'][1])
            and torch.equal(ends['launched'][0], ends['replayed'][0]))
    assert (torch.allclose(ends['launched'][0], ends['three'][0], atol=1e-4)
            and torch.allclose(ends['launched'][1], ends['three'][1], atol=1e-3))


def test_adaptation_and_predictions_agree(drawn):
    e = EpisodeSampler(drawn['test'], 3, 1, 2)(0, 4)
    net, moved = Conv4(3, filters=8).double(), Conv4(3, filters=8).cuda()
    meta = method_parameters(find_method('mamlpp'), net, double(e).support_x[0])
    theirs = method_parameters(find_method('mamlpp'), moved, e.support_x[0].cuda())
    *_, fast = fast_inner_loop(net)(task_batched(net), meta, double(e).support_x, e.support_y, 3)
    there = e.each(torch.Tensor.cuda)
    *_, quick = fast_inner_loop(moved)(task_batched(moved), theirs, there.support_x, there.support_y, 3)
    for k in fast: assert torch.allclose(fast[k].float(), quick[k].cpu(), atol=1e-4)
    weights = at_step(meta, fast, 2)
    moved_weights = {k: t.detach().float().cuda() for k, t in weights.items()}
    for norm in ('targets', 'support'):
        ours, exact = fast_predicts(moved)[norm](moved_weights, there), predict_targets(net, norm)(weights, double(e))
        assert torch.allclose(ours.cpu().double(), exact, atol=1e-3)


def test_a_run_stops_goes_on_and_ends_to_the_bit(drawn, tmp_path):
    world, configs = World(device='cuda'), [dataclasses.replace(run, seed=s) for s in (0, 1)]
    def folders(name): return [tmp_path / f'{name}{c.seed}' for c in configs]
    assert train_and_test(configs, folders('whole'), drawn, world, compiled=False) == 'complete'
    status = 'out of time'
    for _ in range(40):
        if status == 'complete': break
        status = train_and_test(configs, folders('pieces'), drawn, world, minutes=1e-9, compiled=False)
        if status != 'complete':
            status = train_and_test(configs, folders('pieces'), drawn, world, minutes=.02, compiled=False)
    assert status == 'complete'
    for a, b in zip(folders('whole'), folders('pieces')):
        one, other = (load_file(f / 'last.safetensors') for f in (a, b))
        assert one and all(torch.equal(t, other[k]) for k, t in one.items())


def test_what_ran_is_known_by_its_card():
    assert torch.cuda.get_device_name() in provenance('cuda')['device']
