"""Has an exported function become slower? Not part of the tests.

    python -m pytest benchmarks --benchmark-autosave               keep today's numbers
    python -m pytest benchmarks --benchmark-compare                compare with the last ones kept
"""
import pytest
import torch

from mamlpp_nb.bench import outer_step, ways
from mamlpp_nb.classifier import FewShotClassifier
from mamlpp_nb.maml import evaluate, keep_freed_memory, maml_parameters
from mamlpp_nb.network import Conv4, task_batched
from mamlpp_nb.machine import pick_device
from mamlpp_nb.passes import conv4_calculus
from mamlpp_nb.tasks import EpisodeSampler, glyphs
from mamlpp_nb.config import configure

keep_freed_memory()
five = configure('omniglot-5w1s', filters=32, n_tasks=4)


@pytest.mark.parametrize('way', ways)
def test_an_outer_step(benchmark, way):
    if ways[way].captured and not torch.cuda.is_available(): pytest.skip('a capture needs a GPU')
    step = outer_step(five, way, pick_device('auto'))
    step()
    benchmark.pedantic(step, rounds=7)


def test_dealing_a_batch_of_episodes(benchmark):
    deal = EpisodeSampler(glyphs()['train'], 20, 1, 1, rotate=True)
    benchmark(deal, 0, 8)


def test_preparing_an_episode(benchmark):
    e = EpisodeSampler(glyphs()['train'], 20)(0)
    benchmark(conv4_calculus(Conv4(20)).prepare, e.support_x)


def test_evaluating_twenty_tasks(benchmark):
    net = Conv4(5, filters=32)
    benchmark.pedantic(lambda: evaluate(task_batched(net), maml_parameters(net), EpisodeSampler(glyphs()['test']), 20),
                       rounds=5, warmup_rounds=1)


def test_a_classifier_from_five_images(benchmark):
    e = EpisodeSampler(glyphs()['test'], 5, 1, 1)(0)
    images, labels = e.support_x[0].numpy(), range(5)
    benchmark(lambda: FewShotClassifier().fit(images, labels).predict_proba(e.target_x[0].numpy()))
