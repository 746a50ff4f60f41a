"Tables of runs: records that hold to their schema, budgets of time, divergence, seeds at once."
import dataclasses
import json
import re
from pathlib import Path

import jsonschema
import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file

import tape  # noqa: F401  (the same folder as the other tests)
from conftest import tiny_run
from mamlpp_nb import reproduce as module
from mamlpp_nb.cli import main
from mamlpp_nb.diagnostics import method_colors
from mamlpp_nb.maml import load_meta
from mamlpp_nb.config import Config, epoch_parts, set_up
from mamlpp_nb.runs import first_state, record_schema
from mamlpp_nb.training import outer_steps
from mamlpp_nb.reproduce import (Row, chosen_rows, over_seeds, plot_curves, published, published_table, read_records,
                                 reproduce, results_table, run_operations, seed_list, tables)

here = Path(__file__).parent
results = here.parent / 'nbs/results/tables'
committed = sorted(p for name in tables for p in (results / name).glob('*.json'))


# with a part of the published outer steps
shorter = {'omniglot-20w1s-tenth', 'omniglot-20w1s-best', 'omniglot-20w5s-hundredth', 'mini-imagenet-tenth',
           'stability-tenth'}
short = dataclasses.replace(tiny_run, epochs=2, n_steps=2, seed=0)


@pytest.fixture
def table(monkeypatch, drawn):
    "Two short rows on few classes."
    few = {s: d.select(range(30), s) for s, d in drawn.items()}
    for page in ('evaluation', 'training'): monkeypatch.setattr(f'mamlpp_nb.{page}.gathered_tasks', 8) # instead of 100
    monkeypatch.setattr(module, 'load_data', lambda name: few)
    monkeypatch.setitem(tables, 'short', {'a': Row(short, (50., 1.)),
                                          'b': Row(dataclasses.replace(short, method='maml'))})


def no_clock(record):
    return {**record, 'seconds': 0, 'starts': [],
            'epochs': [{**e, 'seconds': 0, 'memory_gb': 0} for e in record['epochs']],
            # somebody may commit in the meantime
            'test': {**record['test'], 'seconds': 0, 'tasks_per_second': 0, 'commit': ''}}


@pytest.mark.parametrize('path', committed, ids=lambda p: p.stem)
def test_committed_records_hold_to_the_schema_and_to_their_table(path):
    record = json.loads(path.read_text())
    jsonschema.validate(record, record_schema)
    assert path.name == f"{record['row']}-seed{record['seed']}.json" and path.parent.name == record['table']
    # a setting that came later has its default
    assert (Config(**record['config'])
            == dataclasses.replace(tables[record['table']][record['row']].config, seed=record['seed']))
    assert not any('+' in start['commit'] for start in record['starts']), 'made from files that were not committed'
    assert record['test'] or record['diverged']
    assert len(record['epochs']) == record['config']['epochs'] or record['diverged']
    weights = path.with_suffix('.safetensors')
    if record['test']:
        # Meta-SGD has a rate for each weight
        assert weights.stat().st_size < (1_000_000 if record['method'] == 'meta-sgd' else 500_000)
        assert load_meta(weights)[1]['config'] == record['config']


def test_the_schema_refuses_what_is_no_record(table, tmp_path):
    assert reproduce('short', 'a', '0', device='cpu', out=tmp_path / 'runs', records=tmp_path / 'records') == 0
    record = read_records(tmp_path / 'records', 'short')['a'][0]
    jsonschema.validate(record, record_schema)
    for spoil in (lambda r: r.pop('seed'),
                  lambda r: r['test']['norms']['targets'].pop('ensemble'),
                  lambda r: r.update(extra=1),
                  lambda r: r['epochs'][0].pop('step_sizes'),
                  lambda r: r.pop('table'),
                  lambda r: r.pop('row'),
                  lambda r: r['test'].pop('tasks_per_second'),
                  lambda r: r['test'].pop('models'),
                  lambda r: r['starts'][0].pop('seeds_at_once'),
                  lambda r: r.update(planned=4),
                  lambda r: r.update(steps={'loss': [], 'accuracy': [], 'gradient_norm': [], 'epoch': []})):
        spoilt = json.loads(json.dumps(record))
        spoil(spoilt)
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate(spoilt, record_schema)


def test_a_table_in_many_small_pieces_is_the_same_table(table, tmp_path, capsys, monkeypatch):
    def go(name, **more):
        return reproduce('short', seeds='0 1', device='cpu', out=tmp_path / name, records=tmp_path / name / 'records',
                         **more)
    assert go('whole') == 0
    begun = re.findall(r'^short, (\w), seed (\d)', capsys.readouterr().out, re.M)
    assert begun == [('a', '0'), ('b', '0'), ('a', '1'), ('b', '1')] # a CPU has a whole table early
    codes = [go('pieces', minutes=1e-6)]
    assert codes == [3] and not read_records(tmp_path / 'pieces/records', 'short') # nothing is shown that wasn't run
    taken = module.train_and_test
    monkeypatch.setattr(module, 'train_and_test',
                        lambda *a, **more: taken(*a, **{**more, 'minutes': 1e-6})) # stopped after every outer step
    while codes[-1] == 3: codes.append(go('pieces', minutes=60))
    assert codes[-1] == 0 and len(codes) > 4 * short.iterations
    whole, pieces = (read_records(tmp_path / name / 'records', 'short') for name in ('whole', 'pieces'))
    assert [*whole] == [*pieces] == ['a', 'b'] and all(len(r) == 2 for r in pieces.values())
    for row in whole:
        for a, b in zip(whole[row], pieces[row]): assert no_clock(a) == no_clock(b)
    assert '50.00 ± 1.00' in results_table('short', whole) and 'the same command goes on' in capsys.readouterr().out


def test_best_weights_are_those_that_were_tested(table, tmp_path):
    reproduce('short', 'a', '0', device='cpu', out=tmp_path / 'runs', records=tmp_path)
    record = read_records(tmp_path, 'short')['a'][0]
    best = load_file(tmp_path / 'runs/short/a-seed0' / f"{record['test']['models'][0]}.safetensors")
    kept = load_file(tmp_path / 'short/a-seed0.safetensors')
    assert kept and all(best[f'average/{k}' if f'average/{k}' in best else k].equal(t) for k, t in kept.items())


def test_seeds_at_once_make_a_record_each_and_one_that_diverges_spares_the_others(table, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'at_once', lambda seeds, device: [seeds])
    taken = module.train_and_test

    def explosive(configs, *rest, **more): # seed 1 has no chance
        return taken([dataclasses.replace(c, outer_lr=1e20) if c.seed == 1 else c for c in configs]
                     if len(configs) == 1 else configs, *rest, **more)

    def together(configs, *rest, **more):
        if len(configs) > 1 and any(c.seed == 1 for c in configs): raise module.Diverged('seed 1 will')
        return explosive(configs, *rest, **more)
    monkeypatch.setattr(module, 'train_and_test', together)
    assert reproduce('short', seeds='0,1', device='cpu', out=tmp_path / 'runs', records=tmp_path) == 4
    found = read_records(tmp_path, 'short')
    assert [[r['diverged'] is None for r in rows] for rows in found.values()] == [[True, False]]*2
    assert 'iteration' in found['a'][1]['diverged'] and found['a'][1]['test'] is None
    for r in found['a']: jsonschema.validate(r, record_schema)
    assert over_seeds(found['a'])[2] == 1 and '2, 1 diverged' in results_table('short', found)


def test_three_seeds_at_once(table, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'at_once', lambda seeds, device: [seeds])
    assert reproduce('short', 'a', '0 1 2', device='cpu', out=tmp_path / 'runs', records=tmp_path) == 0
    assert [r['starts'][0]['seeds_at_once'] for r in read_records(tmp_path, 'short')['a']] == [3]*3


def test_a_record_of_other_settings_is_not_overwritten(table, tmp_path, monkeypatch):
    assert reproduce('short', 'a', '0', device='cpu', out=tmp_path / 'runs', records=tmp_path) == 0
    monkeypatch.setitem(tables, 'short', {'a': Row(dataclasses.replace(short, n_steps=3))})
    with pytest.raises(ValueError, match='other settings'):
        reproduce('short', 'a', '0', device='cpu', out=tmp_path / 'runs', records=tmp_path)
    (tmp_path / 'short/a-seed0.json').write_text('{')
    with pytest.raises(ValueError, match='is damaged'): read_records(tmp_path, 'short')


def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, named in ((['omniglots'], 'choose from omniglot'),
                         (['omniglot', '--only', '20w1s'], 'its rows are 20w1s-mamlpp'),
                         (['omniglot', '--seeds', '0', '0'], 'different whole numbers'),
                         (['omniglot', '--minutes', '-1'], 'at least 0'),
                         (['omniglot', '--data', 'glyphs'], 'for a trial')):
        assert main(['reproduce', *words]) == 2 and named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert (seed_list(['0', '1,2']) == [0, 1, 2]
            and list(chosen_rows('omniglot', ['20w1s-maml', '5w5s-*']))[:2] == ['20w1s-maml', '5w5s-mamlpp'])


@pytest.mark.parametrize('filters', [4, pytest.param(None, marks=pytest.mark.weekly)], ids=['narrow', 'full width'])
@pytest.mark.parametrize('name, row', [
    ('omniglot', '5w1s-maml'),
    ('stability', '20w1s-maml-strided'),
    ('extensions', '20w1s-mamlpp-average'),
    ('mini-imagenet', '5w1s-maml-unclamped'),
    ('omniglot-small', '5w1s-meta-sgd'),
    ('extensions-small', '5w1s-anil'),
    ('five-shot-small', '5w5s-mamlpp'),
    ('claims-small', '5w1s-maml-betas-only'),
    ('mini-imagenet-small', '5w1s-mamlpp'),
    ('photos', '5w1s-mamlpp'),
    ('omniglot-20w1s-tenth', '20w1s-maml+msl'),
    ('omniglot-20w1s-best', '20w1s-mamlpp-best'),
    ('omniglot-20w5s-hundredth', '20w5s-mamlpp-best'),
    ('mini-imagenet-tenth', '5w1s-mamlpp-best'),
    ('stability-tenth', '20w1s-maml-strided')])
def test_a_row_of_each_table_begins_on_this_machine(name, row, filters, tmp_path, capsys, monkeypatch):
    "One seed, two outer steps on glyphs; `mamlpp reproduce TABLE --trial` does it for all rows on the real data."
    if filters:
        for page in ('evaluation', 'training'):
            monkeypatch.setattr(f'mamlpp_nb.{page}.gathered_tasks', 8) # instead of 100
        full = tables[name][row]
        monkeypatch.setitem(tables, name,
                            {row: full._replace(config=dataclasses.replace(full.config, filters=filters))})
    assert main(['reproduce', name, '--only', row, '--seeds', '0', '--trial', '--data', 'glyphs', '--device', 'cpu',
                 '--out', str(tmp_path), '--json']) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said['status'] == 'complete' and set(said['rows']) == {row}
    # a new table wants a row here
    assert set(tables) == {'omniglot', 'stability', 'extensions', 'mini-imagenet', 'omniglot-small',
                           'extensions-small', 'five-shot-small', 'claims-small', 'mini-imagenet-small', 'photos',
                           *shorter}


@pytest.mark.parametrize('page', ['20_omniglot.ipynb', 'index.ipynb'])
def test_the_pages_show_what_the_records_say(page):
    records = read_records(results, 'omniglot-small')
    shown = (here.parent / 'nbs' / page).read_text()
    for row, found in records.items():
        for who in ('single', 'ensemble'):
            mean, spread, n = over_seeds(found, 'targets', who)
            assert n == 3 and re.search(rf'{mean:.2f} ± {spread:.2f}', shown), f'{page} does not show {row}, {who}'


@pytest.mark.parametrize('name, rows', [
    ('omniglot-20w1s-tenth', ['20w1s-mamlpp', '20w1s-maml', '20w1s-maml+lslr', '20w1s-maml+bn', '20w1s-maml+msl',
                              '20w1s-meta-sgd']),
    ('omniglot-20w1s-best', ['20w1s-mamlpp-best', '20w5s-mamlpp-best']),
    ('omniglot-20w5s-hundredth', ['20w5s-mamlpp-best']),
    ('mini-imagenet-tenth', ['5w1s-mamlpp', '5w1s-maml', '5w1s-mamlpp-shared-head', '5w1s-mamlpp-best'])])
def test_a_shorter_run_is_the_published_one_but_for_its_length(name, rows):
    assert list(tables[name]) == rows
    times = 100 if name.endswith('hundredth') else 10
    allowed = ({'epochs', 'iterations', 'multi_step_epochs', 'validation_tasks'}
               | ({'shared_head', 'average', 'n_target'} if name != 'omniglot-20w1s-tenth' else set()))
    for row, found in tables[name].items():
        whole = tables[name.rpartition('-')[0].removesuffix('-20w1s').removesuffix('-20w5s')][
            row.removesuffix('-best').removesuffix('-shared-head')]
        a, b = dataclasses.asdict(found.config), dataclasses.asdict(whole.config)
        assert ({k for k in a if a[k] != b[k]} <= allowed
                and times * a['epochs'] * a['iterations'] == b['epochs'] * b['iterations'])
        assert found.published == (
            whole.published if row in ('5w1s-mamlpp', '5w1s-maml') or name == 'omniglot-20w1s-tenth' else ())


@pytest.mark.parametrize('page, table, tasks', [('20_omniglot', 'omniglot', ('20w1s', '20w5s')),
                                                ('21_mini_imagenet', 'mini-imagenet', ('5w1s', '5w5s'))])
def test_a_chapter_prints_the_published_table_whole(page, table, tasks):
    "Every row, literature too, with what the records say now"
    cells = json.loads((here.parent / f'nbs/{page}.ipynb').read_text())['cells']
    shown = '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', ()))
    kept = {name: read_records(results, name) for name in tables
            if name == table or name in shorter and name.startswith(table)}
    known = {**published['rows'][table], **published['others'][table]}
    for task in tasks:
        made = published_table(table, task, kept)
        assert made in shown
        for row in known:
            assert (not row.startswith(task)
                    or (f"| {row.partition('-')[2]} | {known[row]['source']} "
                        f"| {known[row]['accuracy']:.2f}") in made)
    assert len(known) == sum(row.partition('-')[0] in tasks for row in known)


def test_what_ran_stands_beside_what_is_published():
    def made(row, seed, failed=None):
        config = dataclasses.asdict(dataclasses.replace(tables['omniglot-20w1s-tenth'][row].config, seed=seed))
        scored = {'targets': {'single': {'accuracy': [0., .9 + .02 * seed]}, 'ensemble': {'accuracy': [0., .95]}}}
        return {'config': config, 'diverged': failed, 'test': None if failed else {'norms': scored}}
    kept = {'omniglot': {},
            'omniglot-20w1s-tenth': {'20w1s-maml': [made('20w1s-maml', 0), made('20w1s-maml', 1)],
                                     '20w1s-maml+bn': [made('20w1s-maml+bn', 0, 'why')]},
            'omniglot-20w1s-best': {'20w1s-mamlpp-best': [made('20w1s-mamlpp', 0)]}}
    lines = {line.split(' | ')[0][2:]: line for line in published_table('omniglot', '20w1s', kept).splitlines()}
    assert lines['maml'].endswith('| 91.27 ± 1.07 | 91.00 ± 1.41 | 95.00 ± 0.00 | 5,000 | 64 filters, 8 tasks | 2 |')
    assert lines['maml+bn'].endswith('| 95.35 ± 0.23 | - | - | 5,000 | 64 filters, 8 tasks | 1, 1 diverged |')
    assert (lines['mamlpp-best'] == '| mamlpp-best |  |  | 90.00 | 95.00 | 5,000 | 64 filters, 8 tasks | 1 |'
            and list(lines)[-1] == 'mamlpp-best')
    assert lines['Siamese nets'].endswith('| koch-2015 | 88.20 |  |  |  |  |  |')
    accuracies = [float(line.split(' | ')[2].split(' ±')[0]) for name, line in list(lines.items())[2:-1]]
    assert accuracies == sorted(accuracies)
    # both lengths: a line each
    both = published_table('omniglot', '20w1s', {**kept, 'omniglot': {'20w1s-maml': [made('20w1s-maml', 0)]}})
    assert sum(line.startswith('| maml |') for line in both.splitlines()) == 2
    assert '20w5s' not in both and 'mamlpp-best' not in published_table('omniglot', '20w5s', kept)


def test_curves_over_seconds_are_curves_over_arithmetic():
    small = {row: found for row, found in read_records(results, 'omniglot-small').items() if row == '5w1s-maml'}
    config = Config(**small['5w1s-maml'][0]['config'])
    ends = {}
    for pace in (0., 2e9):
        axes = Figure().subplots(1, 2)
        plot_curves(small, axes, pace)
        ends[axes[1].get_xlabel()] = axes[1].lines[0].get_xdata()[-1]
    assert ends == pytest.approx({'trillion operations': run_operations(config) / 1e12,
                                  'seconds at 2 billion operations per second': run_operations(config) / 2e9})


def test_curves_have_the_colours_of_their_methods_and_rows_of_one_method_a_style_each():
    ran = read_records(results, 'mini-imagenet-small')
    axes = Figure().subplots(1, 2)
    plot_curves({row: ran[row] for row in ('5w1s-mamlpp', '5w1s-maml', '5w1s-mamlpp-rate-0.1')}, axes)
    for ax in axes:
        assert [line.get_color() for line in ax.lines] == [method_colors[m] for m in ('mamlpp', 'maml', 'mamlpp')]
        assert [line.get_linestyle() for line in ax.lines] == ['-', '-', '--']


def test_in_the_background_everything_else_goes_first(table, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(module, 'lowest_priority', lambda: asked.append('yes') or 'in the background: so it is')
    where = {'device': 'cpu', 'out': tmp_path / 'runs', 'records': tmp_path}
    assert reproduce('short', 'a', '0', minutes=1e-6, **where) == 3 and not asked
    assert reproduce('short', 'a', '0', minutes=1e-6, background=True, **where) == 3 and asked == ['yes']
    assert 'in the background: so it is' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no row'): reproduce('short', 'c', '0', background=True, **where)
    assert asked == ['yes'] # what is refused changes nothing


paired = json.loads((results.parent / 'paired.json').read_text())['tables']


@pytest.mark.parametrize('name', [f'{table}/{row}' for table, found in paired.items() for row in found])
def test_what_is_right_task_by_task_is_in_the_mean_what_the_record_says(name):
    "Of every seed that has been run"
    table, row = name.split('/')
    found = read_records(results, table)[row]
    assert sorted(paired[table][row]) == [str(r['seed']) for r in found]
    for r in found:
        right = paired[table][row][str(r['seed'])]['right']
        targets = r['config']['n_way']*r['config']['test_targets']
        known = r['test']['norms']['targets']['single']['accuracy'][-1]
        assert len(right) == r['test']['n_tasks'] and max(right) <= targets
        assert sum(right)/len(right)/targets == pytest.approx(known, abs=1e-3) # a GPU rounds otherwise


def test_published_numbers_have_one_home():
    "With their sources, in a file that ships; no page that reads them has them a second time in its sources"
    root = here.parent
    assert 'mamlpp_nb/*.json' in (root / 'MANIFEST.in').read_text() and "'*.json'" in (root / 'setup.py').read_text()
    numbers = {row: n for kind in ('rows', 'others') for table in published[kind].values() for row, n in table.items()}
    assert all(n['source'] in published['sources'] for n in numbers.values())
    typed = '|'.join(sorted({re.escape(f"{n['accuracy']:.2f}") for n in numbers.values()}))
    for page in ('19_reproduce', '20_omniglot', '21_mini_imagenet', '23_beyond'):
        cells = json.loads((root / f'nbs/{page}.ipynb').read_text())['cells']
        assert not re.findall(rf'\b({typed})\b', '\n'.join(''.join(c['source']) for c in cells)), page


first_losses = json.loads((here.parent / 'nbs/results/first_losses.json').read_text())['rows']


@pytest.mark.parametrize('name', first_losses)
def test_runs_begin_as_they_always_did(real, name):
    "The rows' first outer steps, with real characters: what earlier versions of the loops computed"
    table, row = name.split('/')
    # rounding alone moves the third loss by 1e-3
    config = dataclasses.replace(tables[table][row].config, seed=0, precision='float64')
    setup = set_up(config, real, compiled=False)
    steps = outer_steps(config, [(setup, first_state(config, setup))])
    found = steps.run(0, 3, config.outer_lr, **epoch_parts(config, 0))[:, 0, 0].tolist()
    assert found == pytest.approx(first_losses[name], rel=1e-10)
