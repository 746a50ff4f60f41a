"""Every number that the front page or a chapter's Summary says comes from an output of the page, or from a record.

A number is written in digits or as a word from two upwards. It is accounted for if it is, in this order,
- part of a name or a definition: one of the patterns in `defined`;
- part of a claim: words of the page that `claims` makes anew, from records, outputs or the package itself;
- of three figures or more, and there as it stands in an output of the page. Smaller ones are everywhere,
so they need a claim.
README is made of cells besides: their Markdown is computed here again, from the records,
and must stand in it to the letter.
"""
import ast
import functools
import importlib.util
import inspect
import json
import os
import re
from pathlib import Path

import pytest

from mamlpp_nb import tasks
from mamlpp_nb.config import configure
from mamlpp_nb.diagnostics import running_mean
from mamlpp_nb.drawing import recorded
from mamlpp_nb.maml import MetaParameters
from mamlpp_nb.reproduce import read_records, tables

root = Path(__file__).parent.parent
pages = sorted(p.stem for p in root.glob('nbs/*.ipynb') if p.stem != 'index')
words = {word: n for n, word in enumerate('two three four five six seven eight nine ten '
                                          'eleven twelve thirteen fourteen fifteen sixteen'.split(), 2)}
words |= {word: 10 * n
          for n, word in enumerate('twenty thirty forty fifty sixty seventy eighty ninety hundred'.split(), 2)}
number = re.compile(r"\d[\d,]*(?:\.\d+)?(?<!,)"
                    rf"|\b(?:{'|'.join(words)}|hundreds|thousands?|millions?|twice|thirds?|half|halves)\b", re.I)

defined = [ # names and definitions, which nothing measures
    r'\d+-way(?: \d+-shot)?|\b95 % interval|\b8 bits', # a kind of task; the field's interval; a byte
    r'\d+x\d+\b', # pixels of a picture
    # networks, machines, versions
    r'\b[A-Z]\w*-\d+(?:-\w+)?\b|AVX2|AVX-512|Python 3\.\d+|float(?:32|64)|\bnbdev 2\.4\b',
    r'arXiv:\d{4}\.\d{5}|abs/\d{4}\.\d{5}|\b(?:19|20)\d\d\b(?=[,;)])', # a paper and its year
    # where something is
    r'\bchapters? \d+(?: (?:to|and) \d+)?|\(\d\)|\b[ag]\d\b|\d\d_\w+\.ipynb|[ag]\d_\w+\.ipynb|readme\d\.png',
    r'\bseeds \d(?:(?:, \d)+| to \d)|--[\w-]+ [\d ]+', # which seeds; arguments of a command
    r'`[^`]*`|\$[^$]*[A-Za-z\\][^$]*\$', # code and formulas
    r'^\d+\. ', # of a list
    r'Two commands|half a split|between two outer steps|Apache-2\.0',
]


def cells(name): return json.loads((root / f'nbs/{name}.ipynb').read_text(encoding='utf-8'))['cells']


@functools.cache
def said(name):
    "All text that the cells of a page have put out."
    found = []
    for o in (o for c in cells(name) if c['cell_type'] == 'code' for o in c['outputs']):
        data = o.get('data', {})
        found.append(''.join(o.get('text') or data.get('text/markdown') or data.get('text/plain') or ''))
    return '\n'.join(found)


def found(name, pattern):
    "The numbers that a pattern finds in a page's outputs, in order."
    numbers = [float(n.replace(',', '')) for m in re.finditer(pattern, said(name)) for n in m.groups()]
    assert numbers, f'{name}: no output has {pattern}'
    return numbers


def in_words(n): return next(word for word, value in words.items() if value == n)


def lines_of(marker):
    "Lines of the front page's cell that has the marker, without empty ones."
    source, = (text for c in cells('index') if c['cell_type'] == 'code' and marker in (text := ''.join(c['source'])))
    return len([line for line in source.splitlines() if line.strip()])


def longest_part():
    "Lines of the longest part of one's own that chapter 17 shows: what stands between two empty lines."
    text = (root / 'nbs/own_parts.py').read_text(encoding='utf-8')
    return max(node.end_lineno - node.lineno + 1 for node in ast.parse(text).body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def first_config(table): return next(iter(tables[table].values())).config


def sorts(): return len(re.findall(r'\.argsort\(\d\)', inspect.getsource(tasks))) # along an axis of the episodes


def outer_steps(config): return f'{config.epochs * config.iterations:,} outer steps'


def of_small(config): return f'{config.filters} filters, {config.n_tasks} tasks per outer step, {outer_steps(config)}'


def small_records():
    return [r for found in read_records(root / 'nbs/results/tables', 'omniglot-small').values() for r in found]


def curvatures(): return found('06_step_sizes', r'(?:conv|head).* mean largest curvature of \d tasks +([\d.]+)')


def learned_rates(): return found('06_step_sizes', r'LSLR .*learned [|] (\d+) [|]')[0]


def weights(): return found('08_networks', r'([\d,]+) weights')


# By page: words that must stand in its Summary (or in README), and what makes them: the same words, or a condition.
claims = {
    '00_tasks': {'two sorts and one gather': lambda: f'{in_words(sorts())} sorts and one gather'},
    '02_maml': {'three dicts':
                    lambda: f'{in_words(len(MetaParameters._fields) - len(MetaParameters._field_defaults))} dicts',
                'to eight digits and more': lambda: max(found('02_maml', r'largest relative error (\S+e-\d+)')) < 1e-8},
    '05_per_step_norm': {'about two points':
                             lambda: 1.5 < found('05_per_step_norm', r'BNWB against MAML: \+([\d.]+)')[0] < 2.5},
    '06_step_sizes': {'hundreds of times larger than in its bias':
                          lambda: 200 < min(curvatures()[:4]) / curvatures()[5] < 1000,
                      'almost three points':
                          lambda: 2.5 < found('06_step_sizes', r'LSLR     against MAML: \+([\d.]+)')[0] < 3,
                      'thirty numbers': lambda: f'{in_words(learned_rates())} numbers'},
    '08_networks': {'has a hundred times the weights': lambda: 100 < weights()[0] / weights()[1] < 200},
    '09_adjoint': {'a third of the naive loop': lambda: max(found('09_adjoint', r'floor (\d+) %')) < 34},
    '21_mini_imagenet': {'600 outer steps': lambda: outer_steps(first_config('mini-imagenet-small'))},
    'a6_drawing': {'five drawings': lambda: f'{in_words(len(recorded) - 1)} drawings'}, # the last is what is asked
    'README': {"50,000 outer steps": lambda: outer_steps(configure('omniglot-20w1s')),
               '20-way 1-shot Omniglot, 5,000 outer steps':
                   lambda: f"20-way 1-shot Omniglot, {outer_steps(first_config('omniglot-20w1s-tenth'))}",
               '32 filters, 4 tasks per outer step, 2,000 outer steps':
                   lambda: of_small(first_config('omniglot-small')),
               'mean over 20 outer steps':
                   lambda: f"mean over {inspect.signature(running_mean).parameters['window'].default} outer steps",
               '200 test tasks': lambda: f"{configure('quickstart').test_tasks} test tasks",
               'sees five characters':
                   lambda: f"sees {in_words(inspect.signature(tasks.EpisodeSampler).parameters['n_way'].default)} "
                           "characters",
               'for two CPU cores':
                   lambda: all(int(re.search(r'(\d) threads', r['starts'][0]['device'])[1]) <= 2
                               for r in small_records()),
               'in ten lines': lambda: f"in {in_words(lines_of('method_loop('))} lines",
               'at most fifteen lines': lambda: longest_part() <= words['fifteen']},
}


def summary(name):
    "The Summary of a page; empty if it has none."
    text = '\n'.join(''.join(c['source']) for c in cells(name) if c['cell_type'] == 'markdown')
    return re.split(r'^## ', text.partition('\n## Summary')[2], flags=re.M)[0]


def numbers_in(line):
    "Numbers and their places, names and definitions left out."
    taken = [m.span() for pattern in defined for m in re.finditer(pattern, line, re.I)]
    return [m for m in number.finditer(line) if not any(a <= m.start() and m.end() <= b for a, b in taken)]


@functools.cache
def claimed(name):
    "Claims of a page that hold, as the words they are about."
    return [phrase for phrase, made in claims.get(name, {}).items()
            if (made_now := made()) is True or made_now == phrase]


def unaccounted(name, text, known=frozenset()):
    "Numbers of a text, with their lines, that no definition, claim or output has."
    found = []
    for line in text.splitlines():
        spans = [m.span() for phrase in claimed(name) for m in re.finditer(re.escape(phrase), line)]
        for m in numbers_in(line):
            if any(a <= m.start() and m.end() <= b for a, b in spans): continue
            if len(re.sub(r'\D', '', m[0]).lstrip('0')) < 3 or m[0] not in known: found.append((m[0], line))
    return found


@functools.cache
def known_of(name): return frozenset(m[0] for m in number.finditer(said(name)))


def off_by_one(text, m):
    "The text with another number there."
    if m[0][-1].isdigit(): other = f'{m[0][:-1]}{(int(m[0][-1]) + 1) % 10}'
    else: other = 'nine' if m[0] == 'seven' else 'seven'
    return text[:m.start()] + other + text[m.end():]


@pytest.mark.parametrize('name', pages)
def test_a_summary_says_what_the_page_has_put_out(name):
    text = summary(name)
    assert not unaccounted(name, text, known_of(name)), 'say it without the number, print the number, or add a claim'
    for phrase in claims.get(name, {}): assert phrase in text, f'nobody claims {phrase!r} any more'
    for line in text.splitlines():
        for m in numbers_in(line):
            assert unaccounted(name, off_by_one(line, m), known_of(name)), f'{m[0]} could be another number: {line}'


@pytest.fixture(scope='module')
def made_from_records():
    "What the front page's cells make of the records now: Markdown, each block as README has it."
    spec = importlib.util.spec_from_file_location('readme', root / '.ci/readme.py')
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    before, space, found = os.getcwd(), {}, []
    os.chdir(root / 'nbs')
    try:
        for source in (''.join(c['source']) for c in cells('index') if c['cell_type'] == 'code'):
            if (not re.match(r'#\| hide', source) and not re.match(r'#\| echo: false\n(?!#\| fig-cap)', source)
                    or 'nbdev_export' in source):
                continue
            tree = ast.parse('\n'.join(line for line in source.splitlines() if not line.startswith('%')))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, 'index', 'exec'), space)
            if last and hasattr(shown := eval(compile(ast.Expression(last.value), 'index', 'eval'), space), 'data'):
                found.append(readme.from_root(shown.data))
    finally: os.chdir(before)
    assert len(found) >= 6
    return found


fenced = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


def front_page_problems(text, blocks):
    "What README says and nothing has made."
    wrong = [block for block in blocks if block not in text]
    for block in blocks: text = text.replace(block, '')
    shown = [block.rstrip('\n') for kind, block in fenced.findall(text) if not kind] # what a cell has put out
    wrong += [block for block in shown if block not in said('index')]
    return wrong + unaccounted('README', fenced.sub('', text))


def test_the_front_page_says_what_the_records_say(made_from_records):
    text = (root / 'README.md').read_text(encoding='utf-8')
    assert not front_page_problems(text, made_from_records)
    for phrase in claims['README']: assert phrase in text, f'nobody claims {phrase!r} any more'


def test_no_number_of_the_front_page_could_be_another(made_from_records):
    text = (root / 'README.md').read_text(encoding='utf-8')
    typed = [m.span() for m in fenced.finditer(text) if m[1]] # commands, not findings
    assert not front_page_problems(text, made_from_records)
    changed, start = 0, 0
    for line in text.splitlines(keepends=True):
        for m in numbers_in(line.rstrip('\n')):
            at = start + m.start()
            if any(a <= at < b for a, b in typed): continue
            other = text[:start] + off_by_one(line, m) + text[start + len(line):]
            assert front_page_problems(other, made_from_records), f'{m[0]} could be another number: {line}'
            changed += 1
        start += len(line)
    assert changed > 100
