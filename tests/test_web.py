"""The book on the web: links and pictures resolve, nbdev and nbconvert make pages of every notebook,
and the workflow pins what makes them."""
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pages = sorted(root.glob('nbs/*.ipynb'))
readme = root / 'README.md'
not_run_yet = {'nbs/results/bench-cuda.json'} # records that a page says how to make


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def outputs(path): return [o for c in cells(path) if c['cell_type'] == 'code' for o in c['outputs']]


def texts(path):
    "The Markdown of a page, that of its outputs too."
    if path.suffix == '.md': return [path.read_text(encoding='utf-8')]
    said = [''.join(o['data']['text/markdown']) for o in outputs(path) if 'text/markdown' in o.get('data', {})]
    return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown'] + said


def without_code(text): return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)


def links(text):
    "Where Markdown and HTML point to: pages, pictures, anchors."
    plain = without_code(text)
    return re.findall(r'\]\(([^()\s]+)[^()]*\)', plain) + re.findall(r'(?:src|href)="([^"]+)"', plain)


def places(text):
    "Files and folders of records that a sentence names."
    return [place.rstrip('/.') for place in re.findall(r'\b(?:nbs/)?results/[\w./+-]*', text)]


def anchors(path):
    "What a link into a page may name: its headings as GitHub, Quarto and JupyterLab spell them."
    heads = [h for text in texts(path) for h in re.findall(r'^#+ +(.+)$', without_code(text), re.M)]
    return {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in heads} | {h.replace(' ', '-') for h in heads}


def broken(path, text):
    "Links of a page that lead nowhere."
    found = []
    for link in links(text):
        if re.match(r'https?://|mailto:|data:', link): continue
        there, _, anchor = link.partition('#')
        target = path.parent / re.sub(r'\.html$', '.ipynb', there) if there else path
        if not target.exists() or root not in target.resolve().parents: found.append(link)
        elif anchor and anchor not in anchors(target): found.append(link)
    return found


@pytest.mark.parametrize('path', [readme, *pages], ids=lambda p: p.stem)
def test_every_link_picture_and_record_is_there(path):
    for text in texts(path):
        assert not broken(path, text)
        for place in places(text):
            place = place if place.startswith('nbs/') else f'nbs/{place}'
            assert (root / place).exists() != (place in not_run_yet), place


@pytest.mark.parametrize('path', pages, ids=lambda p: p.stem)
def test_a_page_links_to_pages_of_its_own_folder(path):
    "What lies elsewhere isn't on the web"
    assert not [link for text in texts(path) for link in links(text) if link.startswith(('../', '/', 'nbs/'))]


def test_a_broken_link_is_found():
    text = ('See [one](00_tasks.ipynb), ![two](images/none.png), [three](#nowhere), [four](20_omniglot.html#nowhere), '
            '`[five](x)` and <img src="six.png">.')
    assert broken(root / 'nbs/index.ipynb', text) == [
        'images/none.png', '#nowhere', '20_omniglot.html#nowhere', 'six.png']
    assert not broken(root / 'nbs/index.ipynb',
                      '[a](#two-commands) [b](20_omniglot.html#reduced-size) [c](https://example.org/x)')
    assert places('records in nbs/results/tables, `results/bench-cpu.json`.') == [
        'nbs/results/tables', 'results/bench-cpu.json']


def test_readme_links_where_the_front_page_of_the_site_does():
    here = {link for text in texts(root / 'nbs/index.ipynb') for link in links(text) if link.endswith('.ipynb')}
    assert {f'nbs/{link}' for link in here} == {
        link for link in links(readme.read_text(encoding='utf-8')) if link.endswith('.ipynb')}
    assert {p.name for p in pages} - {'index.ipynb'} <= here


@pytest.fixture(scope='module')
def made():
    "Makes a page for the web of a notebook."
    nbconvert = pytest.importorskip('nbconvert', reason='nbconvert is not installed')
    exporter = nbconvert.HTMLExporter()
    return lambda path: exporter.from_filename(str(path))[0]


def equations(path):
    "Displayed equations, as they are written."
    return [e for c in cells(path) if c['cell_type'] == 'markdown'
            for e in re.findall(r'\$\$.+?\$\$', ''.join(c['source']), re.S)]


every_day = {'index', '09_adjoint', '22_learned_rates'} # code, equations, figures, the player; the others once a week


@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem, marks=() if p.stem in every_day else pytest.mark.weekly)
                                  for p in pages])
def test_nbconvert_makes_a_page(path, made):
    page = made(path)
    figures = [''.join(o['data']['image/png']).strip() for o in outputs(path) if 'image/png' in o.get('data', {})]
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(f) for f in shown] == [base64.b64decode(f) for f in figures]
    assert all(base64.b64decode(f).startswith(b'\x89PNG') for f in figures)
    plain = html.unescape(page)
    assert all(e in plain for e in equations(path)) and ('MathJax' in page or not equations(path))
    headings = [h for text in texts(path) for h in re.findall(r'^#+ +([\w ]+)$', without_code(text), re.M)]
    assert headings and all(re.search(rf'<h\d[^>]*>\s*{re.escape(h.strip())}', page) for h in headings)


def test_the_player_is_on_the_page_that_nbconvert_makes(made):
    page = made(root / 'nbs/22_learned_rates.ipynb')
    charts = json.loads(html.unescape(re.search(
        r"""<div class="rates-player" data-charts=(["'])(\[.*?\])\1""", page)[2]))
    script = (root / 'mamlpp_nb/rates_player.js').read_text(encoding='utf-8')
    assert script in page and charts and all({'title', 'seeds'} <= set(chart) for chart in charts)


def test_nbdev_makes_pages_of_all_notebooks(tmp_path):
    "What Quarto is given: `nbdev_proc_nbs` does this, too, but first installs Quarto, which no package registry has"
    pytest.importorskip('nbdev', reason='nbdev is not installed')
    for part in ('nbs', 'mamlpp_nb'):
        shutil.copytree(root / part, tmp_path / part,
                        ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(root / 'settings.ini', tmp_path)
    command = [sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=1)']
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr[-2000:]
    for path in pages:
        made = cells(tmp_path / '_proc' / path.name)
        assert re.search(r'^title: \S', ''.join(made[0]['source']), re.M), path.name
        pictures = [sum('image/png' in o.get('data', {})
                        for c in some if c['cell_type'] == 'code' for o in c['outputs'])
                    for some in (made, cells(path))]
        assert pictures[0] == pictures[1], path.name
        code = '\n'.join(''.join(c['source']) for c in made if c['cell_type'] == 'code')
        defined = re.findall(r'^(?:def|class) \w+', '\n'.join(
            ''.join(c['source']) for c in cells(path) if '#| export' in ''.join(c['source'])), re.M)
        assert all(line in code for line in defined), f'{path.name}: its code is not on the page'
    for name in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml'): assert (tmp_path / '_proc' / name).exists()


def test_the_workflow_of_the_site_pins_what_makes_it():
    text = (root / '.github/workflows/docs.yml').read_text(encoding='utf-8')
    actions = re.findall(r'uses: (\S+)@(\S+)', text)
    assert actions and all(re.fullmatch(r'v\d+\.\d+\.\d+|[0-9a-f]{40}', version) for _, version in actions)
    for name in ('QUARTO', 'NBDEV'):
        assert re.search(rf'^ +{name}: "\d+\.\d+\.\d+"$', text, re.M) and f'${name}' in text
    assert 'latest' not in text
