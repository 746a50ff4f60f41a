"A quickstart does the same everywhere: no clock, no pause and no Ctrl-C changes what an outer step does."
import dataclasses
import json
import random
import signal

import jsonschema
import pytest
import torch
from conftest import quiet

from mamlpp_nb import quickstart as page
from mamlpp_nb.classifier import read_pretrained
from mamlpp_nb.cli import main
from mamlpp_nb.diagnostics import steps_done
from mamlpp_nb.maml import load_meta
from mamlpp_nb.mamlpp import Schedule, find_method, phases
from mamlpp_nb.quickstart import affordable, assemble, epoch_at, pace, run_quickstart, stretches
from mamlpp_nb.config import Config, configure, presets
from mamlpp_nb.runs import read_metrics, record_schema

small = configure('quickstart', data='glyphs', n_way=3, filters=4, n_target=1, n_steps=2, n_tasks=1, test_tasks=4)


@pytest.fixture(scope='module')
def few(drawn): return {s: d.select(range(12), s) for s, d in drawn.items()}


class Jumping:
    "A clock that leaps ahead by up to an hour whenever it likes, as where a laptop sleeps."
    def __init__(self, seed): self.random, self.now = random.Random(seed), 0.
    def monotonic(self):
        self.now += self.random.choice([.001, .001, .01, 40., 3600.])
        return self.now


@pytest.fixture(scope='module')
def calm(few, tmp_path_factory):
    return run_quickstart(small, few, 'cpu', tmp_path_factory.mktemp('calm'), 60, say=quiet)


@pytest.mark.parametrize('seed', range(2))
def test_a_clock_that_jumps_changes_no_result(few, calm, tmp_path, monkeypatch, seed):
    jumping = Jumping(seed)
    for module in ('quickstart', 'maml', 'progress'): monkeypatch.setattr(f'mamlpp_nb.{module}.time', jumping)
    leaping = run_quickstart(small, few, 'cpu', tmp_path / 'leaping', 60, say=quiet)
    for key in ('loss', 'accuracy', 'gradient_norm', 'epoch'): assert calm['steps'][key] == leaping['steps'][key]
    assert calm['test']['norms'] == leaping['test']['norms'] and calm['step_sizes'] == leaping['step_sizes']
    assert calm['steps']['epoch'] == [i // 2 for i in range(60)] # every epoch of the schedule has its two steps


@pytest.mark.parametrize('seed', range(3))
def test_minutes_choose_the_steps_before_the_first_and_then_no_pause_skips_a_phase(few, tmp_path, monkeypatch, seed):
    jumping = Jumping(seed)
    for module in ('quickstart', 'maml', 'progress'): monkeypatch.setattr(f'mamlpp_nb.{module}.time', jumping)
    # a leap may say anything
    monkeypatch.setattr(page, 'affordable', lambda paces, minutes: min(affordable(paces, minutes), 45))
    record = run_quickstart(small, few, 'cpu', tmp_path, minutes=1, say=quiet)
    n = record['planned']
    assert steps_done(record) == n >= 30 and set(record['steps']['epoch']) == set(range(30)) and record['minutes'] == 1
    assert record['steps']['epoch'] == [epoch_at(i, n, 30) for i in range(n)]


def test_minutes_are_shared_out_at_the_pace_of_each_phase():
    found = phases(find_method('mamlpp'), Schedule(30, 3, 10))
    paces = list(zip(found, (.4, .1, .2)))
    assert [len(steps) for *_, steps in stretches(paces, 300)] == [30, 70, 200]
    assert abs(sum(s * len(steps) for _, s, steps in stretches(paces, affordable(paces, 2.))) - 120) < 1


def test_a_pause_during_a_warm_up_step_hardly_counts(few, monkeypatch):
    class Once: # one of the looks takes an hour
        now, looks = 0., 0
        def monotonic(self):
            self.looks += 1
            self.now += 3600. if self.looks == 5 else 1.
            return self.now
    monkeypatch.setattr('mamlpp_nb.quickstart.time', Once())
    assert [seconds for _, seconds in pace(assemble(small, few), looks=3)] == [1., 1., 1.]


def test_two_runs_of_one_machine_agree_to_the_bit_and_warm_up_moves_nothing(few, tmp_path):
    a, b = (run_quickstart(small, few, 'cpu', tmp_path / name, 10, minutes, quiet)
            for name, minutes in (('a', 0.), ('b', 0.)))
    one, other = (load_meta(tmp_path / name / 'meta.safetensors')[0].named() for name in ('a', 'b'))
    assert all(torch.equal(one[k], other[k]) for k in one) and a['steps']['loss'] == b['steps']['loss']
    q = assemble(small, few)
    before = {k: t.clone() for k, t in q.meta.named().items()}
    pace(q, looks=2)
    assert all(torch.equal(before[k], t) for k, t in q.meta.named().items())


def test_everything_is_announced_and_each_phase_begins_with_a_line(few, tmp_path):
    said = []
    run_quickstart(small, few, 'cpu', tmp_path, 30, say=said.append)
    begin = said.index(next(s for s in said if ' in all on ' in s))
    announced, after = '\n'.join(said[:begin+1]), '\n'.join(said[begin+1:])
    for part in ('test of the untrained network: 2 tasks, about',
                 'first-order gradient, targets graded after every inner step: 2 outer steps, about',
                 'second-order', '  test: 4 tasks, about'):
        assert part in announced
    for line in ('outer step 1: first-order', 'outer step 3: first-order', 'outer step 16: second-order'):
        assert line in after


def test_ctrl_c_ends_with_the_weights_so_far_tested_and_kept(few, tmp_path, monkeypatch, capsys):
    taken = page.train
    def interrupted(loop, meta, n, checkpoint, about, history, watch, stop):
        def seen(history):
            watch(history)
            if len(history) == 7: signal.raise_signal(signal.SIGINT)
        return taken(loop, meta, n, checkpoint, about, history, seen, stop)
    monkeypatch.setattr(page, 'train', interrupted)
    monkeypatch.setattr(page, 'characters', lambda name: ('glyphs', few))
    monkeypatch.setitem(presets, 'quickstart', small)
    assert main(['quickstart', '--data', 'glyphs', '--iterations', '40', '--out', str(tmp_path / 'q'),
                 '--device', 'cpu']) == 130
    said = capsys.readouterr().out
    record = json.loads((tmp_path / 'q/record.json').read_text())
    assert (steps_done(record) == 7 and record['planned'] == 40
            and 'unfinished' in said and 'SIGINT after outer step 7 of 40' in said)
    assert set(record['test']['norms']) == {'targets', 'support'} and (tmp_path / 'q/episode.png').exists()
    for path in (tmp_path / 'q', tmp_path / 'q/meta.safetensors'): # what `adapt` reads
        model = read_pretrained(path)
        assert model.unfinished == '7 of 40 outer steps' and model.config.n_way == 3


def test_a_quickstart_that_is_killed_at_once_has_weights(few, tmp_path, monkeypatch):
    def killed(*_, **__): raise SystemExit(9)
    monkeypatch.setattr('mamlpp_nb.maml.recent', killed)
    monkeypatch.setattr(page, 'recent', killed)
    with pytest.raises(SystemExit): run_quickstart(small, few, 'cpu', tmp_path, 40, say=quiet)
    assert load_meta(tmp_path / 'meta.safetensors')[1]['planned'] == 40


def test_a_whole_quickstart_is_not_called_unfinished(few, tmp_path):
    run_quickstart(small, few, 'cpu', tmp_path, 3, say=quiet)
    assert read_pretrained(tmp_path).unfinished == ''


def test_nothing_is_compiled(few, tmp_path, monkeypatch):
    monkeypatch.setattr('mamlpp_nb.passes.Fused.__call__',
                        lambda self, *arguments: pytest.fail('a quickstart waits for no compiler'))
    assert steps_done(run_quickstart(small, few, 'cpu', tmp_path, 3, say=quiet)) == 3



# --- one configuration

def test_the_preset_has_the_settings_the_committed_records_were_made_with():
    made_with = {'data': 'omniglot', 'method': 'mamlpp', 'n_way': 5, 'k_shot': 1, 'n_target': 5, 'filters': 32,
                 'strided': False, 'n_steps': 5, 'inner_lr': .1, 'n_tasks': 2, 'epochs': 30, 'iterations': 33,
                 'multi_step_epochs': 2, 'first_order_epochs': 15, 'outer_lr': 2e-3, 'last_outer_lr': 2e-5,
                 'test_tasks': 200, 'test_targets': 1, 'rotate': True, 'seed': 0}
    assert dataclasses.asdict(presets['quickstart']).items() >= made_with.items()


def test_a_record_and_a_model_say_the_settings_and_the_outer_steps_of_an_epoch(few, tmp_path):
    record = run_quickstart(small, few, 'cpu', tmp_path, 60, say=quiet)
    planned = dataclasses.replace(small, iterations=2)
    assert (Config(**record['config']) == planned
            == Config(**json.loads((tmp_path / 'record.json').read_text())['config']))
    assert read_pretrained(tmp_path).config == planned


def test_a_record_is_one_of_the_one_schema(few, tmp_path):
    run_quickstart(small, few, 'cpu', tmp_path, 3, say=quiet)
    record = json.loads((tmp_path / 'record.json').read_text())
    jsonschema.validate(record, record_schema)
    assert (record['seed'] == small.seed and record['test']['n_tasks'] == 4
            and len(record['steps']['ended']) == 3 and 'minutes' not in record)
    for spoil in (lambda r: r.pop('steps'), lambda r: r['steps'].pop('loss'), lambda r: r.pop('method'),
                  lambda r: r['test'].pop('norms'), lambda r: r.update(row='a'),
                  lambda r: r.update(table='short', row='a'), lambda r: r['steps'].update(second=[1., 2., 3.])):
        spoilt = json.loads(json.dumps(record))
        spoil(spoilt)
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(spoilt, record_schema)


@pytest.mark.parametrize('setting', [{'clamp': 1.}, {'average': .5}, {'beta2': .9}, {'dropout': True},
                                     {'loss': 'squared error'}])
def test_a_setting_that_a_quickstart_does_not_read_is_refused(few, setting):
    with pytest.raises(ValueError, match=f'no setting {next(iter(setting))}'):
        assemble(dataclasses.replace(small, **setting), few)


@pytest.mark.parametrize('tests', [('support',), ('targets', 'nobody'), ()])
def test_ways_to_normalise_are_checked_before_anything_runs(few, tmp_path, tests):
    with pytest.raises(ValueError, match="tests are 'targets' and others of"):
        run_quickstart(small, few, 'cpu', tmp_path, 3, say=quiet, tests=tests)
    assert not list(tmp_path.iterdir())


def test_train_by_the_preset_makes_the_steps_of_the_command(few, tmp_path, monkeypatch):
    monkeypatch.setitem(presets, 'quickstart', dataclasses.replace(
        small, data='omniglot', epochs=6, iterations=2, first_order_epochs=3, validation_tasks=2, keep=1))
    monkeypatch.setattr('mamlpp_nb.config.load_data', lambda name: few)
    assert main(['train', 'quickstart', '--data', 'glyphs', '--out', str(tmp_path / 'run'), '--device', 'cpu']) == 0
    record = run_quickstart(configure('quickstart', data='glyphs'), few, 'cpu', tmp_path, 12, say=quiet)
    means = [sum(record['steps']['loss'][i:i + 2]) / 2 for i in range(0, 12, 2)]
    assert [m['loss'] for m in read_metrics(tmp_path / 'run')] == pytest.approx(means, rel=1e-5)
