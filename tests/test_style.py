"The house style, as far as a program can see it: lines of at most 120 columns, in modules, pages, tests and tools."
import json
import re
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
modules = sorted(p for p in (root / 'mamlpp_nb').glob('*.py') if p.stem != '_modidx') # an index, which nbdev writes
tools = sorted(p for folder in ('tests', 'benchmarks', '.ci') for p in (root / folder).glob('*.py'))
pages = sorted((root / 'nbs').glob('*.ipynb'))


def without_names(text):
    "A module without nbdev's own list of names."
    return re.sub(r'^__all__ = \[.*?\]$', lambda names: '\n' * names[0].count('\n'), text, flags=re.M | re.S)


def code_of(path):
    "Pieces of code by place: a file is one; a page has its cells, without directives such as captions."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return {path.name: without_names(text)}
    cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    return {f'{path.name}, cell {c["id"]}': re.sub(r'^#\|.*', '', ''.join(c['source']), flags=re.M) for c in cells}


def long_lines(path):
    lines = [(place, i, line) for place, code in code_of(path).items() for i, line in enumerate(code.split('\n'), 1)]
    return [f'{place}, line {i}: {len(line)} columns' for place, i, line in lines if len(line) > 120]


@pytest.mark.parametrize('path', [*modules, *pages, *tools], ids=lambda p: p.name)
def test_a_line_has_at_most_120_columns(path): assert not long_lines(path)


def test_a_private_helper_means_one_thing():
    "No function of one module has the name of another module's"
    owners = {}
    for path in modules:
        for name in re.findall(r'^def (_\w+)\(', re.sub(r'@patch\ndef', '', path.read_text()), flags=re.M):
            owners.setdefault(name, []).append(path.stem)
    assert not {name: stems for name, stems in owners.items() if len(stems) > 1}
