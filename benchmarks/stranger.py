"""What a newcomer meets: the README's commands with empty caches, timed from outside, written down with the machine.

    python benchmarks/stranger.py quickstart        MAML++ and MAML, seeds 0 to 2, each with caches of its own
    python benchmarks/stranger.py quickstart --methods maml --at-once
    python benchmarks/stranger.py bench             speed against the naive loop
    python benchmarks/stranger.py bench --ways 'naive,written out,fast'                   compiled, too
    python benchmarks/stranger.py tests             the test command in a fresh clone, installation included
    python benchmarks/stranger.py quickstart --held-to-avx2       AVX2 on a machine that has more

The name of a record of the last kind begins with held-. Records go to nbs/results/strangers/, from where the README
reads them. Start it with nothing else running.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mamlpp_nb.machine import processor, provenance

root = Path(__file__).resolve().parent.parent
records = root / 'nbs/results/strangers'
held = {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'MKL_ENABLE_INSTRUCTIONS': 'AVX2'}


def environment(caches, held_back):
    "This one, with empty caches, and no more than AVX2 if asked."
    own = {'XDG_CACHE_HOME': f'{caches}/xdg', 'TORCHINDUCTOR_CACHE_DIR': f'{caches}/inductor'}
    return {**os.environ, **own, **(held if held_back else {})}


def seen(env):
    "What torch and oneDNN say they use: does holding back take effect?"
    code = ('import torch; torch.nn.functional.conv2d(torch.rand(2,8,8,8), torch.rand(8,8,3,3)); '
            'from mamlpp_nb.machine import processor; print(processor())')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env={**env, 'ONEDNN_VERBOSE': '1'}).stdout
    isa = re.search(r'cpu,isa:(.*)', said)
    return {'processor': said.splitlines()[-1], 'onednn': isa[1].strip() if isa else None}


def timed(command, env, cwd=None):
    "Seconds that a command takes; an error if it fails."
    begin = time.monotonic()
    subprocess.run(command, check=True, env=env, cwd=cwd, stdin=subprocess.DEVNULL)
    return round(time.monotonic() - begin, 1)


def key(env):
    "A name for this kind of machine: its vectors."
    return seen(env)['processor'].split(', ')[-2].lower()


def keep(name, record, env):
    "A record of this project, with its machine."
    records.mkdir(parents=True, exist_ok=True)
    path = records / f"{'held-' if record['held_back'] else ''}{name}-{key(env)}.json"
    path.write_text(json.dumps({**record, **seen(env)}) + '\n', encoding='utf-8')
    print(f'{path}: {record["wall_seconds"]} s', flush=True)


def quickstart(chosen):
    runs = [(method, seed) for method in chosen.methods for seed in range(3)]
    with ThreadPoolExecutor(len(runs) if chosen.at_once else 1) as pool:
        list(pool.map(lambda run: one_quickstart(chosen, *run), runs))


def one_quickstart(chosen, method, seed):
    "A run with caches of its own; its time counts only if it ran alone."
    with tempfile.TemporaryDirectory() as folder:
        env = environment(folder, chosen.held_to_avx2)
        if chosen.at_once: env['OMP_NUM_THREADS'] = '1'
        words = ['quickstart', '--data', chosen.data, '--method', method, '--seed', str(seed), '--out', f'{folder}/run']
        wall = timed([sys.executable, '-m', 'mamlpp_nb.cli', *words], env)
        record = json.loads(Path(folder, 'run/record.json').read_text(encoding='utf-8'))
        extra = {'wall_seconds': None if chosen.at_once else wall, 'held_back': chosen.held_to_avx2}
        keep(f'quickstart-{chosen.data}-{method}-{seed}', {**record, **extra}, env)


def bench(chosen):
    with tempfile.TemporaryDirectory() as folder:
        env, made = environment(folder, chosen.held_to_avx2), Path(folder, 'record.json')
        words = ['bench', '--ways', chosen.ways, '--device', 'cpu', '--record', str(made)]
        wall = timed([sys.executable, '-m', 'mamlpp_nb.cli', *words], env)
        keep('bench', {**json.loads(made.read_text(encoding='utf-8')), 'wall_seconds': wall,
                       'held_back': chosen.held_to_avx2}, env)


def tests(chosen):
    readme = (root / 'README.md').read_text(encoding='utf-8')
    command = next(line for line in readme.splitlines() if 'bash tests/all.sh' in line)
    with tempfile.TemporaryDirectory() as folder:
        env = environment(folder, chosen.held_to_avx2)
        subprocess.run(['git', 'clone', '-q', str(root), f'{folder}/clone'], check=True)
        wall = timed(['bash', '-c', command], env, f'{folder}/clone')
        keep('tests', {'command': command, 'data': bool(os.environ.get('MAMLPP_DATA')), 'wall_seconds': wall,
                       'held_back': chosen.held_to_avx2, **provenance('cpu')}, env)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['quickstart', 'bench', 'tests'])
    parser.add_argument('--held-to-avx2', action='store_true')
    parser.add_argument('--data', default='omniglot', choices=['omniglot', 'glyphs'])
    parser.add_argument('--methods', nargs='+', default=['mamlpp', 'maml'])
    parser.add_argument('--ways', default='naive,written out',
                        help='of `mamlpp bench`; with fast, the compiler is waited for')
    parser.add_argument('--at-once', action='store_true',
                        help='all seeds side by side, a thread each: accuracies, no times')
    arguments = parser.parse_args()
    print(processor(), flush=True)
    {'quickstart': quickstart, 'bench': bench, 'tests': tests}[arguments.what](arguments)
