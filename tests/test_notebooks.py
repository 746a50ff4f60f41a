"The book as a whole: what a reader on the web sees, and that numbers come from records."
import dataclasses
import json
import re
from pathlib import Path

import jsonschema
import pytest

import mamlpp_nb
from mamlpp_nb.diagnostics import score_of, steps_done
from mamlpp_nb.quickstart import book_runs, quick_steps, run_settings, ways_tested
from mamlpp_nb.config import Config, configure
from mamlpp_nb.runs import record_schema

root = Path(__file__).parent.parent
notebooks = sorted(root.glob('nbs/*.ipynb'))
chapters = [p for p in notebooks if p.stem != 'index']
settings_known = {f.name for f in dataclasses.fields(Config)}


def cells(path, kind): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_outputs_are_there_in_order_and_clean(path):
    code = cells(path, 'code')
    outputs = [o for c in code for o in c['outputs']]
    assert outputs and not any(o['output_type'] == 'error' for o in outputs)
    said = json.dumps(outputs)
    assert not re.search(r'Warning|Traceback|/home/|/root/|/tmp/|/work/', said)
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize('name', ['09_adjoint', '10_passes', '11_speed', '13_evaluation', '15_runs', '16_training'])
def test_a_cell_of_the_machinery_is_one_thought(name):
    for cell in cells(root / f'nbs/{name}.ipynb', 'code'):
        lines = [line for line in ''.join(cell['source']).splitlines() if line.strip()]
        assert len(lines) <= 25, f'{name}, {lines[:2]}: {len(lines)} lines'


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_a_chapter_asks_a_question_and_hands_something_on(path):
    text = [''.join(c['source']) for c in cells(path, 'markdown')]
    assert re.search(r'^> .*\?$', text[0], re.M) and '**You get:**' in text[1]
    module = re.search(r'default_exp (\w+)', ''.join(''.join(c['source']) for c in cells(path, 'code')))
    if re.search('records under `nbs/results/tables`|a pattern for', text[1]):
        assert not module # it reads or uses what the others made
    else: assert (root / 'mamlpp_nb' / f'{module[1]}.py').exists()


def test_no_public_name_is_exported_twice():
    owners = {}
    for path in (root / 'mamlpp_nb').glob('[!_]*.py'):
        listed = re.search(r'__all__ = \[(.*?)\]', path.read_text(), re.S)
        for name in re.findall(r"'(\w+)'", listed[1]): owners.setdefault(name, []).append(path.stem)
    assert owners and not {n: o for n, o in owners.items() if len(o) > 1}


def test_every_record_says_where_it_comes_from():
    results = root / 'nbs/results'
    kept = {p.relative_to(results).with_suffix('').as_posix(): json.loads(p.read_text())
            for p in results.glob('**/*.json')}
    assert {'strangers/quickstart-omniglot-mamlpp-0-avx2', 'bench-cpu', 'chapters'} <= set(kept)
    for name, record in kept.items():
        for r in record.values() if name == 'chapters' else record.get('starts', [record]):
            assert re.fullmatch(r'[0-9a-f]{12}', r['commit']), f'{name}: made from uncommitted code' # no '+'
            assert r['device'] and r['versions']['torch']
    assert set(kept['chapters']) == {p.stem for p in chapters}


def test_every_record_of_a_run_holds_to_the_one_schema():
    "Those of the tables, of the short runs behind the chapters, and of newcomers' quickstarts"
    results, valid, places = root / 'nbs/results', jsonschema.Draft202012Validator(record_schema), set()
    for path in results.glob('**/*.json'):
        record = json.loads(path.read_text())
        if not {'config', 'starts', 'epochs', 'loss'} & set(record): continue # of something else, such as a benchmark
        wrong = next(valid.iter_errors(record), None)
        assert not wrong, f'{path}: {wrong.message}'
        assert (record['config'].items() >= {'method': record['method'], 'seed': record['seed']}.items()
                and set(record['config']) <= settings_known)
        assert (steps_done(record)
                and (not record['test'] or len(score_of(record)['accuracy']) == record['test']['n_steps'] + 1))
        places.add(path.relative_to(results).parts[0])
    assert places >= {*book_runs, 'tables', 'strangers'}


def strangers(what):
    return [json.loads(p.read_text()) for p in sorted((root / 'nbs/results/strangers').glob(f'{what}-*.json'))]


def seconds(r): return '-' if r['wall_seconds'] is None else f"{r['wall_seconds']:.0f}" # of one that ran beside others


def last_accuracy(r): return score_of(r)['accuracy'][-1]


def percent(r): return f'{100 * last_accuracy(r):.1f}'


def of(runs, data, method): return [r for r in runs if (r['config']['data'], r['config']['method']) == (data, method)]


def test_the_readme_says_what_the_records_say():
    readme = (root / 'README.md').read_text()
    runs = strangers('quickstart')
    assert {r['config']['seed'] for r in of(runs, 'omniglot', 'mamlpp')} == {0, 1, 2}
    for r in runs:
        end = f"{percent(r)} ± {100 * score_of(r)['ci95'][-1]:.1f} | `{r['starts'][0]['commit']}`"
        assert f"| {r['seed']} | {steps_done(r)} | {seconds(r)} | {r['processor']} |" in readme and end in readme
    for data in {r['config']['data'] for r in runs}:
        ours = of(runs, data, 'mamlpp')
        kind = [r for r in ours if r['processor'] == ours[0]['processor']]
        each = ', '.join(percent(r) for r in kind)
        mean = sum(100 * last_accuracy(r) for r in kind) / len(kind)
        assert (f'{mean:.1f} % on never-seen classes of {data} '
                f'after {quick_steps} outer steps (seeds 0, 1, 2: {each})') in readme
        assert f"slow: {kind[0]['processor']} |" in readme
    slowest = max(r['wall_seconds'] for r in runs if r['config']['method'] == 'mamlpp')
    assert f'| `mamlpp quickstart` | {quick_steps:,} | {slowest / 60:.1f} minutes |' in readme
    for r in strangers('held-bench'):
        for row in r['rows']:
            assert (f"| {row['workload']} | {row['way']} | {row['seconds']:.2f} "
                    f"| {row['spread']:.2f} | {row['ratio']:.2f} |") in readme
    for command, what in (('bash tests/all.sh', 'tests'), ("mamlpp bench --ways 'naive,written out,fast'", 'bench')):
        for r in strangers(what): assert f"| `{command}` |  | {r['wall_seconds'] / 60:.0f} minutes |" in readme
    for p in chapters: assert f'](nbs/{p.name})' in readme


def made_with(record, wanted):
    "Is everything that a record says of its settings as wanted? One that came later has its default."
    settings = dataclasses.asdict(wanted)
    return len(record['config']) >= 18 and {**settings, **record['config']} == settings


def test_the_records_are_of_what_the_command_does_now_and_keep_the_promise():
    runs = strangers('quickstart')
    for r in runs:
        wanted = configure('quickstart', **{name: r['config'][name] for name in ('data', 'method', 'seed')})
        assert (made_with(r, wanted) and steps_done(r) == r['planned'] == quick_steps
                and set(r['test']['norms']) == {'targets', 'support'})
        assert r['cold_cache'] and (r['config']['method'] != 'mamlpp' or r['wall_seconds'] <= 180), (
            'the front page promises three minutes, cold')
    ours, theirs = (of(runs, 'omniglot', m) for m in ('mamlpp', 'maml'))
    accuracy = [last_accuracy(r) for r in ours]
    assert min(accuracy) >= .88 and sum(accuracy) / len(accuracy) >= .9
    by_seed = {r['seed']: last_accuracy(r) for r in ours}
    assert all(by_seed[r['seed']] > last_accuracy(r) for r in theirs) # MAML beside it, seed by seed
    for r in strangers('bench') + strangers('held-bench'):
        for row in r['rows']:
            assert row['spread'] <= row['seconds'] / 4, f"{row['workload']}, {row['way']}: measure it again"
    for r in strangers('tests'): assert r['wall_seconds'] <= 15 * 60


@pytest.mark.parametrize('name', ['04_multi_step_loss', '07_mamlpp'])
def test_a_cure_is_held_against_the_blog_post_and_published_numbers_are_read(name):
    text = '\n'.join(''.join(c['source']) for c in cells(root / f'nbs/{name}.ipynb', 'markdown'))
    assert (re.search(r'^> ".+"$', text, re.M)
            and re.search(r'\*\*Verdict: (holds|holds in part|doesn\'t hold here)\.\*\*', text))
    known = json.loads((root / 'mamlpp_nb/published.json').read_text())
    accuracies = [number['accuracy'] for kind in ('rows', 'others')
                  for table in known[kind].values() for number in table.values()]
    assert accuracies and not [a for a in accuracies if f'{a:.2f}' in text]


def test_one_version_everywhere():
    assert f'version = {mamlpp_nb.__version__}\n' in (root / 'settings.ini').read_text()
    assert f'version: {mamlpp_nb.__version__}\n' in (root / 'CITATION.cff').read_text()


@pytest.mark.parametrize('kind', book_runs)
def test_records_of_the_chapters_have_the_settings_that_make_them_again(kind):
    methods, _, iterations = book_runs[kind]
    for path in (root / 'nbs/results' / kind).glob('*.json'):
        record, (method, seed) = json.loads(path.read_text()), path.stem.rsplit('-', 1)
        assert method in methods and {len(each) for each in record['steps'].values()} == {iterations}
        assert (made_with(record, run_settings(kind, method, int(seed)))
                and tuple(record['test']['norms']) == ways_tested(kind, method))
    seeds = {p.stem.rsplit('-', 1)[0]: len(list(p.parent.glob(p.stem.rsplit('-', 1)[0] + '-[0-9].json')))
             for p in (root / 'nbs/results' / kind).glob('*.json')}
    assert set(seeds) == set(methods) and set(seeds.values()) == {3}
