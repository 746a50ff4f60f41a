"Three floors: the ground, the book in reading order, the tools. Imports only go down."
import ast
import json
import re
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pages = sorted((root / 'nbs').glob('*.ipynb'))


def cells(page):
    return [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code']


def module_of(page):
    found = [re.search(r'^#\| ?default_exp (\w+)', s, re.M) for s in cells(page)]
    return next((m[1] for m in found if m), None)


def floor(page):
    "Ground 0, book 1, tools 2"
    return {'g': 0, 'a': 2}.get(page.name[0], 1)


places = {module_of(p): (floor(p), i) for i, p in enumerate(pages) if module_of(p)}


def package_imports(source):
    "Modules of the package that a cell imports, magics left out"
    code = '\n'.join(line for line in source.splitlines() if not line.lstrip().startswith(('%', '!')))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('mamlpp_nb.'):
            yield node.module.split('.')[1]
        if isinstance(node, ast.Import):
            yield from (a.name.split('.')[1] for a in node.names if a.name.startswith('mamlpp_nb.'))


@pytest.mark.parametrize('page', [p for p in pages if p.stem != 'index'], ids=lambda p: p.stem)
def test_a_page_imports_from_below(page):
    "Also what is not exported: a reader of a chapter needs no later one, and no tool"
    own = floor(page), pages.index(page)
    for source in cells(page):
        for module in package_imports(source):
            there = places[module]
            if floor(page) == 2: continue # a tool may use what it likes
            assert (there[0] < own[0] or there[0] == own[0] == 0
                    or there[0] == own[0] and there[1] <= own[1]), f'{page.stem} imports {module}'


def test_every_module_has_a_page():
    modules = {p.stem for p in (root / 'mamlpp_nb').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(places)


def test_the_sidebar_has_every_page_in_order():
    listed = re.findall(r'- (\w+\.ipynb)', (root / 'nbs/sidebar.yml').read_text(encoding='utf-8'))
    assert [n for n in listed if n != 'index.ipynb'] == [p.name for p in pages if p.stem != 'index']
