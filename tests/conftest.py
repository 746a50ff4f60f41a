"Fixtures shared by the tests."
import os

os.environ.setdefault('TQDM_DISABLE', '1')

import pytest
import torch

from mamlpp_nb.tasks import ClassImages, find_omniglot, glyphs, omniglot
from mamlpp_nb.training import Config

small_run = Config(data='glyphs', n_way=3, filters=4, n_steps=2, n_tasks=2, epochs=3, iterations=3, multi_step_epochs=1, first_order_epochs=1,
                   average=.5, validation_tasks=4, test_tasks=4, keep=2) # a second or two


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


def numbered(counts, split='train', size=2):
    "Classes whose images all differ: image r spells the number r in two kinds of bytes."
    n = sum(counts)
    rows = torch.arange(n)
    images = torch.stack([rows % 256, rows // 256] * (size * size // 2), -1).to(torch.uint8)
    return ClassImages(images.view(n, 1, size, size), counts, [f'class{i}' for i in range(len(counts))], split)
