"A user's own file: five parts that the package has never seen, each found by its name. The chapter explains them."
import torch, torch.nn.functional as F
from torch import nn
from mamlpp_nb.maml import row, task_accuracies
from mamlpp_nb.mamlpp import InnerUpdate, Method, methods, updates
from mamlpp_nb.config import Objective


class Residual(nn.Module):
    "A network: two convolutions around a shortcut, group norm, dropout"
    def __init__(self, n_way, channels, filters, seed):
        super().__init__()
        self.first = nn.Conv2d(channels, filters, 3, stride=2, padding=1)
        self.second = nn.Conv2d(filters, filters, 3, padding=1)
        self.norm, self.drop = nn.GroupNorm(4, filters), nn.Dropout(.1)
        self.classes = nn.Linear(filters, n_way)
    def forward(self, x):
        x = self.first(x)
        x = x + F.relu(self.norm(self.second(x)))
        return self.classes(self.drop(x).mean((2,3)))


def smooth(logits, y):
    "A loss: cross-entropy against labels of which a tenth is spread over all classes"
    each = F.cross_entropy(logits.flatten(0,1), y.flatten(), reduction='none', label_smoothing=.1)
    return each.view(y.shape).mean(1)

smooth_labels = Objective(smooth, task_accuracies)


def momentum(fast, gradient, meta, i, velocity):
    "An inner optimizer: a running sum of gradients whose decay is learned"
    decay, alpha = meta.added['decay'], row(meta.step_sizes, i)
    if velocity is not None: gradient = {k: g + decay*velocity[k] for k,g in gradient.items()}
    return {k: w - alpha[k]*gradient[k] for k,w in fast.items()}, gradient

def half(meta, n_steps): return {'decay': torch.full_like(next(iter(meta.step_sizes.values()))[0], .5).requires_grad_()}

updates['momentum'] = InnerUpdate(momentum, half)
methods['momentum'] = Method(update='momentum')


def alfa(fast, gradient, meta, i, state):
    "ALFA (Baik et al. 2020): a small network says from the means of weights and gradients how far to go and what to keep"
    small, names, alpha = meta.added, list(fast), row(meta.step_sizes, i)
    means = torch.stack([t[k].flatten(1).mean(1) for t in (fast, gradient) for k in names], 1) # (tasks, 2·tensors)
    said = (means @ small['first']).relu() @ small['second'] + small['bias']
    go, keep = ({k: t[:,j].view(-1, *[1]*(fast[k].ndim-1)) for j,k in enumerate(names)} for t in said.chunk(2, 1))
    return {k: keep[k]*w - go[k]*alpha[k]*gradient[k] for k,w in fast.items()}, state

def small_network(meta, n_steps, hidden=32):
    n, like = 2*len(meta.step_sizes), next(iter(meta.start.values()))
    draw = torch.randn(n, hidden, generator=torch.Generator().manual_seed(0))/n**.5
    begin = {'first': draw, 'second': torch.zeros(hidden, n), 'bias': torch.ones(n)} # go 1, keep 1: plain descent
    return {k: t.to(like).requires_grad_() for k,t in begin.items()}

updates['alfa'] = InnerUpdate(alfa, small_network)
methods['alfa'] = Method(update='alfa', step_sizes='per layer and step')


def bounded(fast, gradient, meta, i, state):
    "A cure: no task's gradient is longer than 1, so that no inner step is longer than its step size"
    length = torch.stack([g.flatten(1).square().sum(1) for g in gradient.values()]).sum(0).sqrt() # (tasks,)
    alpha, shrink = row(meta.step_sizes, i), 1/length.clamp(min=1)
    def of_task(g): return g*shrink.view(-1, *[1]*(g.ndim-1))
    return {k: w - alpha[k]*of_task(gradient[k]) for k,w in fast.items()}, state

updates['bounded'] = InnerUpdate(bounded)
methods['bounded'] = Method(multi_step=True, per_step_norm=True, step_sizes='per layer and step', update='bounded')


def fake_pictures():
    "A data set: any labelled Dataset, here one of torchvision's"
    from torchvision.datasets import FakeData
    from mamlpp_nb.tasks import from_dataset
    def of(split): return from_dataset(FakeData(120, (3,32,32), 12, random_offset=len(split)), split=split)
    return {split: of(split) for split in ('train','val','test')}


def sine_waves():
    "And anything that deals episodes: ten points of a wave"
    from mamlpp_nb.maml import SineWaves
    return {split: SineWaves(split=split) for split in ('train','val','test')}

def curve():
    from mamlpp_nb.network import Perceptron
    return Perceptron(n_outputs=1, n_inputs=1, hidden=(40,40))
