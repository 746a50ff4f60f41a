"Networks beside Conv-4, and regression: through the same inner loop, with the same numbers as the loop over tasks."
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from mamlpp_nb.maml import (MetaParameters, SineWaves, gradient_error, inner_loop, maml_parameters, meta_loss,
                            naive_meta_loss, squared_errors)
from mamlpp_nb.mamlpp import Schedule, loss_parts, method_parameters, methods
from mamlpp_nb.multi_step import naive_graded_loss
from mamlpp_nb.network import Conv4, Perceptron, counted_operations, task_batched
from mamlpp_nb.networks import DropBlock, ResNet12, image_perceptron
from test_maml import learned_gradients, noise_episodes
from test_parts import shaken

narrow = (2, 3, 4, 5)


def networks(way=3, size=16):
    return {'resnet12': ResNet12(way, 1, size, narrow).double(),
            'perceptron': image_perceptron(way, 1, size, (6, 5)).double()}


@pytest.mark.parametrize('name', networks())
def test_the_batch_of_tasks_is_each_task_alone(name):
    net, x = networks()[name], noise_episodes(shot=2, size=16).support_x
    g = torch.Generator().manual_seed(0)
    weights = {k: p + .1 * torch.randn(3, *p.shape, dtype=p.dtype, generator=g) for k, p in net.named_parameters()}
    together = task_batched(net)(weights, x)
    alone = torch.stack([functional_call(net, {k: w[t] for k, w in weights.items()}, (x[t],)) for t in range(3)])
    assert together.shape == (3, 6, 3) and (together - alone).abs().max() < 1e-10


@pytest.mark.parametrize('second_order', [True, False], ids=['second', 'first'])
@pytest.mark.parametrize('name', networks())
def test_the_meta_gradient_is_the_naive_one(name, second_order):
    net, e = networks()[name], noise_episodes(n_tasks=2, size=16)
    meta = maml_parameters(net)
    loss = meta_loss(task_batched(net), meta, e, 2, second_order)[0]
    yardstick = naive_meta_loss(net, meta, e, 2, second_order)
    assert abs(loss - yardstick) < 1e-11
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


@pytest.mark.parametrize('second_order', [True, False], ids=['second', 'first'])
@pytest.mark.parametrize('method', [name for name, m in methods.items() if m.update == 'gradient step'])
@pytest.mark.parametrize('name', networks())
def test_every_method_is_the_loop_over_tasks(name, method, second_order):
    net, e = networks()[name], noise_episodes(n_tasks=2, size=16)
    meta = shaken(method_parameters(methods[method], net, e.support_x[0], 2))
    arguments = {**loss_parts(methods[method], Schedule(), 1, n_steps=2), 'second_order': second_order}
    loss, _ = meta_loss(task_batched(net), meta, e, **arguments)
    yardstick = naive_graded_loss(net, meta, e, arguments['loss_weights'] or [0, 1.], second_order)
    assert abs(loss - yardstick) < 1e-11
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('size, left', [(16, 1), (28, 1), (31, 1), (33, 2), (84, 5)])
def test_resnet12_takes_images_of_many_sizes(size, left, channels):
    net = ResNet12(4, channels, size, narrow)
    x = torch.randn(2, channels, size, size)
    assert net.blocks(x).shape == (2, 5, left, left) and net(x).shape == (2, 4)


@pytest.mark.parametrize('arguments, named', [
    (dict(size=15), '16 is the least'),
    (dict(widths=(64, 64)), 'four blocks'),
    (dict(drop_block=1.5), 'between 0 and 1'),
    (dict(drop_block=.1, block_size=0), 'block_size')])
def test_impossible_resnets_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named): ResNet12(**{'widths': narrow, **arguments})


def test_resnet12_is_the_published_one():
    net = ResNet12()
    assert sum(p.numel() for p in net.blocks.parameters()) == 12_424_320
    assert [type(m).__name__ for m in net.modules() if 'Drop' in type(m).__name__] == []
    assert not any(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    last = net.blocks[3].conv2.weight
    assert abs(last.std() / math.sqrt(2 / (9 * 640)) - 1) < .01 # Kaiming normal by the outputs


def test_a_block_is_what_it_says():
    block = ResNet12(widths=narrow, channels=1).double().blocks[1]
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    def normal(c, y): return F.batch_norm(F.conv2d(y, c.weight, padding=c.padding), None, None, training=True)
    y = F.leaky_relu(normal(block.conv0, x), .1)
    y = normal(block.conv2, F.leaky_relu(normal(block.conv1, y), .1)) + normal(block.shortcut, x)
    assert torch.allclose(block(x), F.max_pool2d(F.leaky_relu(y, .1), 2), atol=1e-12)


@pytest.mark.parametrize('build', [lambda seed: ResNet12(widths=narrow, seed=seed),
                                   lambda seed: Perceptron(2, 3, seed=seed)], ids=['resnet12', 'perceptron'])
def test_weights_come_from_the_seed_alone(build):
    torch.manual_seed(0)
    a = build(3)
    torch.manual_seed(1)
    b, c = build(3), build(4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


def test_a_perceptron_takes_pictures_and_numbers():
    assert Perceptron(1, 1)(torch.randn(10, 1)).shape == (10, 1)
    assert Perceptron(2, 1, hidden=())(torch.randn(10, 1)).shape == (10, 2) # a linear function
    assert image_perceptron(5, 3, 8, (4,))(torch.randn(6, 3, 8, 8)).shape == (6, 5)
    with pytest.raises(ValueError, match='at least 1 unit'): Perceptron(2, 3, hidden=(4, 0))


def squares_of(dropped, b):
    "What is left of a mask after an erosion and a dilation by a square: all of it, if it is a union of squares."
    shrunk = 1 - F.max_pool2d(1 - dropped, b, stride=1)
    return F.max_pool2d(F.pad(shrunk, [b - 1] * 4), b, stride=1)


@pytest.mark.parametrize('b', [1, 2, 3, 5])
def test_dropblock_drops_squares_as_often_as_it_says_and_keeps_the_mean(b):
    torch.manual_seed(b)
    p, n = .15, 9
    x = DropBlock(p, b)(torch.ones(1500, 4, n, n))
    dropped = (x == 0).float()
    assert torch.equal(squares_of(dropped, b), dropped)
    assert torch.allclose(x.mean((1, 2, 3)), torch.ones(1500), atol=1e-4)
    assert not torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[:, 0], dropped[:, 1])
    starts = torch.ones(1, 1, n - b + 1, n - b + 1)
    covering = F.avg_pool2d(F.pad(starts, [b - 1] * 4), b, stride=1) * b * b
    gamma = p / b**2 * n**2 / (n - b + 1)**2
    assert abs(dropped.mean() - (1 - (1 - gamma)**covering).mean()) < 4e-3 and dropped.mean() <= p + 4e-3


def test_dropblock_sleeps_outside_training():
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(DropBlock(.5).eval()(x), x) and torch.equal(DropBlock(0.)(x), x)
    net = ResNet12(3, 1, 28, narrow, drop_block=.5)
    pictures = torch.randn(4, 1, 28, 28)
    assert not torch.equal(net(pictures), net(pictures))
    assert torch.equal(net.eval()(pictures), ResNet12(3, 1, 28, narrow)(pictures))


def test_dropblock_where_maps_are_smaller_than_the_square():
    assert DropBlock(.3, 5)(torch.randn(2, 3, 2, 4)).shape == (2, 3, 2, 4)
    assert not DropBlock(1., 5)(torch.ones(2, 3, 2, 2)).any() # nothing left, and nothing divided by it


def test_tasks_of_a_batch_drop_different_squares():
    ones = torch.ones(4, 2, 3, 8, 8)
    out = torch.func.vmap(DropBlock(.3, 3), randomness='different')(ones)
    assert len({t.numpy().tobytes() for t in out}) == 4


@pytest.mark.parametrize('arguments, sides', [(dict(), [28, 14, 7, 3]), (dict(strided=True), [14, 7, 4, 2]),
                                              (dict(size=84, channels=3, filters=4), [84, 42, 21, 10])])
def test_counted_operations_of_conv4_are_its_closed_form(arguments, sides):
    net = Conv4(**arguments)
    products = (sum(s * s * net.get_submodule(f'conv{i}').weight.numel() for i, s in enumerate(sides))
                + net.head.weight.numel())
    x = torch.zeros(3, arguments.get('channels', 1), arguments.get('size', 28), arguments.get('size', 28))
    assert counted_operations(net, x) == 3 * 2 * products


def test_counted_operations_see_through_the_batch_of_tasks():
    net = Conv4(3, filters=4)
    weights = {k: p.expand(5, *p.shape) for k, p in net.named_parameters()}
    assert (counted_operations(task_batched(net), weights, torch.zeros(5, 6, 1, 28, 28))
            == 30 * counted_operations(net, torch.zeros(1, 1, 28, 28)))
    linear = torch.nn.Linear(7, 3)
    assert counted_operations(linear, torch.zeros(2, 7)) == 2 * 2 * 7 * 3


def test_sine_waves_are_a_function_of_seed_split_and_number():
    deal = SineWaves(k_shot=4, n_target=3)
    fields = ('support_x', 'support_y', 'target_x', 'target_y')
    for k in fields: assert torch.equal(getattr(deal(0, 8), k)[3:6], getattr(deal(3, 3), k))
    assert [getattr(deal(0, 2), k).shape for k in fields] == [(2, 4, 1)] * 2 + [(2, 3, 1)] * 2
    for other in (SineWaves(4, 3, seed=1), SineWaves(4, 3, split='test')):
        assert not torch.equal(other(0).support_x, deal(0).support_x)
    assert len(deal(0, 8)) == 8 and len(deal(0, 8)[2:4]) == 2


def test_sine_waves_are_sine_waves():
    deal = SineWaves(k_shot=10, n_target=10)
    e, u = deal(0, 4000), deal.numbers(0, 4000)
    a, phase = .1 + 4.9 * u[:, 0], math.pi * u[:, 1]
    for x, y in ((e.support_x, e.support_y), (e.target_x, e.target_y)):
        expected = a[:, None, None] * (x.double() - phase[:, None, None]).sin()
        assert (expected - y).abs().max() < 1e-5 and x.abs().max() <= 5
    for numbers in (u[:, 0], u[:, 1], u[:, 2:].flatten()): # uniform: mean, variance, ends
        assert abs(numbers.mean() - .5) < .02 and abs(numbers.var() - 1 / 12) < .005
        assert 0 <= numbers.min() < .01 and .99 < numbers.max() < 1
    assert abs(torch.corrcoef(u.T) - torch.eye(22)).max() < .08


def test_squared_errors():
    out, y = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    assert torch.allclose(squared_errors(out, y), torch.stack([F.mse_loss(o, t) for o, t in zip(out, y)]))
    with pytest.raises(ValueError, match='differ in shape'): squared_errors(out, y[..., 0])


@pytest.mark.parametrize('n_steps', [1, 4])
def test_steps_of_a_linear_function_are_linear_algebra(n_steps):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 6, d, dtype=torch.float64, generator=g) for d in (3, 1))
    start, alpha = torch.randn(3, 1, dtype=torch.float64, generator=g), .1
    meta = MetaParameters({'w': start.clone().requires_grad_()}, {}, {'w': torch.tensor([alpha], dtype=torch.float64)})
    *_, last = inner_loop(lambda weights, x: x @ weights['w'], meta, x, y, n_steps, loss=squared_errors)
    w = start
    for _ in range(n_steps): w = w - alpha * 2 / 6 * x.mT @ (x @ w - y)
    assert torch.allclose(last['w'], w, rtol=0, atol=1e-12)
    # d(sum of w_N)/d(start) is a product of I - 2α/n XᵀX
    found, = torch.autograd.grad(last['w'].sum(), list(meta.start.values()))
    step = torch.eye(3, dtype=torch.float64) - alpha * 2 / 6 * x.mT @ x
    assert torch.allclose(
        found, (torch.linalg.matrix_power(step, n_steps).mT @ torch.ones(3, 1, dtype=torch.float64)).sum(0), atol=1e-12)


def doubled(e):
    return dataclasses.replace(e, **{k: getattr(e, k).double()
                                     for k in ('support_x', 'support_y', 'target_x', 'target_y')})


@pytest.mark.parametrize('second_order', [True, False], ids=['second', 'first'])
@pytest.mark.parametrize('n_steps', [1, 5])
def test_regression_through_the_meta_loss_is_the_loop_over_tasks(n_steps, second_order):
    net, e = Perceptron(1, 1, (8, 8)).double(), doubled(SineWaves()(0, 3))
    meta, losses = maml_parameters(net, inner_lr=.01), []
    for task in zip(e.support_x, e.support_y, e.target_x, e.target_y):
        fast = meta.start
        for _ in range(n_steps):
            error = F.mse_loss(functional_call(net, fast, (task[0],)), task[1])
            gradient = torch.autograd.grad(error, list(fast.values()), create_graph=second_order)
            fast = {k: w - .01 * g for (k, w), g in zip(fast.items(), gradient)}
        losses.append(F.mse_loss(functional_call(net, fast, (task[2],)), task[3]))
    yardstick = torch.stack(losses).mean()
    loss, score = meta_loss(task_batched(net), meta, e, n_steps, second_order, loss=squared_errors,
                            score=lambda out, y: -squared_errors(out, y))
    assert abs(loss - yardstick) < 1e-12 and abs(score + loss) < 1e-12
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8
