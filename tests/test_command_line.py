"The program as a shell sees it."
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from conftest import tiny_run
from mamlpp_nb.cli import main, seconds_left
from mamlpp_nb.config import Config, configure, presets, step_operations
from mamlpp_nb.diagnostics import score_of, steps_done
from mamlpp_nb.maml import Diverged, load_meta
from mamlpp_nb.reproduce import Row, run_operations, tables
from mamlpp_nb.runs import newest_step, open_run, record_schema
from mamlpp_nb.training import train_and_test, train_run


def mamlpp(*words, cwd=None, **env):
    return subprocess.run([sys.executable, '-m', 'mamlpp_nb.cli', *words], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **env}, stdin=subprocess.DEVNULL)


def test_help_and_version(capsys):
    assert main(['--version']) == 0 and capsys.readouterr().out.strip()[0].isdigit()
    with pytest.raises(SystemExit) as e: main(['quickstart', '--help']) # argparse's way to stop
    said = capsys.readouterr().out
    assert e.value.code == 0
    for word in ('--data', '--method', 'mamlpp', '--minutes', '(minutes)', '--iterations', '--device', '--json'):
        assert word in said


def test_the_installed_program_is_the_same():
    program = Path(sys.executable).with_name('mamlpp')
    if not program.exists(): pytest.skip('mamlpp is not installed beside this Python (pip install -e .)')
    said = subprocess.run([program, 'learn'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert said.returncode == 2 and "no command 'learn'" in said.stderr and 'quickstart' in said.stderr


@pytest.mark.parametrize('words, named', [
    ([], 'usage'),
    (['learn'], "no command 'learn'"),
    (['quickstart', '--data', 'mnist'], "'glyphs'"),
    (['quickstart', '--minutes', '-1'], 'at least 0'),
    (['quickstart', '--minutes', 'nan'], 'at least 0'),
    (['quickstart', '--minutes', 'two'], 'invalid float'),
    (['quickstart', '--devise', 'cpu'], '--devise'),
    (['quickstart', '--dev', 'cpu'], '--dev'),
    (['quickstart', '--device', 'abacus'], "no device 'abacus'"),
    (['quickstart', '--method', 'mamlp'], 'choose from maml, maml+msl'),
    (['quickstart', '--method', 'maml+bnn'], 'parts are msl, bn'),
    (['quickstart', '--iterations', '0'], 'at least 1'),
    (['bench', '--workload', 'all-of-it'], 'mini-imagenet-5w1s, or one with a method'),
    (['bench', '--workload', 'omniglot-20w1s-mam'], 'choose from maml'),
])
def test_mistakes_are_answered_and_exit_with_2(words, named, capsys):
    try: code = main(words)
    except SystemExit as e: code = e.code # argparse's way to stop
    said = ''.join(capsys.readouterr())
    assert code == 2 and named in said and 'Traceback' not in said


def test_peers_that_are_not_installed_are_not_timed(monkeypatch, capsys):
    from mamlpp_nb import bench
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(bench, 'ceilings', lambda device: {
        'operations_per_second': 1e9, 'by': 'nothing', 'bytes_per_second': 1e9})
    monkeypatch.setattr(bench, 'workloads', {
        'tiny': Config('glyphs', n_way=2, filters=4, n_tasks=1, image_size=16, method='maml')})
    bench.bench('tiny', rounds=1, device='cpu', ways='written out', peers=True)
    assert 'none' in ''.join(capsys.readouterr())


def test_missing_data_exits_with_1(tmp_path):
    said = mamlpp('quickstart', '--data', 'omniglot', MAMLPP_DATA=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
                  http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    assert said.returncode == 1 and 'images_background.zip' in said.stderr and 'Traceback' not in said.stderr


def test_quickstart_from_start_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets, 'quickstart', configure('quickstart', filters=16, test_tasks=40))
    monkeypatch.chdir(tmp_path)
    assert main(['quickstart', '--data', 'glyphs', '--minutes', '.02', '--json', '--out', 'here',
                 '--device', 'cpu']) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last['data'] == 'glyphs' and last['method'] == 'mamlpp'
            and last['iterations'] == last['planned'] >= 30 and last['seconds'] > 0)
    assert 0 < last['accuracy_before'] < .4 < last['accuracy'] <= 1 and 0 < last['ci95'] < .1
    meta, about = load_meta(tmp_path / last['checkpoint'])
    assert (about['config']['data'] == 'glyphs' and about['iterations'] == last['iterations']
            and 'conv0.weight' in meta.start)
    assert Image.open(tmp_path / last['figure']).size[0] > 300
    record = json.loads((tmp_path / 'here/record.json').read_text())
    jsonschema.validate(record, record_schema)
    assert (score_of(record)['accuracy'][-1] == last['accuracy'] and steps_done(record) == last['iterations']
            and record['minutes'] == .02 and 'cold_cache' in record)


def test_quickstart_by_outer_steps_does_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(presets, 'quickstart', configure('quickstart', filters=8, test_tasks=20))
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b'):
        assert main(['quickstart', '--data', 'glyphs', '--method', 'maml+lslr+da', '--iterations', '2', '--seed', '3',
                     '--out', name, '--device', 'cpu']) == 0
    a, b = (json.loads((tmp_path / name / 'record.json').read_text()) for name in ('a', 'b'))
    assert steps_done(a) == 2 and a['config']['method'] == 'maml+lslr+da' and a['config']['seed'] == a['seed'] == 3
    for key in ('loss', 'accuracy', 'epoch', 'gradient_norm'): assert a['steps'][key] == b['steps'][key]
    assert a['test']['norms'] == b['test']['norms'] and a['step_sizes'] == b['step_sizes']
    assert a['test']['norms'].keys() == {'targets', 'support'} and len(a['step_sizes']['head.weight']) == 5


def test_output_that_nobody_reads_ends_the_program_quietly(tmp_path):
    words = ['train', 'omniglot-5w1s', '--data', 'glyphs', '--out', str(tmp_path / 'run'), '--epochs', '50',
             '--iterations', '2', '--validation_tasks', '2', '--test_tasks', '2', '--filters', '2', '--n_tasks', '1',
             '--n_steps', '1', '--keep', '1', '--device', 'cpu']
    process = subprocess.Popen([sys.executable, '-m', 'mamlpp_nb.cli', *words],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close() # as `head -1` does
    errors = process.stderr.read()
    assert (process.wait(timeout=120) == 141 and 'nobody reads the output' in errors
            and 'Traceback' not in errors and 'make room' not in errors)


@pytest.mark.parametrize('device', ['mps', 'cuda:99', 'toaster'])
def test_a_device_that_is_not_there_is_refused_in_a_line(capsys, device):
    assert main(['quickstart', '--data', 'glyphs', '--device', device]) == 2
    said = capsys.readouterr().err.strip()
    assert 'no device' in said and '\n' not in said and len(said) < 300


def files_in(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_runs_says_how_far_each_has_got(tmp_path, drawn, monkeypatch, capsys):
    for page in ('evaluation', 'training'): monkeypatch.setattr(f'mamlpp_nb.{page}.gathered_tasks', 8) # instead of 100
    monkeypatch.setitem(tables, 'short', {'a': Row(tiny_run)})
    folder, other = tmp_path / 'short/a-seed10', tmp_path / 'by-hand'

    def told(): # about both, and nothing has been written
        before = files_in(tmp_path)
        assert main(['runs', str(tmp_path), '--json']) == 0 and files_in(tmp_path) == before
        return {Path(r['folder']).name: r for r in json.loads(capsys.readouterr().out)}

    assert train_run(tiny_run, folder, drawn, minutes=1e-9, say=lambda text: None) == 'out of time'
    with open_run(other, tiny_run): pass
    found = told()
    a, b = found['a-seed10'], found['by-hand']
    assert (a['table'], a['row'], a['seed'], a['outer_step'], a['outer_steps'], a['status'],
            a['validation'], a['test']) == ('short', 'a', 10, 1, 4, 'unfinished', None, None)
    step, seconds = step_operations(tiny_run, 0), newest_step(folder)[1]
    assert (a['seconds_left'] == pytest.approx(seconds * (run_operations(tiny_run) / step - 1))
            and run_operations(tiny_run) != 4 * step) # the second epoch costs more
    assert (b['table'], b['row'], b['outer_step'], b['seconds_left']) == (None, None, 0, None)

    with open_run(folder, tiny_run): assert told()['a-seed10']['status'] == 'going on'
    assert train_and_test([tiny_run], [folder], drawn, say=lambda text: None) == 'complete'
    a = told()['a-seed10']
    assert ((a['outer_step'], a['status'], a['seconds_left']) == (4, 'complete', 0)
            and a['validation']['accuracy'] and a['test']['single']['accuracy'])
    assert main(['runs', str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [c for c in ('outer steps', 'training left', 'best validation') if c not in head] == [] and len(lines) == 2
    assert '4 of 4' in lines[1] and 'complete' in lines[1] and '0 of 4' in lines[0] and 'unfinished' in lines[0]


def test_time_left_goes_by_the_last_epochs():
    config = Config(method='maml', epochs=10, iterations=10, n_way=5, filters=4)
    rows = [{'iteration': 10 * (e + 1), 'seconds': 100. * (e + 1) if e < 2 else 200. + 10 * (e - 1)}
            for e in range(8)] # slow at first: the machine had other work
    assert seconds_left(config, rows[:2], 20, 200.) == pytest.approx(800)
    assert seconds_left(config, rows, 80, rows[-1]['seconds']) == pytest.approx(20)
    assert seconds_left(config, rows, 85, rows[-1]['seconds'] + 5) == pytest.approx(15)
    assert seconds_left(config, [], 0, 0.) is None
    # what nobody can count goes by outer steps
    own = dataclasses.replace(config, data='my/images', network='perceptron')
    assert seconds_left(own, rows, 85, rows[-1]['seconds'] + 5) == pytest.approx(15)


def test_runs_names_what_diverged(tmp_path, drawn, capsys):
    wild = dataclasses.replace(tiny_run, outer_lr=1e20)
    with pytest.raises(Diverged) as e: train_run(wild, tmp_path / 'wild', drawn, say=lambda text: None)
    assert main(['runs', str(tmp_path), '--json']) == 0
    said, = json.loads(capsys.readouterr().out)
    assert (said['status'] == 'diverged'
            and json.loads((tmp_path / 'wild/diverged.json').read_text())['why'] == str(e.value))
    (tmp_path / 'wild/diverged.json').write_text('{')
    assert main(['runs', str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert 'diverged.json is damaged' in said.err and 'no runs in' in said.out


def test_runs_leaves_out_what_is_no_run_and_says_so(tmp_path, capsys):
    assert main(['runs', str(tmp_path)]) == 0 and f'no runs in {tmp_path}' in capsys.readouterr().out
    assert main(['runs', str(tmp_path), '--json']) == 0 and json.loads(capsys.readouterr().out) == []
    assert main(['runs', str(tmp_path / 'nowhere')]) == 0 and 'no runs in' in capsys.readouterr().out
    with pytest.raises(SystemExit): main(['runs', 'a', 'b'])
    capsys.readouterr()
    with open_run(tmp_path / 'good', tiny_run): pass
    spoilt = {'foreign': ('config.json', b'{"model_type": "bert"}'), 'cut': ('metrics.jsonl', b'{"epoch": 0'),
              'strange': ('metrics.jsonl', b'{}\n'), 'bytes': ('metrics.jsonl', b'\xff\n'),
              'untested': ('test.json', b'['), 'state': ('last.safetensors', b'no tensors')}
    for name, (file, data) in spoilt.items():
        with open_run(tmp_path / name, tiny_run): pass
        (tmp_path / name / file).write_bytes(data)
    (tmp_path / 'a folder/config.json').mkdir(parents=True)
    assert main(['runs', str(tmp_path), '--json']) == 0
    said = capsys.readouterr()
    # a run whose state is damaged is there all the same
    assert {Path(r['folder']).name for r in json.loads(said.out)} == {'good', 'state'}
    lines = said.err.splitlines()
    assert len(lines) == 6 and all(line.startswith('left out: ') for line in lines)
    for name in ('foreign', 'cut', 'strange', 'bytes', 'untested', 'a folder'):
        assert any(str(tmp_path / name) in line for line in lines), name
