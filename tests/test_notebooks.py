"The book as a whole: what a reader on the web sees, and that numbers come from records."
import json
import re
from pathlib import Path

import pytest

import mamlpp_nb

root = Path(__file__).parent.parent
notebooks = sorted(root.glob('nbs/*.ipynb'))
chapters = [p for p in notebooks if p.stem != 'index']


def cells(path, kind): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_outputs_are_there_in_order_and_clean(path):
    code = cells(path, 'code')
    outputs = [o for c in code for o in c['outputs']]
    assert outputs and not any(o['output_type'] == 'error' for o in outputs)
    said = json.dumps(outputs)
    assert not re.search(r'Warning|Traceback|/home/|/root/|/tmp/|/work/', said)
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_a_chapter_asks_a_question_and_hands_something_on(path):
    text = [''.join(c['source']) for c in cells(path, 'markdown')]
    assert re.search(r'^> .*\?$', text[0], re.M) and '**You get:**' in text[1]
    module = re.search(r'default_exp (\w+)', ''.join(''.join(c['source']) for c in cells(path, 'code')))[1]
    assert (root / 'mamlpp_nb' / f'{module}.py').exists()


def test_no_public_name_is_exported_twice():
    owners = {}
    for path in (root / 'mamlpp_nb').glob('[!_]*.py'):
        listed = re.search(r'__all__ = \[(.*?)\]', path.read_text(), re.S)
        for name in re.findall(r"'(\w+)'", listed[1]): owners.setdefault(name, []).append(path.stem)
    assert owners and not {n: o for n, o in owners.items() if len(o) > 1}


def test_every_record_says_where_it_comes_from():
    kept = {p.stem: json.loads(p.read_text()) for p in (root / 'nbs/results').glob('*.json')}
    assert {'quickstart-omniglot', 'bench-cpu', 'chapters'} <= set(kept)
    for name, record in kept.items():
        for r in record.values() if name == 'chapters' else [record]:
            assert re.fullmatch(r'[0-9a-f]{12}', r['commit']), f'{name}: made from uncommitted code' # no '+'
            assert r['device'] and r['versions']['torch']
    assert set(kept['chapters']) == {p.stem for p in chapters}


def test_the_readme_says_what_the_records_say():
    readme, r = (root / 'README.md').read_text(), json.loads((root / 'nbs/results/quickstart-omniglot.json').read_text())
    assert f"{100 * r['accuracy'][-1]:.1f} ± {100 * r['ci95'][-1]:.1f} | `{r['commit']}`" in readme
    for p in chapters: assert f'](nbs/{p.name})' in readme


def test_one_version_everywhere():
    assert f'version = {mamlpp_nb.__version__}\n' in (root / 'settings.ini').read_text()
    assert f'version: {mamlpp_nb.__version__}\n' in (root / 'CITATION.cff').read_text()
