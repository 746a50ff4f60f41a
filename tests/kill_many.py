"""Stop short runs in every way and go on, until they end: are the weights those of a run never stopped?

    python tests/kill_many.py FOLDER tiny random=5 files disk=6000

The run is tiny or small. What is done to it, one after the other:
    random=N     it is killed at random moments, this often
    files        it dies at the first file operation, the second, ... once at each
    disk=BYTES   no file may grow beyond this size, then there is no limit

Prints a line of JSON for each. Every run is forked from this process,
which has everything imported and starts no thread.
"""
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[name] = '1' # a fork keeps no thread but its own

import torch
from safetensors.torch import load_file

from mamlpp_nb import runs
from mamlpp_nb.tasks import glyphs
from conftest import small_run, tiny_run
from mamlpp_nb.runs import read_metrics
from mamlpp_nb.training import train_run

sizes = {'tiny': tiny_run, 'small': small_run}


def fork(config, folder, splits, prepare=lambda: None):
    "A process that trains; exits with 0 when the run is complete, 1 with an OSError, 3 if it was stopped."
    child = os.fork()
    if child: return child
    try:
        prepare()
        status = train_run(config, folder, splits, say=lambda text: None, keep_every=0)
        os._exit(0 if status == 'complete' else 3)
    except KeyboardInterrupt: os._exit(3) # came before the run was ready to note it
    except OSError as e:
        print(e, flush=True)
        os._exit(1)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(2)


def ended(child, most=60):
    "Exit code; a child that takes longer than `most` seconds shows where it hangs."
    for _ in range(100 * most):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: return os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    os.kill(child, signal.SIGABRT) # faulthandler prints the stack
    os.waitpid(child, 0)
    raise SystemExit(f'a child hung for {most} s')


def same(config, folder, reference):
    "Weights, Adam's state, running average, the best models and the log, all but the clock."
    names = sorted(p.name for p in reference.glob('*.safetensors'))
    if (names != sorted(p.name for p in folder.glob('*.safetensors'))
            and sorted({*names} - {'previous.safetensors'}) != sorted(
                {p.name for p in folder.glob('*.safetensors')} - {'previous.safetensors'})):
        return False
    for name in names:
        if name == 'previous.safetensors': continue # which one this is depends on when the last stop was
        a, b = load_file(reference / name), load_file(folder / name)
        if set(a) != set(b) or not all(torch.equal(a[k], b[k]) for k in a): return False
    logs = [[{k: v for k, v in row.items() if k not in ('seconds', 'memory_gb')} for row in read_metrics(f)]
            for f in (reference, folder)]
    return logs[0] == logs[1] and len(logs[0]) == config.epochs


def die_at(n):
    "Make the n-th file operation from now the last: a write does half of its work, anything else none."
    done = [0]

    def wrap(owner, name, half=None):
        whole = getattr(owner, name)

        def operation(*args, **kwargs):
            done[0] += 1
            if done[0] == n:
                if half: half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)
        setattr(owner, name, operation)
    write = Path.write_bytes
    wrap(Path, 'write_text', lambda path, text: write(path, text.encode()[:len(text) // 2]))
    wrap(Path, 'write_bytes', lambda path, data: write(path, data[:len(data) // 2]))
    for owner, name in ((os, 'replace'), (os, 'fsync'), (Path, 'unlink'), (Path, 'mkdir')): wrap(owner, name)


def kill_at_random(n, run, start, complete, length):
    "Until so many runs were stopped."
    rng, stops = random.Random(0), 0
    while stops < n:
        child = start()
        time.sleep(rng.uniform(0, length))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        os.kill(child, number) # a child that has ended waits to be asked for its exit code
        code = ended(child)
        if code == 0: complete()
        elif code in (-number, 3): stops += 1 # a signal in the first moments finds no handler yet
        else: raise SystemExit(f'exit code {code}')
    if run.exists():
        assert ended(start()) == 0
        complete()
    return {'stops': stops}


def die_at_each(start, complete):
    "A run that dies at the n-th file operation and goes on, for every n that there is."
    for n in range(1, 10_000):
        code = ended(start(lambda: die_at(n)))
        if code == 0: return complete() or {'stops': n - 1}
        assert ended(start()) == 0
        complete()


def fill_disk(n_bytes, start, complete):
    "A run on a full disk that goes on when there is room."
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    code = ended(start(limit))
    assert ended(start()) == 0
    complete()
    return {'stops': 1, 'code': code}


def main(folder, size, *kinds):
    torch.set_num_threads(1)
    faulthandler.enable()
    config, folder = sizes[size], Path(folder)
    splits = {s: d.select(range(30), s) for s, d in glyphs(n_drawings=4).items()}
    runs.provenance = functools.cache(runs.provenance) # git is asked once, not by every run
    reference, run = folder / 'reference', folder / 'run'
    train_run(config, folder / 'warm', splits, say=lambda text: None) # imports what torch imports late, once for all
    begin = time.monotonic()
    assert ended(fork(config, reference, splits)) == 0
    length = time.monotonic() - begin
    for kind, _, n in (k.partition('=') for k in kinds):
        said = {'kind': kind, 'runs': 0, 'same': True}

        def start(prepare=lambda: None): return fork(config, run, splits, prepare)

        def complete():
            said['runs'] += 1
            if not same(config, run, reference):
                said['same'] = False
                shutil.copytree(run, folder / f'differs-{kind}-{said["runs"]}')
            shutil.rmtree(run)
        if kind == 'random': said |= kill_at_random(int(n), run, start, complete, length)
        elif kind == 'files': said |= die_at_each(start, complete)
        elif kind == 'disk': said |= fill_disk(int(n), start, complete)
        print(json.dumps(said), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
