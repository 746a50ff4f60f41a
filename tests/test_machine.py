"The ground floor: what is said of a machine, and what works where a system lacks something."
import io
import os
import subprocess
import sys

import pytest

from mamlpp_nb import machine
from mamlpp_nb.cli import main
from mamlpp_nb.machine import by_mode, peak_memory, processor, provenance
from mamlpp_nb.progress import Plan, duration


def test_a_record_names_processor_vectors_and_threads():
    model, width, threads = processor().rsplit(', ', 2)
    assert (model
            and width in ('DEFAULT', 'AVX2', 'AVX512', 'NO AVX', 'NEON', 'SVE', 'SVE256', 'SVE128', 'VSX', 'ZVECTOR')
            and threads.endswith(' threads'))
    assert provenance('cpu')['device'] == f'cpu ({processor()})'


def test_memory_is_none_where_the_system_does_not_tell(monkeypatch):
    def nowhere(self, *arguments, **more): raise FileNotFoundError(str(self))
    monkeypatch.setattr(machine.Path, 'read_text', nowhere)
    monkeypatch.setitem(sys.modules, 'resource', None) # importing it fails, as on Windows
    assert peak_memory() is None
    assert machine.processor_model() is not None # no /proc/cpuinfo either


def test_the_size_of_a_page(monkeypatch):
    for names, expected in (({}, 2), ({'MAMLPP_MODE': 'full'}, 3), ({'IN_TEST': '1'}, 1),
                            ({'IN_TEST': '1', 'MAMLPP_MODE': 'full'}, 1)):
        for k in ('IN_TEST', 'MAMLPP_MODE'): monkeypatch.delenv(k, raising=False)
        for k, v in names.items(): monkeypatch.setenv(k, v)
        assert by_mode(1, 2, 3) == expected


def test_a_console_that_knows_few_letters_gets_a_question_mark(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', narrow)
    assert main(['runs', 'nowhere-±-θ']) == 0
    narrow.flush()
    assert b'nowhere-?-?' in narrow.buffer.getvalue()


def test_the_lowest_priority_is_said_also_where_there_is_none(monkeypatch):
    given = []
    monkeypatch.setattr(os, 'nice', lambda n: given.append(n) or 19, raising=False)
    assert 'niceness 19' in machine.lowest_priority() and given == [19]
    monkeypatch.delattr(os, 'nice')
    assert 'no `nice`' in machine.lowest_priority()


def test_the_ground_imports_nothing_of_the_book():
    code = ('import sys, mamlpp_nb.machine, mamlpp_nb.progress; '
            'print(sorted(m for m in sys.modules if m.startswith("mamlpp_nb.")))')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['mamlpp_nb.machine', 'mamlpp_nb.progress']"


# --- the plan

def test_time_left_counts_every_part_from_the_first_second():
    plan = Plan(lambda text: None)
    plan.add('training', 10, 'outer steps', 1.)
    plan.add('test', 4, 'tasks', 5.)
    assert plan.left == 30.
    plan.parts['training'].done, plan.parts['training'].seconds = 5, 10. # twice as slow as guessed
    assert plan.left == 5*2. + 20.
    plan.parts['training'].done = 10
    assert plan.left == 20. # not zero before the test
    plan.parts['test'].guess = None
    assert plan.left is None # nobody knows


def test_a_log_gets_a_line_now_and_then_and_one_of_several_processes_none(monkeypatch):
    for silent in (False, True):
        said = []
        plan = Plan(said.append, every=0., silent=silent)
        plan.add('training', 3, 'outer steps', 1.)
        plan.announce()
        with plan.doing('training') as tick:
            for _ in range(3): tick(note='loss 1')
        assert len(said) == (0 if silent else 5) # two of the announcement, three of the steps
    assert duration(3599.7) == '1:00:00'


@pytest.mark.parametrize('words', [['--no-compile'], ['--no_compile']])
def test_hyphens_and_underscores_are_one(words, capsys):
    assert main(['train', 'no-such-preset', *words]) == 2
    assert "no preset 'no-such-preset'" in capsys.readouterr().err


def test_a_copy_without_its_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv('MAMLPP_COMMIT', '0123456789ab')
    assert provenance('cpu')['commit'] == '0123456789ab'
