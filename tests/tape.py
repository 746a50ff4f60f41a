"A CUDA graph of paper: what a step does on fixed memory is written down once and repeated, on any device."
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Tape(TorchDispatchMode):
    "Like a capture, it refuses looks at values, and freezes every number that is not in a tensor"
    refused = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f in self.refused:
            raise RuntimeError(f'{f} looks at a value: operation not permitted when stream is capturing')
        out = f(*args, **kwargs or {})
        self.calls.append((f, args, kwargs or {}, out))
        return out

    def replay(self):
        made = {} # tensors made while recording -> those made now
        def now(x): return tree_map_only(torch.Tensor, lambda t: made.get(id(t), t), x)
        def pair(old, new):
            if isinstance(old, torch.Tensor): made[id(old)] = new
            elif isinstance(old, (tuple, list)):
                for a, b in zip(old, new): pair(a, b)
        for f, args, kwargs, out in self.calls: pair(out, f(*now(args), **now(kwargs)))


def capture(step):
    "In place of `mamlpp_nb.speed.capture`: a few steps, then one that is written down and, as there, not carried out"
    for _ in range(3): step()
    with Tape() as tape: step()
    return tape.replay
