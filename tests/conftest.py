"Fixtures shared by the tests."
import os

os.environ.setdefault('TQDM_DISABLE', '1')
if 'PYTEST_XDIST_WORKER' in os.environ: # tests run side by side: one thread each, also in the processes they start
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'TORCHINDUCTOR_COMPILE_THREADS'):
        os.environ.setdefault(name, '1')

import dataclasses

import pytest
import torch
from PIL import Image

from mamlpp_nb import tasks
from mamlpp_nb.layouts import find_omniglot
from mamlpp_nb.tasks import ClassImages, glyphs, omniglot
from mamlpp_nb.config import Config
from mamlpp_nb.runs import read_metrics

tasks.data_sets['glyphs'] = glyphs # drawn once in a process; no cache folder is touched

small_run = Config(data='glyphs', n_way=3, filters=4, n_steps=2, n_tasks=2, epochs=3, iterations=3,
                   multi_step_epochs=1, first_order_epochs=1, average=.5, validation_tasks=4, test_tasks=4,
                   keep=2) # a second or two
tiny_run = dataclasses.replace(small_run, filters=2, n_steps=1, n_tasks=1, epochs=2, iterations=2, outer_lr=.01,
                               average=.3, validation_tasks=3, keep=1,
                               seed=10) # the second epoch is the best: the first one's file is removed


@pytest.fixture(scope='session')
def drawn():
    "The glyphs of seed 0, all splits."
    return glyphs()


@pytest.fixture(scope='session')
def real():
    "Omniglot, where it is on this machine."
    if not find_omniglot(): pytest.skip('no Omniglot under the data root (set MAMLPP_DATA)')
    return omniglot()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "A cache folder of this test's own."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'mamlpp_nb'


@pytest.fixture(scope='session')
def files(drawn, tmp_path_factory):
    "A folder of a few glyphs: what another process would take five seconds to draw, it reads at once."
    folder = tmp_path_factory.mktemp('files') / 'glyphs'
    for s, n_classes in (('train', 6), ('val', 4), ('test', 4)):
        for c in range(n_classes):
            place = folder / s / drawn[s].names[c]
            place.mkdir(parents=True)
            for i, image in enumerate(drawn[s].of_class(c)[:4]):
                Image.fromarray(image[0].numpy()).save(place / f'{i}.png')
    return folder


def double(e):
    "The same episodes in float64."
    return e.each(lambda t: t.double() if t.is_floating_point() else t)


def quiet(text): "For what a command would say."


def no_clock(folder):
    "The metrics of a run, without what differs from run to run."
    return [{k: v for k, v in r.items() if k not in ('seconds', 'memory_gb')} for r in read_metrics(folder)]


def numbered(counts, split='train', size=2):
    "Classes whose images all differ: image r spells the number r in two kinds of bytes."
    n = sum(counts)
    rows = torch.arange(n)
    images = torch.stack([rows % 256, rows // 256] * (size * size // 2), -1).to(torch.uint8)
    return ClassImages(images.view(n, 1, size, size), counts, [f'class{i}' for i in range(len(counts))], split)


_longest = ('never_stopped', 'two_processes', 'without_a_compiler', 'compiled_pass', 'captured_step',
            'many_small_pieces', 'end_with_their_exit_codes')


def pytest_collection_modifyitems(items):
    "The longest first: two processes should end together."
    items.sort(key=lambda item: not any(name in item.name for name in _longest))
