"""The batched inner loop is the loop over tasks; the meta-gradient is the exact one;
nothing is lost when a run ends badly."""
import itertools
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mamlpp_nb.maml import (Diverged, MetaParameters, evaluate, gradient_error, inner_loop, load_meta,
                            maml_parameters, meta_loss, naive_meta_loss, outer_loop, row, save_meta, task_losses, train)
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.tasks import EpisodeSampler, Episodes


def noise_episodes(way=3, shot=1, target=2, n_tasks=3, size=28, channels=1, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    def part(k): return (torch.randn(n_tasks, way * k, channels, size, size, generator=g, dtype=dtype),
                         torch.arange(way).repeat_interleave(k).expand(n_tasks, -1))
    nothing = torch.zeros(n_tasks, way, dtype=torch.int64)
    return Episodes(*part(shot), *part(target), nothing, nothing, nothing)


def learned_gradients(loss, meta): return torch.autograd.grad(loss, list(meta.learned().values()))


@pytest.mark.parametrize('strided', [False, True], ids=['pooling', 'strided'])
@pytest.mark.parametrize('second_order', [True, False], ids=['second', 'first'])
@pytest.mark.parametrize('n_steps', [1, 2, 3, 4, 5])
def test_batched_gradients_are_the_naive_ones(n_steps, second_order, strided):
    net = Conv4(3, filters=8, strided=strided).double()
    meta, e = maml_parameters(net), noise_episodes()
    loss, _ = meta_loss(task_batched(net), meta, e, n_steps, second_order)
    yardstick = naive_meta_loss(net, meta, e, n_steps, second_order)
    assert abs(loss - yardstick) < 1e-12
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


def test_batched_gradients_are_the_naive_ones_on_real_width_and_characters(drawn):
    net = Conv4(5).double()
    meta, e = maml_parameters(net), EpisodeSampler(drawn['train'], rotate=True)(0, 2)
    e = Episodes(e.support_x.double(), e.support_y, e.target_x.double(), e.target_y, e.classes, e.rows, e.turns)
    loss, yardstick = meta_loss(task_batched(net), meta, e)[0], naive_meta_loss(net, meta, e)
    assert gradient_error(learned_gradients(loss, meta), learned_gradients(yardstick, meta)) < 1e-8


def test_the_gradient_error_notices_a_wrong_tensor():
    a = [torch.randn(3, 3), torch.randn(2)]
    assert gradient_error(a, a) == 0 and gradient_error([a[0], a[1] + 1e-3], a) > 1e-6


@pytest.mark.parametrize('n_steps', [1, 3, 5])
def test_a_quadratic_tells_the_orders_apart(n_steps):
    a, b, alpha, start = 3., 2., .1, torch.tensor([1.5, -.4], dtype=torch.float64, requires_grad=True)
    meta = MetaParameters({'w': start}, {}, {'w': torch.tensor([alpha], dtype=torch.float64)})
    half_square = lambda out, curvature: (curvature / 2 * out**2).sum(-1)
    def gradient(second_order):
        *_, last = inner_loop(lambda w, x: w['w'], meta, torch.zeros(2), torch.tensor([[a], [a]]), n_steps,
                              second_order, half_square)
        return torch.autograd.grad(half_square(last['w'], b).mean(), start)[0]
    factor = 1 - alpha * a
    assert torch.allclose(gradient(True), b * start * factor**(2 * n_steps), rtol=0, atol=1e-10)
    assert torch.allclose(gradient(False), b * start * factor**n_steps, rtol=0, atol=1e-10)


class Smooth(nn.Module):
    "A tiny convolution network without kinks."
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)
        self.head = nn.Linear(8, 2)
        for p in self.parameters(): p.data = torch.randn(p.shape, generator=g)
    def forward(self, x): return self.head(self.norm(self.conv(x)).tanh().flatten(1))


def test_gradcheck_on_a_tiny_network():
    net = Smooth().double()
    meta, e = maml_parameters(net, inner_lr=.3), noise_episodes(way=2, shot=2, n_tasks=2, size=4)
    def loss(*tensors):
        values = dict(zip(meta.learned(), tensors))
        groups = [{k: values.get(f'{g}/{k}', t) for k, t in table.items()} for g, table in meta._asdict().items()]
        return meta_loss(task_batched(net), MetaParameters(*groups), e, n_steps=2)[0]
    assert torch.autograd.gradcheck(loss, tuple(meta.learned().values()))


def test_the_network_itself_never_changes(drawn):
    net = Conv4(filters=8)
    before = {k: p.clone() for k, p in net.named_parameters()}
    meta = maml_parameters(net)
    loop = outer_loop(task_batched(net), meta, EpisodeSampler(drawn['train']),
                      torch.optim.Adam(meta.learned().values()))
    for _ in range(2): next(loop)
    assert all(torch.equal(before[k], p) for k, p in net.named_parameters())
    assert not torch.equal(meta.start['conv0.weight'], before['conv0.weight'])
    assert not torch.equal(meta.per_step['norm0.weight'][0], before['norm0.weight'])


def test_tables_with_more_rows_are_used_row_by_row():
    start = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    meta = MetaParameters({'w': start}, {}, {'w': torch.tensor([1., 10., 100.], dtype=torch.float64)})
    out = [w['w'].item() for w in inner_loop(lambda w, x: w['w'], meta, torch.zeros(1), None, 4,
                                             loss=lambda out, y: -out)]
    assert out == [1., 11., 111., 211.] # the fourth step takes the last row
    assert row({'a': torch.arange(3.)}, 9)['a'] == 2


def test_step_sizes_may_be_a_number_a_row_or_a_tensor_per_weight():
    net = Conv4(3, filters=4).double()
    meta, e = maml_parameters(net, .1), noise_episodes(n_tasks=2)
    full = meta._replace(step_sizes={k: torch.full((5, *w.shape), .1, dtype=torch.float64)
                                     for k, w in meta.start.items()})
    losses = [meta_loss(task_batched(net), m, e)[0].item() for m in (meta, full)]
    assert losses[0] == losses[1]


def test_target_passes_that_count_nothing_are_not_made():
    net, calls = Conv4(3, filters=4).double(), []
    def counting(weights, x):
        calls.append(x.shape[1])
        return task_batched(net)(weights, x)
    e = noise_episodes()
    meta_loss(counting, maml_parameters(net), e, 5)
    assert calls == [3] * 5 + [6]
    calls.clear()
    meta_loss(counting, maml_parameters(net), e, 3, loss_weights=[.5, 0, .5])
    assert calls == [3, 6, 3, 3, 6]


def test_loss_weights_weigh_the_losses_after_each_step():
    net, e = Conv4(3, filters=4).double(), noise_episodes()
    meta, forward = maml_parameters(net), task_batched(net)
    alone = [meta_loss(forward, meta, e, 3, loss_weights=[float(i == j) for j in range(3)])[0] for i in range(3)]
    mixed = meta_loss(forward, meta, e, 3, loss_weights=[.2, .3, .5])[0]
    assert torch.allclose(mixed, .2 * alone[0] + .3 * alone[1] + .5 * alone[2], rtol=1e-12)


@pytest.mark.parametrize('weights', [[1.], [0., 0., 0.], [1.] * 4])
def test_impossible_loss_weights_are_refused(weights):
    net = Conv4(3, filters=4).double()
    with pytest.raises(ValueError, match='one weight for each of 3 steps'):
        meta_loss(task_batched(net), maml_parameters(net), noise_episodes(), 3, loss_weights=weights)


@pytest.mark.parametrize('label', [3, -1, -100])
def test_labels_the_network_has_no_output_for_are_refused(label):
    with pytest.raises(ValueError, match=rf'\[0, 3\).*{label}'):
        task_losses(torch.zeros(1, 2, 3), torch.tensor([[0, label]]))


def test_no_steps_are_refused():
    net = Conv4(3, filters=4).double()
    with pytest.raises(ValueError, match='at least 1 step'):
        next(inner_loop(task_batched(net), maml_parameters(net), *[None] * 2, n_steps=0))


def run(splits, n=3, seed=0, **kw):
    net = Conv4(filters=8, seed=seed)
    meta = maml_parameters(net)
    loop = outer_loop(task_batched(net), meta, EpisodeSampler(splits['train'], seed=seed, rotate=True),
                      torch.optim.Adam(meta.learned().values(), lr=1e-3), **kw)
    return list(itertools.islice(loop, n)), meta


def test_the_same_seed_gives_the_same_numbers_to_the_bit(drawn):
    (a, meta_a), (b, meta_b), (c, _) = run(drawn), run(drawn), run(drawn, seed=1)
    assert a == b != c
    assert all(torch.equal(s, t) for s, t in zip(meta_a.named().values(), meta_b.named().values()))


def test_training_starts_at_the_iteration_asked_for(drawn):
    seen = []
    class Watch(EpisodeSampler):
        def __call__(self, first, n_tasks=1):
            seen.append(first)
            return super().__call__(first, n_tasks)
    net = Conv4(filters=8)
    meta = maml_parameters(net)
    loop = outer_loop(task_batched(net), meta, Watch(drawn['train']), torch.optim.Adam(meta.learned().values()),
                      n_tasks=3, first=7)
    assert [p.iteration for p in itertools.islice(loop, 2)] == [7, 8] and seen == [21, 24]


def diverging(splits, at=2):
    "A run whose iteration `at` has a loss that is not a number."
    net = Conv4(filters=8)
    meta, forward = maml_parameters(net), task_batched(net)
    alpha = {k: torch.full_like(t, float('nan')) for k, t in meta.step_sizes.items()}
    class Spoilt(EpisodeSampler):
        def __call__(self, first, n_tasks=1):
            if first == at * n_tasks: meta.step_sizes.update(alpha)
            return super().__call__(first, n_tasks)
    return outer_loop(forward, meta, Spoilt(splits['train']), torch.optim.Adam(meta.learned().values())), meta


def test_a_nan_names_the_iteration_and_the_last_good_checkpoint(drawn, tmp_path):
    loop, meta = diverging(drawn)
    with pytest.raises(Diverged, match=r'iteration 2 .*episodes 8 to 11.*meta\.safetensors') as e:
        train(loop, meta, 10, checkpoint=tmp_path / 'meta.safetensors')
    kept, about = load_meta(tmp_path / 'meta.safetensors')
    assert about['iterations'] == 2 and all(t.isfinite().all() for t in kept.learned().values())
    reference = maml_parameters(Conv4(filters=8))
    reference_loop = outer_loop(task_batched(Conv4(filters=8)), reference, EpisodeSampler(drawn['train']),
                                torch.optim.Adam(reference.learned().values()))
    list(itertools.islice(reference_loop, 2))
    for name, t in reference.learned().items():
        assert torch.equal(t, kept.named()[name]) # nothing of the two good steps is lost


def test_an_interrupted_run_keeps_its_weights(drawn, tmp_path):
    _, meta = run(drawn, 1)
    def interrupted():
        yield from run(drawn, 2)[0]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(interrupted(), meta, 10, checkpoint=tmp_path / 'meta.safetensors')
    assert load_meta(tmp_path / 'meta.safetensors')[1]['iterations'] == 2


def test_train_goes_on_with_a_history_is_watched_and_stops_when_asked(drawn, tmp_path):
    loop, meta = run(drawn, 5)
    loop, seen = iter(loop), []
    history = train(loop, meta, 2)
    assert len(history) == 2 and train(iter([]), meta, 0) == []
    again = train(loop, meta, 3, tmp_path / 'm.safetensors', history=history,
                  watch=lambda h: seen.append(len(h)), stop=lambda: len(history) == 4)
    assert again is history and len(history) == 4 and seen == [3, 4]
    assert load_meta(tmp_path / 'm.safetensors')[1]['iterations'] == 4


def test_checkpoints_come_back_whole(tmp_path, drawn):
    _, meta = run(drawn, 1)
    save_meta(tmp_path / 'm.safetensors', meta, {'way': 5})
    back, about = load_meta(tmp_path / 'm.safetensors')
    assert about == {'way': 5} and back.learned().keys() == meta.learned().keys()
    for name, t in meta.named().items(): assert torch.equal(t, back.named()[name])
    assert load_file(tmp_path / 'm.safetensors').keys() == meta.named().keys() # a plain safetensors file


@pytest.mark.parametrize('content', [b'', b'rubbish' * 100, None], ids=['empty', 'rubbish', 'cut'])
def test_a_damaged_checkpoint_is_named(tmp_path, drawn, content):
    path = tmp_path / 'm.safetensors'
    save_meta(path, run(drawn, 0)[1], {})
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    with pytest.raises(ValueError, match=r'm\.safetensors is not a whole checkpoint'): load_meta(path)


def test_evaluation_grades_every_step_and_does_not_depend_on_portions(drawn):
    net, meta = Conv4(filters=8), run(drawn, 2)[1]
    forward, sampler = task_batched(net), EpisodeSampler(drawn['test'], n_target=2)
    whole, parts = (evaluate(forward, meta, sampler, 7, n_steps=3, portion=p) for p in (7, 2))
    assert whole.per_task.shape == (7, 4) and torch.allclose(whole.per_task, parts.per_task)
    # by hand: task 4, after two steps
    e = sampler(4)
    *_, fast = inner_loop(forward, meta, e.support_x, e.support_y, 2, second_order=False)
    logits = forward({**fast, **{k: t for k, t in meta.per_step.items()}}, e.target_x)
    assert whole.per_task[4, 2] == (logits.argmax(-1) == e.target_y).double().mean()
    assert whole.accuracy == whole.per_task.mean(0).tolist()


def test_evaluation_keeps_no_graph(drawn):
    meta = run(drawn, 0)[1]
    assert not evaluate(task_batched(Conv4(filters=8)), meta, EpisodeSampler(drawn['test']), 2).per_task.requires_grad
    with torch.no_grad():
        for fast in inner_loop(task_batched(Conv4(filters=8)), meta,
                               *[getattr(EpisodeSampler(drawn['test'])(0, 2), k) for k in ('support_x', 'support_y')],
                               second_order=False):
            assert not any(w.requires_grad for w in fast.values())


def test_a_network_of_the_readers_own_learns_too(drawn):
    own = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(.1), nn.Linear(16, 5))
    meta = maml_parameters(own)
    assert set(meta.per_step) == {'2.weight', '2.bias'} # normalisation is left to the outer loop
    loop = outer_loop(task_batched(own), meta, EpisodeSampler(drawn['train']),
                      torch.optim.Adam(meta.learned().values()))
    assert all(torch.isfinite(torch.tensor(p.loss)) for p in itertools.islice(loop, 3))


@pytest.mark.parametrize('earlier, tensors, megabytes, where', [
    (0, 4, 100, 'in_a_thread'), (0, 1, 200, 'fill'), (4, 4, 20, 'in_a_thread')],
    ids=['no thread came first', 'nothing lies above', 'threads came first'])
def test_what_was_freed_is_used_again_in_every_thread(earlier, tensors, megabytes, where):
    """Tensors larger than any block that glibc keeps by itself; if no thread came first, than the heap of a thread too.
    The heap grows now and then, where small things came to lie between large ones: so most rounds take no new page."""
    code = f"""
import resource, statistics, threading, torch
from concurrent.futures import ThreadPoolExecutor
from mamlpp_nb.maml import keep_freed_memory
def fill(n):
    kept = [torch.empty({megabytes}_000_000, dtype=torch.uint8).fill_(1) for _ in range(n)]
def in_a_thread(n):
    with ThreadPoolExecutor(1) as pool: pool.submit(fill, n).result()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {where}({tensors})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
all_here = threading.Barrier({max(earlier, 1)})
def come_first():
    all_here.wait()
    kept = [bytearray(1000) for _ in range(1000)] # makes this thread a heap
    all_here.wait()
with ThreadPoolExecutor({max(earlier, 1)}) as pool: list(pool.map(lambda _: come_first(), range({earlier})))
kept = keep_freed_memory()
fill({tensors})
for _ in range(16): new_pages()
print(kept, statistics.median(new_pages() for _ in range(17)))
"""
    without_advice = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    done = subprocess.run([sys.executable, '-c', code], env=without_advice, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    if kept == 'False': pytest.skip('another C library than glibc')
    assert int(pages) < 100 # of 4 KB; the tensors of a round have 20,000 or 100,000
