"The program as a shell sees it."
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from mamlpp_nb.cli import main
from mamlpp_nb.config import Config, configure, presets
from mamlpp_nb.diagnostics import score_of, steps_done
from mamlpp_nb.maml import load_meta
from mamlpp_nb.runs import record_schema


def mamlpp(*words, cwd=None, **env):
    return subprocess.run([sys.executable, '-m', 'mamlpp_nb.cli', *words], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL)


def test_help_and_version(capsys):
    assert main(['--version']) == 0 and capsys.readouterr().out.strip()[0].isdigit()
    with pytest.raises(SystemExit) as e: main(['quickstart', '--help']) # argparse's way to stop
    said = capsys.readouterr().out
    assert e.value.code == 0
    for word in ('--data', '--method', 'mamlpp', '--minutes', '(minutes)', '--iterations', '--device', '--json'): assert word in said


def test_the_installed_program_is_the_same():
    program = Path(sys.executable).with_name('mamlpp')
    if not program.exists(): pytest.skip('mamlpp is not installed beside this Python (pip install -e .)')
    said = subprocess.run([program, 'learn'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert said.returncode == 2 and "no command 'learn'" in said.stderr and 'quickstart' in said.stderr


@pytest.mark.parametrize('words, named', [
    ([], 'usage'), (['learn'], "no command 'learn'"), (['quickstart', '--data', 'mnist'], "'glyphs'"),
    (['quickstart', '--minutes', '-1'], 'at least 0'), (['quickstart', '--minutes', 'nan'], 'at least 0'), (['quickstart', '--minutes', 'two'], 'invalid float'),
    (['quickstart', '--devise', 'cpu'], '--devise'), (['quickstart', '--dev', 'cpu'], '--dev'), (['quickstart', '--device', 'abacus'], "no device 'abacus'"),
    (['quickstart', '--method', 'mamlp'], 'choose from maml, maml+msl'), (['quickstart', '--method', 'maml+bnn'], 'parts are msl, bn'), (['quickstart', '--iterations', '0'], 'at least 1'),
    (['bench', '--workload', 'all-of-it'], 'mini-imagenet-5w1s, or one with a method'), (['bench', '--workload', 'omniglot-20w1s-mam'], 'choose from maml'),
])
def test_mistakes_are_answered_and_exit_with_2(words, named, capsys):
    try: code = main(words)
    except SystemExit as e: code = e.code # argparse's way to stop
    said = ''.join(capsys.readouterr())
    assert code == 2 and named in said and 'Traceback' not in said


def test_peers_that_are_not_installed_are_not_timed(monkeypatch, capsys):
    from mamlpp_nb import bench
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(bench, 'ceilings', lambda device: {'operations_per_second': 1e9, 'by': 'nothing', 'bytes_per_second': 1e9})
    monkeypatch.setattr(bench, 'workloads', {'tiny': Config('glyphs', n_way=2, filters=4, n_tasks=1, image_size=16, method='maml')})
    bench.bench('tiny', rounds=1, device='cpu', ways='written out', peers=True)
    assert 'none' in ''.join(capsys.readouterr())


def test_missing_data_exits_with_1(tmp_path):
    said = mamlpp('quickstart', '--data', 'omniglot', MAMLPP_DATA=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    assert said.returncode == 1 and 'images_background.zip' in said.stderr and 'Traceback' not in said.stderr


def test_quickstart_from_start_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets, 'quickstart', configure('quickstart', filters=16, test_tasks=40))
    monkeypatch.chdir(tmp_path)
    assert main(['quickstart', '--data', 'glyphs', '--minutes', '.02', '--json', '--out', 'here', '--device', 'cpu']) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last['data'] == 'glyphs' and last['method'] == 'mamlpp' and last['iterations'] == last['planned'] >= 30 and last['seconds'] > 0
    assert 0 < last['accuracy_before'] < .4 < last['accuracy'] <= 1 and 0 < last['ci95'] < .1
    meta, about = load_meta(tmp_path / last['checkpoint'])
    assert about['config']['data'] == 'glyphs' and about['iterations'] == last['iterations'] and 'conv0.weight' in meta.start
    assert Image.open(tmp_path / last['figure']).size[0] > 300
    record = json.loads((tmp_path / 'here/record.json').read_text())
    jsonschema.validate(record, record_schema)
    assert score_of(record)['accuracy'][-1] == last['accuracy'] and steps_done(record) == last['iterations'] and record['minutes'] == .02 and 'cold_cache' in record


def test_quickstart_by_outer_steps_does_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(presets, 'quickstart', configure('quickstart', filters=8, test_tasks=20))
    monkeypatch.chdir(tmp_path)
    for name in ('a', 'b'):
        assert main(['quickstart', '--data', 'glyphs', '--method', 'maml+lslr+da', '--iterations', '2', '--seed', '3', '--out', name, '--device', 'cpu']) == 0
    a, b = (json.loads((tmp_path / name / 'record.json').read_text()) for name in ('a', 'b'))
    assert steps_done(a) == 2 and a['config']['method'] == 'maml+lslr+da' and a['config']['seed'] == a['seed'] == 3
    for key in ('loss', 'accuracy', 'epoch', 'gradient_norm'): assert a['steps'][key] == b['steps'][key]
    assert a['test']['norms'] == b['test']['norms'] and a['step_sizes'] == b['step_sizes']
    assert a['test']['norms'].keys() == {'targets', 'support'} and len(a['step_sizes']['head.weight']) == 5


def test_output_that_nobody_reads_ends_the_program_quietly(tmp_path):
    words = ['train', 'omniglot-5w1s', '--data', 'glyphs', '--out', str(tmp_path / 'run'), '--epochs', '50', '--iterations', '2', '--validation_tasks', '2',
             '--test_tasks', '2', '--filters', '2', '--n_tasks', '1', '--n_steps', '1', '--keep', '1', '--device', 'cpu']
    process = subprocess.Popen([sys.executable, '-m', 'mamlpp_nb.cli', *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close() # as `head -1` does
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 141 and 'nobody reads the output' in errors and 'Traceback' not in errors and 'make room' not in errors


@pytest.mark.parametrize('device', ['mps', 'cuda:99', 'toaster'])
def test_a_device_that_is_not_there_is_refused_in_a_line(capsys, device):
    assert main(['quickstart', '--data', 'glyphs', '--device', device]) == 2
    said = capsys.readouterr().err.strip()
    assert 'no device' in said and '\n' not in said and len(said) < 300
