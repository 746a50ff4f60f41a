"Runs that are stopped, damaged, shared and repeated; what a chapter should not carry."
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tape
from conftest import no_clock, quiet, small_run
from mamlpp_nb.cli import main
from mamlpp_nb.maml import Damaged, Diverged, load_meta, maml_parameters, outer_loop
from mamlpp_nb.progress import Plan
from mamlpp_nb.tasks import EpisodeSampler
from mamlpp_nb.config import configure, presets, set_up
from mamlpp_nb.runs import best_epochs, first_state, load_state, newest_state, open_run, read_metrics
from mamlpp_nb.runs import read_run, save_state
from mamlpp_nb.training import grade_run, replay, train_and_test, train_run, train_runs

here = Path(__file__).parent


def program(*words, **more):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          **{'timeout': 300, **more})


def equal(a, b):
    a, b = load_file(a), load_file(b)
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def few(drawn): return {s: d.select(range(30), s) for s, d in drawn.items()}


@pytest.fixture(scope='module')
def done(few, tmp_path_factory):
    "A short run that was never stopped."
    folder = tmp_path_factory.mktemp('runs') / 'done'
    assert train_run(small_run, folder, few, say=quiet) == 'complete'
    return folder


# --- settings

@pytest.mark.parametrize('name, way, shot, target, filters, tasks, inner_lr, annealed, epochs, first_order', [
    ('omniglot-20w1s', 20, 1, 1, 64, 8, .1, 10, 100, 0),
    ('omniglot-20w5s', 20, 5, 1, 64, 8, .1, 10, 100, 0),
    ('omniglot-5w1s', 5, 1, 1, 64, 8, .1, 10, 100, 0),
    ('omniglot-5w5s-paper', 5, 5, 1, 64, 16, .1, 10, 150, 50),
    ('omniglot-20w1s-paper', 20, 1, 1, 64, 16, .1, 10, 150, 50),
    ('mini-imagenet-5w1s', 5, 1, 15, 48, 2, .01, 15, 100, 0),
    ('mini-imagenet-5w5s', 5, 5, 15, 48, 2, .01, 15, 100, 0),
    ('mini-imagenet-5w5s-paper', 5, 5, 15, 48, 4, .01, 15, 100, 50)])
def test_presets_are_the_published_settings(name, way, shot, target, filters, tasks, inner_lr, annealed, epochs,
                                            first_order):
    c = presets[name]
    assert ((c.n_way, c.k_shot, c.n_target, c.filters, c.n_tasks,
             c.inner_lr, c.multi_step_epochs, c.epochs, c.first_order_epochs)
            == (way, shot, target, filters, tasks, inner_lr, annealed, epochs, first_order))
    assert (c.iterations == 500 and c.validation_tasks == c.test_tasks == 600
            and c.keep == 5 and c.n_steps == 5 and c.beta2 == .999)
    mini = c.data == 'mini-imagenet'
    assert (c.normalise == mini and c.rotate != mini and c.clamp == 10*mini
            and (c.outer_lr, c.last_outer_lr) == (1e-3, 1e-5))


@pytest.mark.parametrize('settings, named', [
    ({'n_way': 1}, 'at least 2'),
    ({'epochs': 0}, 'at least 1'),
    ({'beta2': 1.}, 'below 1'),
    ({'average': 1.}, 'below 1'),
    ({'outer_lr': math.nan}, 'finite'),
    ({'clamp': -1.}, 'at least 0'),
    ({'rotate': 1}, 'must be a bool'),
    ({'n_steps': 2.}, 'must be a int'),
    ({'n_steps': True}, 'must be a int'),
    ({'precision': 'float16'}, 'float64'),
    ({'method': 'x'}, 'choose from maml')])
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named): configure('omniglot-5w1s', **settings)


# --- stopping and going on

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('size, kinds, least', [
    ('tiny', {'random': 5, 'files': None, 'disk': 6000}, 55),
    pytest.param('small', {'random': 50, 'files': None, 'disk': 12000}, 90, marks=pytest.mark.weekly)])
def test_a_stopped_run_ends_with_the_weights_of_one_never_stopped(size, kinds, least, tmp_path):
    "Kills at random moments, a death at every file operation (there are at least so many), no room"
    words = [kind if n is None else f'{kind}={n}' for kind, n in kinds.items()]
    said = program(str(here / 'kill_many.py'), str(tmp_path), size, *words, timeout=3000)
    assert said.returncode == 0, said.stderr
    found = {r['kind']: r for r in map(json.loads, (l for l in said.stdout.splitlines() if l.startswith('{')))}
    assert list(found) == list(kinds)
    for r in found.values(): assert r['same'] and r['runs'] > 0, r
    assert found['random']['stops'] >= kinds['random'] and found['files']['stops'] >= least
    assert found['disk']['code'] == 1 and 'make room' in said.stdout


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='mounting a small disk needs root')
def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(few, done, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if program('-c', 'import subprocess, sys; sys.exit(subprocess.call('
                     f'["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", {str(disk)!r}]))').returncode:
        pytest.skip('mounting is not allowed here')
    try:
        with pytest.raises(OSError, match='make room'): train_run(small_run, disk / 'run', few, say=quiet)
        subprocess.run(['mount', '-o', 'remount,size=2m', str(disk)], check=True)
        assert train_run(small_run, disk / 'run', few, say=quiet) == 'complete'
        assert (equal(disk / 'run/last.safetensors', done / 'last.safetensors')
                and no_clock(disk / 'run') == no_clock(done))
    finally: subprocess.run(['umount', str(disk)], check=True)


def test_out_of_time_then_on(few, done, tmp_path):
    starts = 0
    while train_run(small_run, tmp_path / 'run', few, minutes=1e-6, say=quiet) == 'out of time': starts += 1
    assert (starts > 3 and equal(tmp_path / 'run/last.safetensors', done / 'last.safetensors')
            and no_clock(tmp_path / 'run') == no_clock(done))


def test_the_newest_of_two_files_is_damaged(few, done, tmp_path):
    said = []
    train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet)
    train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet)
    data = bytearray((tmp_path / 'last.safetensors').read_bytes())
    data[-5] ^= 1
    (tmp_path / 'last.safetensors').write_bytes(data)
    assert train_run(small_run, tmp_path, few, say=said.append) == 'complete'
    assert any('last.safetensors is damaged' in s for s in said) and (tmp_path / 'last.damaged').exists()
    assert equal(tmp_path / 'last.safetensors', done / 'last.safetensors') and no_clock(tmp_path) == no_clock(done)


def test_both_files_are_damaged(few, done, tmp_path):
    said = []
    for _ in range(2): train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet)
    for name in ('last', 'previous'): (tmp_path / f'{name}.safetensors').write_bytes(b'')
    assert train_run(small_run, tmp_path, few, say=said.append) == 'complete'
    assert (any('beginning from the start' in s for s in said)
            and equal(tmp_path / 'last.safetensors', done / 'last.safetensors'))


def test_every_flipped_bit_is_noticed(few, tmp_path):
    state = first_state(small_run, set_up(small_run, few))
    save_state(tmp_path / 'a.safetensors', state, {})
    whole, bad = (tmp_path / 'a.safetensors').read_bytes(), tmp_path / 'b.safetensors'
    fresh = first_state(small_run, set_up(small_run, few)) # filled only from a whole file
    for i in range(0, len(whole), max(1, len(whole) // 150)):
        bad.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i+1:])
        with pytest.raises(Damaged, match='b.safetensors'): load_state(bad, fresh)
    load_state(tmp_path / 'a.safetensors', fresh)


def test_a_checkpoint_of_another_run_is_refused(few, done):
    other = dataclasses.replace(small_run, filters=5)
    with pytest.raises(ValueError, match='does not fit'):
        load_state(done / 'last.safetensors', first_state(other, set_up(other, few)))


def test_a_pickle_is_no_checkpoint(few, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self): return (Path.touch, (tmp_path / 'it ran',))
    (tmp_path / 'last.safetensors').write_bytes(pickle.dumps(Trap()))
    assert (newest_state(tmp_path, first_state(small_run, set_up(small_run, few)), quiet)
            == [tmp_path / 'last.safetensors'])
    with pytest.raises(ValueError): load_meta(tmp_path / 'last.safetensors')
    assert not (tmp_path / 'it ran').exists()


def test_one_folder_one_run(few, done, tmp_path):
    with pytest.raises(ValueError, match='filters 4 there, 6 asked for'):
        train_run(dataclasses.replace(small_run, filters=6), done, few, say=quiet)
    with open_run(tmp_path / 'run', small_run):
        said = program('-c', 'from mamlpp_nb.runs import open_run; from conftest import small_run; '
                             f'open_run({str(tmp_path / "run")!r}, small_run).__enter__()', cwd=here)
    assert said.returncode and 'a run is going on' in said.stderr


# --- what is kept

def test_metrics_and_best_epochs(done):
    rows = read_metrics(done)
    assert ([r['epoch'] for r in rows] == list(range(small_run.epochs))
            and [r['iteration'] for r in rows] == [small_run.iterations*(e+1) for e in range(small_run.epochs)])
    for r in rows:
        assert (len(r['losses']) == small_run.iterations and abs(sum(r['losses'])/len(r['losses']) - r['loss']) < 1e-9
                and abs(sum(r['loss_weights']) - 1) < 1e-9)
        assert (len(r['validation']['accuracy']) == small_run.n_steps+1 and r['memory_gb'] > 0
                and r['largest_gradient_norm'] >= r['gradient_norm'] > 0)
        assert r['second_order'] == (r['epoch'] >= small_run.first_order_epochs)
        assert all(len(a) == small_run.n_steps for k, a in r['step_sizes'].items() if k == 'head.weight')
    assert rows[0]['outer_lr'] > rows[-1]['outer_lr'] and rows[0]['seconds'] < rows[-1]['seconds']
    kept = {p.stem for p in done.glob('best-*.safetensors')}
    assert kept == {f'best-epoch-{e:03d}' for e in best_epochs(rows, small_run.keep)} and len(kept) == small_run.keep


def test_best_epochs_prefers_the_earlier_of_equals():
    rows = [{'epoch': e, 'validation': {'accuracy': [.9, a]}} for e, a in enumerate((.5, .7, .7, .6))]
    assert best_epochs(rows, 3) == [1, 2, 3]


def test_the_running_average_is_what_its_formula_says(few, tmp_path):
    config = dataclasses.replace(small_run, epochs=1, iterations=4, average=.8)
    a, b = set_up(config, few), set_up(config, few)
    train_run(config, tmp_path, few, say=quiet)
    state = first_state(config, a)
    load_state(tmp_path / 'last.safetensors', state)
    from mamlpp_nb.training import advance, outer_steps
    plain = first_state(dataclasses.replace(config, average=0.), b)
    steps, mean = outer_steps(config, [(b, plain)]), {k: t.detach().clone() for k, t in plain.meta.learned().items()}
    for _ in range(4):
        advance(steps, config, 1)
        mean = {k: .8*m + .2*plain.meta.learned()[k].detach() for k, m in mean.items()}
    for k in mean: assert torch.allclose(mean[k], state.average[k], atol=1e-6)
    assert (torch.allclose(state.model.start['head.weight'], mean['start/head.weight'], atol=1e-6)
            and not torch.equal(state.model.start['head.weight'], state.meta.start['head.weight']))


def test_last_opens_as_meta_parameters(done):
    meta, about = load_meta(done / 'last.safetensors')
    assert about['config'] == dataclasses.asdict(small_run) and set(meta.step_sizes) == set(meta.start)


def test_clamp_bounds_the_network_and_not_the_step_sizes(few):
    deal = EpisodeSampler(few['train'], 3)

    class Look(torch.optim.SGD):
        def step(self):
            self.seen = {k: t.grad.abs().max().item() for k, t in meta.learned().items() if t.grad is not None}
    setup = set_up(small_run, few)
    meta, largest = setup.meta, []
    for clamp in (0., 1e-3):
        optimizer = Look(meta.learned().values(), lr=1.)
        next(outer_loop(setup.forward, meta, deal, optimizer, 2, clamp=clamp))
        largest.append(optimizer.seen)
    assert (all(v < 1.0001e-3 for k, v in largest[1].items() if not k.startswith('step_sizes'))
            and max(v for k, v in largest[0].items() if not k.startswith('step_sizes')) > 1e-3)
    assert ({k: v for k, v in largest[0].items() if k.startswith('step_sizes')}
            == {k: v for k, v in largest[1].items() if k.startswith('step_sizes')})


def test_colours_are_normalised_once(few):
    grey = few['train']
    from mamlpp_nb.tasks import ClassImages
    colour = {s: ClassImages(d.images[:600].expand(-1, 3, -1, -1).contiguous(), [20]*30, d.names, s)
              for s, d in few.items()}
    config = dataclasses.replace(small_run, normalise=True, rotate=False)
    a, b = set_up(config, colour), set_up(dataclasses.replace(config, normalise=False), colour)
    x = torch.rand(4, 3, 28, 28)
    mean, std = torch.tensor([.485, .456, .406])[:, None, None], torch.tensor([.229, .224, .225])[:, None, None]
    assert torch.allclose(a.net(x), b.net((x-mean)/std), atol=1e-5)
    with pytest.raises(ValueError, match='colour'): set_up(config, few)


# --- testing, repeating, breaking

def test_any_steps_any_norm_any_relabelling(few, done):
    plain = grade_run(done, few)
    assert (set(plain['norms']) == {'targets', 'support', 'running'} and plain['n_tasks'] == small_run.test_tasks
            and plain['tasks_per_second'] > 0)
    assert plain['models'] == [f'best-epoch-{e:03d}' for e in best_epochs(read_metrics(done), small_run.keep)]
    longer = grade_run(done, few, n_steps=6, norms=('targets',), n_tasks=8)
    assert len(longer['norms']['targets']['single']['accuracy']) == 7 and set(longer['norms']) == {'targets'}
    again = grade_run(done, few, norms=('targets',))
    assert again['norms']['targets'] == plain['norms']['targets']
    with pytest.raises(ValueError, match="choose from 'val', 'test'"): grade_run(done, few, split='train')
    with pytest.raises(ValueError, match='choose from targets'): grade_run(done, few, norms=('target',))
    with pytest.raises(ValueError, match='from 1 to 3'): grade_run(done, few, n_permutations=4)


def test_a_damaged_model_is_left_out_and_named(few, done, tmp_path):
    import shutil
    copy, said = Path(shutil.copytree(done, tmp_path / 'copy')), []
    worst = sorted(copy.glob('best-*.safetensors'))[-1]
    worst.write_bytes(worst.read_bytes()[:-1])
    assert (len(grade_run(copy, few, norms=('targets',), say=said.append)['models']) == small_run.keep-1
            and worst.name in said[0])


def test_relabelling_changes_nothing_where_the_head_treats_labels_alike(few, done):
    "A head of zeros treats all labels alike, so each relabelling must give the same logits."
    from mamlpp_nb.evaluation import step_logits
    from mamlpp_nb.per_step_norm import predict_targets
    config = dataclasses.replace(small_run, precision='float64')
    setup = set_up(config, few)
    meta = maml_parameters(setup.net)
    meta.start['head.weight'].data.zero_()
    e = setup.test(0, 2)
    one, all3 = (step_logits(setup.forward, meta, e, {'targets': predict_targets(setup.net)}, 2, n)['targets']
                 for n in (1, 3))
    assert torch.allclose(one, all3, atol=1e-10) and one[-1].std() > 1e-3


def test_every_iteration_on_record_replays(few, done):
    recorded = [l for r in read_metrics(done) for l in r['losses']]
    for i, loss in enumerate(recorded):
        again = replay(done, i, few)
        assert again['loss'] == again['recorded'] == loss and len(again['tasks']) == small_run.n_tasks
        assert abs(sum(t['loss'] for t in again['tasks'])/small_run.n_tasks - loss) < 1e-5
    with pytest.raises(ValueError, match='iteration must be'): replay(done, len(recorded), few)


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_repeated(few, tmp_path):
    wild = dataclasses.replace(small_run, method='maml', outer_lr=1e20, average=0., epochs=1)
    with pytest.raises(Diverged, match=r'iteration \d+.*mamlpp replay') as e: train_run(wild, tmp_path, few, say=quiet)
    state = first_state(wild, set_up(wild, few))
    newest_state(tmp_path, state)
    assert (f'iteration {state.iteration} ' in str(e.value)
            and all(t.isfinite().all() for t in state.meta.learned().values()))
    again = replay(tmp_path, state.iteration, few)
    assert not all(math.isfinite(t['loss'] + t['gradient_norm']) for t in again['tasks'])


def test_evaluation_takes_few_tasks_at_a_time(few, done):
    from mamlpp_nb.evaluation import grade_models
    setup, asked = set_up(small_run, few), []

    class Spy:
        device = 'cpu'
        def __call__(self, first, n):
            asked.append(n)
            return setup.test(first, n)
    grade_models(setup.net, [setup.meta], Spy(), 21, 2, portion=5)
    assert asked == [5, 5, 5, 5, 1]


def test_validation_by_the_fast_inner_loop_says_what_the_plain_one_says(few, done):
    from mamlpp_nb.maml import evaluate
    setup = set_up(small_run, few)
    fast, plain = (evaluate(setup.forward, setup.meta, setup.validation, 20, small_run.n_steps, **how).per_task
                   for how in ({'adapt': setup.adapt}, {}))
    assert torch.equal(fast, plain) and fast.std() > 0


# --- the program

small_words = ('--data glyphs --n_way 3 --filters 4 --n_steps 2 --n_tasks 3 --epochs 2 --iterations 4 '
               '--validation_tasks 5 --test_tasks 5 --keep 2 --device cpu').split()


def test_signals_end_with_their_exit_codes(tmp_path, files):
    words = ['-m', 'mamlpp_nb.cli', 'train', 'omniglot-5w1s', *small_words, '--data', str(files),
             '--iterations', '100000', '--out', str(tmp_path / 'run')]
    for starts, (number, code) in enumerate(((signal.SIGTERM, 143), (signal.SIGINT, 130)), 1):
        process = subprocess.Popen([sys.executable, '-u', *words], stdout=subprocess.PIPE, text=True)
        while not (tmp_path / 'run/config.json').exists() or len(read_run(tmp_path / 'run')['starts']) < starts:
            assert process.poll() is None
            time.sleep(.1)
        time.sleep(1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode == code and 'the same command goes on' in out
                and (tmp_path / 'run/last.safetensors').exists())


@pytest.fixture
def mamlpp(tmp_path, monkeypatch, capsys):
    "The program in this process, in a folder of its own: exit code, what it printed, what it printed as errors."
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main([*map(str, words)])
        return (code, *capsys.readouterr())
    return run


def test_two_processes_learn_what_one_does_and_either_goes_on_with_the_others_run(tmp_path, files, mamlpp):
    words = ['train', 'omniglot-5w1s', *small_words, '--data', str(files), '--precision', 'float64']

    def two(*more):
        return program('-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m', 'mamlpp_nb.cli',
                       *words, *more, cwd=tmp_path)
    assert mamlpp(*words, '--out', 'one')[0] == 0
    said = two('--out', 'two', '--json')
    assert said.returncode == 0, said.stderr
    assert json.loads(next(l for l in said.stdout.splitlines() if l.startswith('{')))['status'] == 'complete'
    two('--out', 'both', '--minutes', '1e-6')
    assert mamlpp(*words, '--out', 'both')[0] == 0
    one, two, both = (load_file(tmp_path / name / 'last.safetensors') for name in ('one', 'two', 'both'))
    for other in (two, both):
        assert set(one) == set(other)
        for k, t in one.items():
            idle = k.startswith('start/conv') and k.endswith('bias') # before batch norm: rounding that Adam blows up
            if k.startswith(('start/', 'per_step/', 'step_sizes/')) and not idle:
                assert (t - other[k]).norm() <= 1e-11*t.norm()
    assert len(read_run(tmp_path / 'both')['starts']) == 2
    assert read_run(tmp_path / 'one')['test']['norms'] == read_run(tmp_path / 'two')['test']['norms']


def test_the_same_command_goes_on_and_another_gets_another_folder(tmp_path, mamlpp):
    words = ['train', 'omniglot-5w1s', *small_words]
    assert mamlpp(*words, '--minutes', '1e-6')[0] == 3
    assert mamlpp(*words)[0] == 0
    assert mamlpp(*words, '--seed', '1', '--method', 'maml', '--tensorboard')[0] == 0
    listed = json.loads(mamlpp('runs', '--json')[1])
    assert (len(listed) == 2 and {r['status'] for r in listed} == {'complete'}
            and {r['config']['seed'] for r in listed} == {0, 1})
    assert all(Path(r['folder']).name.startswith(
        f"omniglot-5w1s-{r['config']['method']}-seed{r['config']['seed']}") for r in listed)
    maml = tmp_path / next(r['folder'] for r in listed if r['config']['method'] == 'maml')
    assert list((maml / 'tensorboard').glob('events*'))
    code, shown, _ = mamlpp('show', maml)
    assert code == 0 and 'complete' in shown and (maml / 'curve.png').stat().st_size > 1000
    tested = json.loads(mamlpp('evaluate', maml, '--json', '--steps', '3', '--norm', 'support',
                               '--device', 'cpu')[1].splitlines()[-1])
    assert tested['n_steps'] == 3 and list(tested['norms']) == ['support']


@pytest.mark.parametrize('vectors, usual', [('AVX512', True), ('AVX2', False)]) # a compiler wins next to nothing there
def test_a_run_long_enough_compiles_unless_told_otherwise(few, monkeypatch, vectors, usual):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: vectors)
    long = dataclasses.replace(small_run, epochs=10**8)
    assert [set_up(c, few, compiled=asked).compiled
            for c in (small_run, long) for asked in (None, False, True)] == [False, False, True, usual, False, True]


@pytest.mark.parametrize('compiler', ['none', pytest.param('torch.compile', marks=pytest.mark.weekly)])
def test_a_compiled_run_goes_on_to_the_same_bits(few, tmp_path, monkeypatch, compiler):
    "Without a compiler, what is to be compiled runs as it is: the same road, at once"
    monkeypatch.setattr('mamlpp_nb.config.worth_compiling', lambda *a: True)
    if compiler == 'none':
        monkeypatch.setattr('mamlpp_nb.passes.Fused.compiled', lambda self: lambda *arguments: self.plain(*arguments))
    said = []
    assert train_run(small_run, tmp_path / 'whole', few, say=said.append) == 'complete'
    assert (any('compiling everything this run needs' in s for s in said)
            and any(s.startswith('compiled in') for s in said))
    while train_run(small_run, tmp_path / 'parts', few, minutes=1e-6, say=quiet) != 'complete': pass
    assert (equal(tmp_path / 'parts/last.safetensors', tmp_path / 'whole/last.safetensors')
            and no_clock(tmp_path / 'parts') == no_clock(tmp_path / 'whole'))
    assert replay(tmp_path / 'whole', 4, few)['loss'] == replay(tmp_path / 'whole', 4, few)['recorded']


def test_everything_is_compiled_before_the_first_step_that_counts(few, tmp_path, monkeypatch):
    "A program is compiled for each kind of argument; none is met for the first time after the first counted step."
    from torch.utils._pytree import tree_flatten
    from mamlpp_nb import training
    kinds, counted, new = set(), [], []
    def kind(x): return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x
    def watched(self):
        def call(*arguments):
            seen = self.plain.__name__, *map(kind, tree_flatten(arguments)[0])
            if seen not in kinds and counted: new.append(seen)
            kinds.add(seen)
            return self.plain(*arguments)
        return call
    taken = training.advance
    def advance(*arguments):
        counted.append(1)
        return taken(*arguments)
    monkeypatch.setattr('mamlpp_nb.passes.Fused.compiled', watched)
    monkeypatch.setattr(training, 'advance', advance)
    assert train_and_test([small_run], [tmp_path], few, say=quiet, compiled=True) == 'complete'
    assert len(kinds) > 3 and len(counted) == small_run.epochs*small_run.iterations and not new


def test_a_run_stopped_at_any_moment_has_a_model(few, done, tmp_path, monkeypatch):
    from mamlpp_nb import training
    from mamlpp_nb.classifier import read_pretrained
    said = []
    with monkeypatch.context() as m: # killed in its first step
        m.setattr(training, 'advance', lambda *arguments: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit): train_run(small_run, tmp_path, few, say=quiet)
    for unfinished in ('0 of 9 outer steps, the model is untrained', '1 of 9 outer steps, no epochs finished'):
        tested = grade_run(tmp_path, few, norms=('targets',), say=said.append)
        assert tested['models'] == ['last'] and any(f'is unfinished: {unfinished}' in s for s in said)
        assert read_pretrained(tmp_path).unfinished == unfinished
        train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet) # one more step
    train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet)
    train_run(small_run, tmp_path, few, minutes=1e-6, say=quiet)
    assert read_pretrained(tmp_path).unfinished == '3 of 9 outer steps, 1 epoch finished'
    assert grade_run(tmp_path, few, norms=('targets',), say=quiet)['models'] == ['best-epoch-000']
    assert read_pretrained(done).unfinished == ''


def test_validation_and_test_are_announced_and_in_the_time_left(few, tmp_path):
    said, left = [], []
    class Watched(Plan):
        def line(self, text):
            if text.startswith('epoch   3/3'): left.append(self.left)
            super().line(text)
    plan = Watched(said.append)
    train_runs([small_run], [tmp_path], few, say=said.append, plan=plan)
    for part in ('first-order gradient, targets graded after every inner step: 3 outer steps, about', 'second-order',
                 'validation: 12 tasks, about', 'test: 208 tasks of a model, about', ' in all on '):
        assert any(part in s for s in said), part
    assert left and left[0] == plan.parts['test'].left > 0 # after the last epoch the test is still to come


def test_a_best_model_that_was_displaced_is_gone_even_if_the_stop_came_just_before(few, tmp_path):
    train_run(small_run, tmp_path, few, say=quiet)
    kept = sorted(p.name for p in tmp_path.glob('best-*'))
    (tmp_path / 'best-epoch-099.safetensors').write_bytes(b'displaced')
    train_run(small_run, tmp_path, few, say=quiet)
    assert sorted(p.name for p in tmp_path.glob('best-*')) == kept


# --- several seeds at once

def of_seeds(config, n): return [dataclasses.replace(config, seed=s) for s in range(n)]


def test_seeds_together_learn_what_each_learns_alone(few, tmp_path):
    configs, said = of_seeds(small_run, 3), []
    assert train_runs(configs, [tmp_path / f'together{s}' for s in range(3)], few, say=said.append) == 'complete'
    assert sum(s.startswith('seed 2, epoch') for s in said) == small_run.epochs
    for s, config in enumerate(configs):
        train_run(config, tmp_path / f'alone{s}', few, say=quiet)
        together, alone = (load_file(tmp_path / f'{k}{s}/last.safetensors') for k in ('together', 'alone'))
        assert set(together) == set(alone)
        for k, t in alone.items(): assert torch.allclose(t, together[k], rtol=1e-4, atol=1e-6), k
        rows = [read_metrics(tmp_path / f'{k}{s}') for k in ('together', 'alone')]
        assert [r['validation'] for r in rows[0]] == [r['validation'] for r in rows[1]]
        for a, b in zip(*rows): assert a['losses'] == pytest.approx(b['losses'], abs=1e-5)
    assert read_run(tmp_path / 'together1')['starts'][0]['seeds_at_once'] == 3


def test_a_seed_that_is_behind_catches_up(few, tmp_path):
    configs, folders = of_seeds(small_run, 2), [tmp_path / 'a', tmp_path / 'b']
    train_runs(configs, [tmp_path / 'whole0', tmp_path / 'whole1'], few, say=quiet)
    assert train_run(configs[0], folders[0], few, minutes=1e-6, say=quiet) == 'out of time' # one step of one seed
    while train_runs(configs, folders, few, minutes=1e-6, say=quiet) != 'complete': pass # stopped after every step
    for s in range(2):
        one, other = load_file(folders[s] / 'last.safetensors'), load_file(tmp_path / f'whole{s}/last.safetensors')
        for k, t in one.items(): assert torch.allclose(t, other[k], rtol=1e-4, atol=1e-6), k
        assert [r['iteration'] for r in read_metrics(folders[s])] == [3, 6, 9]


def test_runs_that_go_together_differ_in_the_seed_alone(few, tmp_path):
    for second in (small_run, dataclasses.replace(small_run, seed=1, n_steps=3)):
        with pytest.raises(ValueError, match='differ in their seeds'):
            train_runs([small_run, second], [tmp_path / 'a', tmp_path / 'b'], few, say=quiet)
    assert not (tmp_path / 'a').exists()


def test_one_of_two_seeds_diverges_and_is_named(few, tmp_path, monkeypatch):
    from mamlpp_nb import runs
    taken = runs.fused_adam
    calls = []
    def explosive(meta, lr, beta2): # the second seed has no chance
        calls.append(lr)
        if len(calls) == 2: next(iter(meta.start.values())).data.fill_(float('inf'))
        return taken(meta, lr, beta2)
    monkeypatch.setattr(runs, 'fused_adam', explosive)
    with pytest.raises(Diverged, match='iteration 0, .* of seed 1;'):
        train_runs(of_seeds(small_run, 2), [tmp_path / 'a', tmp_path / 'b'], few, say=quiet)


@pytest.mark.parametrize('average', [0., .5])
def test_a_captured_run_ends_with_the_same_bits(few, tmp_path, monkeypatch, average):
    from mamlpp_nb import training
    config = dataclasses.replace(small_run, average=average)
    train_run(config, tmp_path / 'plain', few, say=quiet)
    made = training.outer_steps
    monkeypatch.setattr(training, 'outer_steps',
                        lambda config, seeds, world, captured: made(config, seeds, world, True))
    monkeypatch.setattr(training, 'stretch', lambda config, device, pace: config.iterations) # as on a GPU
    monkeypatch.setattr('mamlpp_nb.speed.capture', tape.capture)
    train_run(config, tmp_path / 'taped', few, say=quiet)
    assert (equal(tmp_path / 'plain/last.safetensors', tmp_path / 'taped/last.safetensors')
            and no_clock(tmp_path / 'plain') == no_clock(tmp_path / 'taped'))


def test_seeds_on_the_command_line(tmp_path, mamlpp):
    words = ['train', 'omniglot-5w1s', *small_words, '--json', '--seeds', '3', '5']
    code, said, errors = mamlpp(*words, '--out', 'both')
    assert code == 0, errors
    made = json.loads(said.splitlines()[-1])
    assert [m['folder'] for m in made] == ['both/seed3', 'both/seed5'] and all(m['test'] for m in made)
    assert mamlpp(*words, '--out', 'both', '--minutes', '1e-6')[0] == 0 # nothing is left to do
    for seeds in ('1,1', '1;2', 'x'): assert 'seeds must' in mamlpp(*words[:-2], seeds)[2]
    assert '--seed or --seeds' in mamlpp(*words, '--seed', '1')[2]
