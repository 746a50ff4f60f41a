"The house style, as far as a program can see it: exported code has 120 columns."
import re
from pathlib import Path

import pytest

package = Path(__file__).parent.parent / 'mamlpp_nb'
modules = sorted(p for p in package.glob('*.py') if p.stem != '_modidx') # an index, which nbdev writes
not_yet = set()


def long_lines(path):
    "Lines of a module over 120 columns, without nbdev's own list of names."
    text = re.sub(r'^__all__ = \[.*?\]$', lambda names: '\n' * names[0].count('\n'), path.read_text(), flags=re.M | re.S)
    return [f'{path.name}:{i}: {len(line)} columns' for i, line in enumerate(text.split('\n'), 1) if len(line) > 120]


@pytest.mark.parametrize('path', modules, ids=lambda p: p.stem)
def test_a_line_has_at_most_120_columns(path):
    if path.stem in not_yet: assert long_lines(path), f'{path.stem} is done: take it out of not_yet'
    else: assert not long_lines(path)


def test_what_is_not_yet_done_exists(): assert not_yet <= {p.stem for p in modules}


def test_a_private_helper_means_one_thing():
    "No function of one module has the name of another module's"
    owners = {}
    for path in modules:
        for name in re.findall(r'^def (_\w+)\(', re.sub(r'@patch\ndef', '', path.read_text()), flags=re.M): owners.setdefault(name, []).append(path.stem)
    assert not {name: stems for name, stems in owners.items() if len(stems) > 1}
