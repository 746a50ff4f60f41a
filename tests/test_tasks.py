"Episodes are what they say, whatever the numbers: property tests of the sampler."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import PILToTensor, ToTensor

from conftest import numbered
from mamlpp_nb.tasks import EpisodeSampler, from_dataset, from_labels, random_bits, stream

fields = ('support_x', 'target_x', 'support_y', 'target_y', 'classes', 'rows', 'turns', 'mirrored')


@st.composite
def sampler_settings(draw):
    way, shot, target = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(shot + target, 12), min_size=way, max_size=way + 8))
    return counts, dict(n_way=way, k_shot=shot, n_target=target, seed=draw(st.integers(0, 2**40)),
                        rotate=draw(st.booleans()), mirror=draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(sampler_settings(), st.integers(0, 10**12), st.integers(1, 9))
def test_an_episode_is_what_it_says(setting, first, n_tasks):
    counts, kw = setting
    data = numbered(counts)
    e = EpisodeSampler(data, **kw)(first, n_tasks)
    way, shot, target = kw['n_way'], kw['k_shot'], kw['n_target']
    for task in range(n_tasks):
        rows = e.rows[task]
        # nothing twice: support and target disjoint
        assert len(set(rows.flatten().tolist())) == way * (shot + target)
        assert len(set(e.classes[task].tolist())) == way # classes distinct
        for label, c in enumerate(e.classes[task].tolist()): # every image is of its class
            assert ((rows[label] >= data.first[c]) & (rows[label] < data.first[c] + data.count[c])).all()
        assert e.support_y[task].bincount(minlength=way).tolist() == [shot] * way
        assert e.target_y[task].bincount(minlength=way).tolist() == [target] * way
    for x, y, part in ((e.support_x, e.support_y, slice(shot)), (e.target_x, e.target_y, slice(shot, None))):
        rows, mirrored = e.rows[:, :, part].flatten(1), e.mirrored[:, :, part].flatten(1)
        for task in range(n_tasks):
            for i, r in enumerate(rows[task].tolist()): # the pixels are those of the row, turned, mirrored
                turned = data.images[r].rot90(int(e.turns[task, y[task, i]]), (1, 2))
                assert torch.equal(x[task, i], (turned.flip(-1) if mirrored[task, i] else turned) / 255)
    assert (kw['rotate'] or not e.turns.any()) and (kw['mirror'] or not e.mirrored.any())


@settings(max_examples=60, deadline=None)
@given(sampler_settings(), st.integers(0, 10**6), st.integers(2, 9), st.data())
def test_an_episode_does_not_depend_on_its_batch(setting, first, n_tasks, data):
    counts, kw = setting
    sampler = EpisodeSampler(numbered(counts), **kw)
    whole, cut = sampler(first, n_tasks), data.draw(st.integers(1, n_tasks - 1))
    parts = sampler(first, cut), sampler(first + cut, n_tasks - cut)
    again = EpisodeSampler(numbered(counts), **kw)(first, n_tasks)
    for name in fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
        assert torch.equal(getattr(whole, name), getattr(again, name))


def is_uniform(counts, shrink=1.):
    "Chi-square within 5 standard deviations; `shrink` is what drawing without replacement takes off the scatter."
    counts = counts.double().flatten()
    expected, freedom = counts.mean(), len(counts) - 1
    chi2 = (((counts - expected)**2 / expected).sum() / (freedom * shrink)).item()
    return abs(chi2 - 1) < 5 * (2 / freedom)**.5


@pytest.mark.parametrize('seed', range(3))
def test_uniform_over_classes_images_and_turns(seed):
    e = EpisodeSampler(numbered([20] * 40), 5, 1, 1, seed, rotate=True)(0, 8000)
    assert is_uniform(e.classes.flatten().bincount(minlength=40), 1 - 5 / 40)
    for column in (0, 1):
        assert is_uniform(e.rows[:, :, column].flatten().bincount(minlength=800), 1 - 5 / 800)
    assert is_uniform(e.turns.flatten().bincount(minlength=4))
    seen = EpisodeSampler(numbered([20] * 40), 5, 1, 1, seed, rotate=True, mirror=True)(0, 8000)
    # two coins, or a coin and half of the turns
    for pairs in (seen.mirrored.flatten(2), torch.stack([seen.mirrored[..., 0], seen.turns > 1], -1)):
        assert is_uniform((pairs.long() @ torch.tensor([2, 1])).flatten().bincount(minlength=4))
    for label in range(5): # which label a class gets is free as well
        assert is_uniform(e.classes[:, label].bincount(minlength=40))


def test_ragged_classes_are_uniform_within_each():
    data = numbered([2, 5, 50])
    e = EpisodeSampler(data, 3, 1, 1)(0, 6000)
    for c, count in enumerate([2, 5, 50]):
        rows = e.rows[e.classes == c][:, 0] - data.first[c]
        assert is_uniform(rows.bincount(minlength=count))


def test_the_uniformity_test_notices_a_lopsided_sampler():
    counts = torch.full((40,), 1000)
    counts[3] += 300
    assert not is_uniform(counts)


def test_seeds_and_splits_deal_different_episodes():
    def rows(seed, split='train', n=50):
        return EpisodeSampler(numbered([10] * 20, split), seed=seed)(0, n).rows.flatten(1)
    dealt = [rows(0), rows(1), rows(0, 'val'), rows(2**32)]
    for i, a in enumerate(dealt):
        for b in dealt[:i]: assert not (a == b).all(1).any()
    # a neighbouring seed is not the same stream moved along
    assert not (rows(0, n=2000)[:, None] == rows(1)[None]).all(-1).any()


def test_split_classes_never_mix(drawn):
    dealt = {s: {d.names[c] for c in EpisodeSampler(d)(0, 400).classes.flatten().tolist()} for s, d in drawn.items()}
    names = {s: set(d.names) for s, d in drawn.items()}
    first = {s: set(d.first.tolist()) for s, d in drawn.items()}
    for a in drawn:
        assert dealt[a] <= names[a]
        for b in set(drawn) - {a}: assert not names[a] & names[b] and not first[a] & first[b]


def test_random_bits_do_not_depend_on_how_many_are_asked_for():
    s = stream('some', 1)
    assert torch.equal(random_bits(s, 10), random_bits(s, 1000)[:10])
    assert stream(0, 'a') != stream(1, 'a') != stream(0, 'b')


@pytest.mark.parametrize('kw, named', [
    (dict(n_way=4), 'the train split has 3'),
    (dict(n_way=2, k_shot=2, n_target=2), "'class1' has 3 images"),
    (dict(n_way=0), 'at least 1'), (dict(k_shot=0), 'at least 1'), (dict(n_target=-1), 'at least 1'),
])
def test_impossible_tasks_are_refused_by_name(kw, named):
    with pytest.raises(ValueError, match=named): EpisodeSampler(numbered([9, 3, 9]), **{'n_way': 2, **kw})


def test_turning_needs_squares():
    data = from_labels(torch.zeros(4, 1, 2, 3, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ['a', 'b'])
    with pytest.raises(ValueError, match='3x2'): EpisodeSampler(data, 2, rotate=True)


@pytest.mark.parametrize('labels', [[0, 1, 2], [0, -1, 1]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(ValueError, match=r'\[0, 2\)'):
        from_labels(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), ['a', 'b'])


def test_the_published_split(real):
    everything = sorted(n for d in real.values() for n in d.names)
    starts = {s: [everything.index(n) for n in d.names[:3]] for s, d in real.items()}
    assert starts == {'train': [1245, 1193, 652], 'val': [88, 1243, 1258], 'test': [1394, 742, 245]}
    assert [len(d) for d in real.values()] == [1150, 50, 423]
    assert all((d.count == 20).all() for d in real.values())


@pytest.mark.parametrize('labels', [[0, 1], [0, 1, 1, 0], [[0], [1], [1]], [0., 1., 1.]])
def test_labels_must_be_as_many_as_images(labels):
    with pytest.raises(ValueError, match='as many labels|must be integers'):
        from_labels(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), ['a', 'b'])


class Plain:
    "A data set with nothing but what PyTorch asks for."
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


@pytest.mark.parametrize('transform', [None, ToTensor(), PILToTensor()])
@pytest.mark.parametrize('number', [int, torch.tensor])
def test_any_labelled_data_set(transform, number):
    fake = FakeData(30, (3, 20, 20), num_classes=4, transform=transform)
    data = from_dataset(Plain([(fake[i][0], number(int(fake[i][1]))) for i in range(30)]))
    labels = [int(fake[i][1]) for i in range(30)]
    assert data.names == ('0', '1', '2', '3') and data.count.tolist() == [labels.count(c) for c in range(4)]
    plain = FakeData(30, (3, 20, 20), num_classes=4)
    for c in range(4):
        pixels = [PILToTensor()(plain[i][0]) for i in range(30) if labels[i] == c]
        assert torch.equal(data.of_class(c), torch.stack(pixels))
    assert from_dataset(fake, size=9, mode='L').images.shape == (30, 1, 9, 9)
    e = EpisodeSampler(data.select([3, 1], 'test'), 2, 1, 1)(0)
    assert e.support_x.shape == (1, 2, 3, 20, 20)


def test_names_of_classes_and_classes_without_pictures(tmp_path):
    for name in ('ape', 'bee', 'cow'):
        (tmp_path / name).mkdir()
        Image.new('L', (8, 6), ord(name[0])).save(tmp_path / name / '0.png')
    folder = ImageFolder(str(tmp_path))
    data = from_dataset(folder, size=8)
    assert data.names == ('ape', 'bee', 'cow') and data.images.shape == (3, 3, 8, 8) # ImageFolder makes colour of all
    part = from_dataset(torch.utils.data.Subset(folder, [0, 2]), size=8, mode='L', split='val')
    assert part.names == ('ape', 'cow') and part.split == 'val' and part.images.shape == (2, 1, 8, 8)
    assert from_dataset(folder, size=8, names='xyz').names == ('x', 'y', 'z')


@pytest.mark.parametrize('items, named', [
    ([], 'empty'),
    ([(torch.zeros(1, 4, 4), 'ox')], "item 0.*label is 'ox'"),
    ([(torch.zeros(1, 4, 4), 1.)], 'item 0.*label is 1.0'),
    ([(torch.zeros(1, 4, 4), -1)], 'item 0'),
    ([(torch.zeros(1, 4, 4), 0), torch.zeros(1, 4, 4)], 'item 1'),
    ([(torch.randn(1, 4, 4), 0)], 'item 0.*Normalize'),
    ([(torch.zeros(2, 4, 4), 0)], 'item 0.*1 or 3 channels'),
    ([(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 0)], 'item 0 is .*item 1 is .*Give a size'),
    ([(np.zeros((4, 4)), 0)], 'item 0.*ndarray'),
    ([(torch.zeros(1, 4, 4).long(), 0)], 'item 0.*int64')])
def test_what_is_no_labelled_data_set_is_named(items, named):
    with pytest.raises(ValueError, match=named): from_dataset(Plain(items))
