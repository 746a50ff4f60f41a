"A classifier for one's own images: as scikit-learn has it, after a round trip, with bad input, as a command."
import copy
import csv
import io
import json
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils import estimator_checks

from mamlpp_nb.cards import model_card
from mamlpp_nb.classifier import (FewShotClassifier, NamedImage, contact_sheet, head_for, image_batch, read_labels,
                                  read_pretrained, wilson_interval, worst_first)
from mamlpp_nb.cli import main
from mamlpp_nb.maml import load_meta, save_meta
from mamlpp_nb.runs import models_folder
from mamlpp_nb.tasks import EpisodeSampler


@pytest.fixture(scope='module')
def task(drawn):
    "Five classes, two images each to learn from and three to name: images and labels of both."
    e = EpisodeSampler(drawn['test'], 5, 2, 3)(0)
    names = np.array(['ox', 'elk', 'emu', 'ape', 'bee'])
    return e.support_x[0].numpy(), names[e.support_y[0]], e.target_x[0].numpy(), names[e.target_y[0]]


@pytest.fixture
def folder(tmp_path, task):
    "The same as files."
    for place, x, y in (('support', *task[:2]), ('unknown', *task[2:])):
        for i, (image, name) in enumerate(zip(x, y)):
            (tmp_path / place / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray((255*image[0]).astype(np.uint8)).save(tmp_path / place / name / f'{i}.png')
    return tmp_path


checks = ['check_estimator_cloneable', 'check_estimator_repr', 'check_no_attributes_set_in_init',
          'check_parameters_default_constructible', 'check_get_params_invariance', 'check_set_params',
          'check_valid_tag_types', 'check_mixin_order', 'check_estimator_tags_renamed']


@pytest.mark.parametrize('name', checks)
def test_what_scikit_learn_asks_of_any_estimator(name):
    "Those of its checks that don't fit two-dimensional tables of numbers, which are no images."
    getattr(estimator_checks, name)('FewShotClassifier', FewShotClassifier())


def test_tools_of_scikit_learn_take_it(task):
    x, y, *_ = task
    twin = clone(FewShotClassifier(n_steps=3).fit(x, y))
    assert twin.n_steps == 3 and not hasattr(twin, 'steps_')
    assert cross_val_score(FewShotClassifier(), x, y, cv=2).mean() > .5
    search = GridSearchCV(FewShotClassifier(), {'n_steps': [1, 5]}, cv=2).fit(x, y)
    assert search.best_params_['n_steps'] in (1, 5) and set(search.predict(x)) <= set(y)


def test_it_learns_and_names_the_classes_in_order(task):
    x, y, targets, truth = task
    c = FewShotClassifier().fit(x, y)
    assert c.classes_.tolist() == sorted(set(y)) and c.score(targets, truth) > .7
    proba = c.predict_proba(targets)
    assert proba.shape == (15, 5) and np.allclose(proba.sum(1), 1, atol=1e-5)
    assert (c.classes_[proba.argmax(1)] == c.predict(targets)).all()


def test_neither_the_order_of_images_nor_the_names_of_classes_matter(task):
    "The packaged model has a head of one shared row."
    x, y, targets, _ = task
    proba = FewShotClassifier().fit(x, y).predict_proba(targets)
    order = np.random.default_rng(0).permutation(len(x))
    assert np.allclose(FewShotClassifier().fit(x[order], y[order]).predict_proba(targets), proba, atol=1e-4)
    backwards = {name: 'edcba'[i] for i, name in enumerate(sorted(set(y)))}
    assert np.allclose(FewShotClassifier().fit(x, [backwards[name] for name in y]).predict_proba(targets)[:, ::-1],
                       proba, atol=1e-4)


@pytest.mark.parametrize('way, shots', [(2, [1, 3]), (3, [1, 1, 1]), (9, [2, 1, 4, 1, 1, 2, 1, 1, 3])])
def test_any_number_of_classes_and_unequal_shots(drawn, way, shots):
    images, labels = zip(*((image, c) for c, n in enumerate(shots) for image in drawn['test'].of_class(c)[:n]))
    others, truth = zip(*((image, c) for c in range(way) for image in drawn['test'].of_class(c)[10:14]))
    c = FewShotClassifier().fit(list(images), labels)
    assert c.predict_proba(list(others)).shape == (4*way, way) and c.score(list(others), truth) > 1.5/way


def test_one_by_one_and_in_a_batch_agree_where_that_is_promised(task):
    x, y, targets, _ = task
    for norm in ('support', 'running'):
        c = FewShotClassifier(norm=norm).fit(x, y)
        assert np.allclose(np.concatenate([c.predict_proba(t[None]) for t in targets]),
                           c.predict_proba(targets), atol=1e-5)
    c = FewShotClassifier(norm='targets').fit(x, y)
    assert not np.allclose(np.concatenate([c.predict_proba(t[None]) for t in targets]),
                           c.predict_proba(targets), atol=1e-2) # and isn't where it isn't


def test_rows_of_a_head_that_was_trained_with_a_row_for_each_class():
    meta = read_pretrained('omniglot').meta
    rows = meta.start['head.weight'] + torch.arange(5.)[:, None]
    apart = meta._replace(start={**meta.start, 'head.weight': rows, 'head.bias': torch.arange(5.)})
    assert (torch.equal(head_for(apart, 3).start['head.weight'], rows[:3])
            and torch.equal(head_for(apart, 5).start['head.weight'], rows))
    more = head_for(apart, 400).start
    # no two classes begin alike
    assert torch.equal(more['head.weight'][:5], rows) and len({*more['head.weight'][:, 0].tolist()}) == 400
    assert (torch.allclose(more['head.weight'][5:].mean(0), rows.mean(0), atol=.4)
            and torch.allclose(more['head.weight'][5:].std(0), rows.std(0, correction=0), rtol=.2))
    assert torch.equal(head_for(apart, 400).start['head.weight'], more['head.weight']) # drawn alike every time
    shared = head_for(meta, 12).start['head.weight']
    assert (shared == shared[0]).all() and len(shared) == 12


def test_a_new_process_predicts_the_same_to_the_bit(task, tmp_path):
    x, y, targets, _ = task
    c = FewShotClassifier(n_steps=4).fit(x, y)
    c.save(tmp_path / 'c.safetensors')
    np.save(tmp_path / 'x.npy', targets)
    there = ('import sys, numpy as np; from mamlpp_nb.classifier import FewShotClassifier; '
             'c = FewShotClassifier.load(sys.argv[1] + "/c.safetensors"); '
             'np.savez(sys.argv[1] + "/said.npz", '
             '*[c.adapted_at(i).predict_proba(np.load(sys.argv[1] + "/x.npy")) for i in range(5)], '
             'names=c.predict(np.load(sys.argv[1] + "/x.npy")))')
    subprocess.run([sys.executable, '-c', there, str(tmp_path)], check=True)
    said = np.load(tmp_path / 'said.npz')
    for i in range(5): assert np.array_equal(said[f'arr_{i}'], c.adapted_at(i).predict_proba(targets))
    assert said['names'].tolist() == c.predict(targets).tolist()
    (tmp_path / 'd.safetensors').write_bytes((tmp_path / 'c.safetensors').read_bytes()[:-100])
    with pytest.raises(ValueError, match='d.safetensors'): FewShotClassifier.load(tmp_path / 'd.safetensors')


def answers(c, x): return c.predict_proba(x)


def by_joblib(c, path):
    joblib.dump(c, path)
    return joblib.load(path)


@pytest.mark.parametrize(
    'kept', [lambda c, path: pickle.loads(pickle.dumps(c)), by_joblib, lambda c, path: copy.deepcopy(c),
             lambda c, path: copy.copy(c)], ids=['pickle', 'joblib', 'deepcopy', 'copy'])
@pytest.mark.parametrize('norm', ['support', 'running', 'targets'])
@pytest.mark.filterwarnings('error')
def test_a_pickled_classifier_predicts_the_same_to_the_bit(task, tmp_path, kept, norm):
    x, y, targets, truth = task
    c = FewShotClassifier(n_steps=3, norm=norm).fit(x, y)
    before = c.predict_proba(targets) # now it has modules
    again = kept(c, tmp_path / 'c.joblib')
    assert (np.array_equal(again.predict_proba(targets), before)
            and again.score(targets, truth) == c.score(targets, truth))
    assert np.array_equal(again.adapted_at(1).predict_proba(targets), c.adapted_at(1).predict_proba(targets))
    assert np.array_equal(again.fit(x, y).predict_proba(targets), before)
    # also before it is fitted
    assert repr(pickle.loads(pickle.dumps(FewShotClassifier(n_steps=2)))) == repr(FewShotClassifier(n_steps=2))
    read = pickle.loads(pickle.dumps(read_pretrained('omniglot')))
    assert all(torch.equal(a, b) for a, b in zip(read.net.state_dict().values(),
                                                 read_pretrained('omniglot').net.state_dict().values()))


def test_a_classifier_goes_to_another_process(task):
    x, y, targets, _ = task
    c = FewShotClassifier().fit(x, y)
    with multiprocessing.get_context('spawn').Pool(1) as pool: said = pool.apply(answers, (c, targets))
    assert np.allclose(said, c.predict_proba(targets), atol=1e-6) # another number of threads, perhaps


class Column:
    "What a column of a DataFrame looks like from here."
    def __init__(self, values): self.values = values
    def __array__(self, dtype=None, copy=None): return np.array(self.values, dtype=object)
    def __len__(self): return len(self.values)
    def __iter__(self): return iter(self.values)


@pytest.mark.parametrize('column', [Column, lambda v: np.array(v, dtype=object), tuple, lambda v: (x for x in v)])
@pytest.mark.parametrize('values', [['ox', 'ox', 'elk', 'elk'], [3, 3, 1, 1], [np.int64(3), 3, 1, 1],
                                    [True, True, False, False]])
def test_columns_of_labels(task, column, values):
    x = task[0][:4]
    c = FewShotClassifier().fit(x, column(values))
    assert c.classes_.tolist() == sorted(set(values)) and c.classes_.dtype.kind in 'Uib'
    assert c.score(x, column(values)) == c.score(x, values)
    assert set(c.predict(x)) <= set(values)


@pytest.mark.parametrize('labels', [['ox', 1], [1, 'ox'], [True, 1], ['ox', None], [1, None], ['ox', float('nan')],
                                    [1., 2.], [['ox'], ['elk']], ['a', b'a'], [1, 2.]])
@pytest.mark.parametrize('column', [list, Column])
def test_mixed_labels_are_refused(labels, column):
    with pytest.raises(ValueError, match='of one kind|strings or integers|in one list'): read_labels(column(labels))


def test_labels_of_another_kind_than_the_classes_are_refused(task):
    with pytest.raises(ValueError, match='of another kind'):
        FewShotClassifier().fit(*task[:2]).score(task[2], [0]*len(task[2]))


one_picture = [np.zeros((60, 60, 3), np.uint8), torch.zeros(3, 60, 60), np.zeros((60, 60), np.uint8),
               torch.zeros(60, 60), np.zeros((1, 60, 60)), np.zeros((60, 60, 4)), torch.zeros(60, 60, 3),
               [np.zeros((3, 28, 28))], np.zeros((1, 3, 28, 28)), Image.new('RGB', (9, 9)), [Image.new('L', (9, 9))]]


@pytest.mark.parametrize('image', one_picture, ids=lambda x: f'{type(x).__name__} {tuple(getattr(x, "shape", ()))}')
def test_one_picture_one_answer(task, image, tmp_path):
    c = FewShotClassifier().fit(*task[:2])
    assert c.predict(image).shape == (1,) and c.predict_proba(image).shape == (1, 5)
    for channels in (1, 3): assert image_batch(image, channels, 32).shape == (1, channels, 32, 32)


def test_a_path_alone_is_a_picture(task, tmp_path):
    Image.new('L', (9, 9)).save(tmp_path / 'x.png')
    c = FewShotClassifier().fit(*task[:2])
    for path in (tmp_path / 'x.png', str(tmp_path / 'x.png'), np.array([str(tmp_path / 'x.png')]),
                 np.array([tmp_path / 'x.png'], dtype=object)):
        assert c.predict(path).shape == (1,)


def test_what_could_be_read_in_two_ways_is_refused_with_both_unless_something_decides(task):
    x, y, *_ = task
    c, three, four = FewShotClassifier().fit(x, y), np.zeros((3, 28, 28)), np.zeros((4, 28, 28))
    for a in (three, four, torch.zeros(4, 28, 28)):
        with pytest.raises(ValueError, match=r'grey pictures or one of \d channels.*x\[:,None\].*\[x\]'): c.predict(a)
        assert len(c.predict(a[:, None])) == len(a) and len(c.predict([a])) == 1
    with pytest.raises(ValueError, match='before or behind'): c.predict([np.zeros((3, 28, 4))])
    assert len(image_batch(three, channels=3)) == 1 and [len(image_batch(four, n=n)) for n in (1, 4)] == [1, 4]
    assert (c.score(three, ['ox']*3) in (0, 1)
            and FewShotClassifier().fit(x[:4, 0], [0, 0, 1, 1]).classes_.tolist() == [0, 1]) # labels decide
    assert len(image_batch(np.zeros((60, 28, 28)))) == 60 and len(image_batch(np.zeros((2, 28, 28)))) == 2
    for shape in ((28,), (2, 3, 28, 28, 1), (7, 28, 2)):
        with pytest.raises(ValueError, match='shape'): image_batch(np.zeros(shape))


def test_small_excess_is_clipped_and_large_refused(task):
    x = torch.from_numpy(task[0])
    above = x.clone()
    above[above == 1] = float(np.nextafter(np.float32(1), np.float32(2)))
    assert torch.equal(image_batch(above), image_batch(x))
    large = torch.nn.functional.interpolate(x, size=(105, 105), mode='bicubic')
    assert large.min() < -.05 and large.max() > 1.05
    assert torch.equal(image_batch(large, size=105), image_batch(large.clamp(0, 1), size=105))
    for bad in (x + .5, x - .5, 2*x - 1, 255*x, (x - .92)/.27, x*float('inf')):
        with pytest.raises(ValueError, match='must lie in'): image_batch(bad)
    for bad in (np.full((2, 9, 9), 256), np.full((2, 9, 9), -1)):
        with pytest.raises(ValueError, match='must lie in'): image_batch(bad)


def test_more_steps_than_in_training(task):
    x, y, targets, truth = task
    c = FewShotClassifier(n_steps=12).fit(x, y)
    assert c.n_steps_ == 12 and np.array_equal(c.adapted_at(5).predict_proba(targets),
                                               FewShotClassifier(temperature=1.).fit(x, y).predict_proba(targets))
    with pytest.raises(ValueError, match='from 0 to 12'): c.adapted_at(13)


@pytest.mark.parametrize('spoil, named', [
    (lambda x, y: (x[None], y), 'must be'),
    (lambda x, y: (x[:, [0, 0]], y), 'channels'),
    (lambda x, y: (x, y[:-1]), 'as many labels'),
    (lambda x, y: (x, y[:, None]), 'in one list'),
    (lambda x, y: (x, ['ox']*len(x)), 'two classes'),
    (lambda x, y: (x*300, y), 'must lie in'),
    (lambda x, y: (x*np.nan, y), 'must lie in'),
    (lambda x, y: ([], []), 'no images'),
    (lambda x, y: (x, np.linspace(0, 1, len(x))), 'strings or integers'),
    (lambda x, y: (['nowhere.png']*len(x), y), 'nowhere.png')])
def test_bad_images_and_labels_are_named(task, spoil, named):
    with pytest.raises(ValueError, match=named): FewShotClassifier().fit(*spoil(*task[:2]))


def test_bad_settings_and_models_are_named(task, tmp_path):
    x, y, *_ = task
    (tmp_path / 'junk.safetensors').write_bytes(b'junk')
    save_meta(tmp_path / 'other.safetensors', load_meta(models_folder / 'omniglot.safetensors')[0],
              {'config': {'filters': 16}})
    for settings, named in (({'model': 'imagenet'}, 'omniglot'), ({'model': str(tmp_path)}, 'neither a file'),
                            ({'model': str(tmp_path / 'junk.safetensors')}, 'junk'),
                            ({'model': str(tmp_path / 'other.safetensors')}, 'does not fit'),
                            ({'n_steps': 0}, 'at least 1'), ({'norm': 'batch'}, 'choose from')):
        with pytest.raises(ValueError, match=named): FewShotClassifier(**settings).fit(x, y)
    with pytest.raises(ValueError, match='call fit'): FewShotClassifier().predict(x)


def test_an_exported_program_says_the_same(task, tmp_path):
    x, y, targets, _ = task
    c, batch = FewShotClassifier().fit(x, y), torch.from_numpy(task[2])
    program = torch.export.export(c.module(), (batch,), dynamic_shapes=({0: torch.export.Dim('images', min=1)},))
    torch.export.save(program, tmp_path / 'c.pt2')
    said = torch.export.load(tmp_path / 'c.pt2').module()
    for n in (1, 7): assert np.allclose(said(batch[:n]).numpy(), c.predict_proba(targets[:n]), atol=1e-6)


@pytest.mark.filterwarnings('ignore')
def test_onnx_says_the_same(task, tmp_path):
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    x, y, targets, _ = task
    c = FewShotClassifier().fit(x, y)
    torch.onnx.export(c.module(), (torch.from_numpy(targets),), tmp_path / 'c.onnx', dynamo=True, verbose=False,
                      input_names=['images'], dynamic_shapes=({0: torch.export.Dim('n', min=1)},))
    session = runtime.InferenceSession(tmp_path / 'c.onnx')
    for n in (1, 7):
        assert np.allclose(session.run(None, {'images': targets[:n]})[0], c.predict_proba(targets[:n]), atol=1e-5)


def adapt(capsys, *words):
    code = main(['adapt', *map(str, words)])
    return (code, *capsys.readouterr())


def test_the_command_in_all_formats(folder, capsys, task):
    code, out, _ = adapt(capsys, 'omniglot', folder / 'support', '--predict', folder / 'unknown',
                         '--format', 'json', '--save', folder / 'c.safetensors')
    rows = json.loads(out)
    assert code == 0 and len(rows) == 15 and all(
        abs(sum(r['probabilities'].values()) - 1) < 1e-4
        and max(r['probabilities'], key=r['probabilities'].get) == r['predicted'] for r in rows)
    assert np.mean([r['predicted'] in r['path'].split('/')[-2] for r in rows]) > .7
    table = list(csv.DictReader(io.StringIO(
        adapt(capsys, 'omniglot', folder / 'support', '--predict', folder / 'unknown', '--format', 'csv')[1])))
    assert [(r['path'], r['predicted']) for r in table] == [(r['path'], r['predicted']) for r in rows]
    assert ([line.split()[:2] for line in
             adapt(capsys, 'omniglot', folder / 'support', '--predict', folder / 'unknown')[1].splitlines()[1:]]
            == [[r['path'], r['predicted']] for r in rows])
    assert (FewShotClassifier.load(folder / 'c.safetensors').predict([r['path'] for r in rows]).tolist()
            == [r['predicted'] for r in rows])
    code, out, err = adapt(capsys, 'omniglot', folder / 'support', '--format', 'json')
    assert code == 0 and len(json.loads(out)) == 10 and 'of 10 images right' in err


def test_the_command_names_what_is_wrong(folder, capsys):
    support, unknown = folder / 'support', folder / 'unknown'
    (support / 'ox' / 'broken.jpg').write_bytes(b'no picture')
    code, _, err = adapt(capsys, 'omniglot', support, '--predict', unknown)
    assert code == 0 and 'left out' in err and 'broken.jpg' in err
    (support / 'yak').mkdir()
    for words, named in (((support,), 'yak'), ((folder / 'nowhere',), 'not a folder'),
                         ((unknown, '--predict', folder / 'nowhere'), 'not a folder'),
                         ((unknown, '--steps', '-1'), 'at least 0'), ((unknown / 'ox',), 'no images')):
        code, out, err = adapt(capsys, 'omniglot', *words)
        assert code == 2 and named in err and not out and 'Traceback' not in err
    (support / 'yak').rmdir()
    (folder / 'empty').mkdir()
    assert (adapt(capsys, 'omniglot', folder / 'empty')[0] == 2
            and adapt(capsys, 'omniglot', support, '--predict', folder / 'empty')[0] == 2)
    (folder / 'one').mkdir()
    (folder / 'one/ox').symlink_to(support / 'ox')
    assert adapt(capsys, 'omniglot', folder / 'one')[0] == 2
    assert adapt(capsys, folder / 'support/ox/broken.jpg', support)[0] == 2


def ask(capsys, *words):
    code = main([*map(str, words)])
    return (code, *capsys.readouterr())


def test_a_kept_classifier_names_a_folder_later_in_another_process(folder, capsys):
    kept, unknown = folder / 'c.safetensors', folder / 'unknown'
    first = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--predict', unknown, '--format', 'csv',
                '--save', kept)[1]
    said = subprocess.run([sys.executable, '-m', 'mamlpp_nb.cli', 'predict', kept, unknown, '--format', 'csv'],
                          capture_output=True, text=True, check=True)
    assert [r.rsplit(',', 5)[0] for r in said.stdout.splitlines()] == [r.rsplit(',', 5)[0] for r in first.splitlines()]
    assert ask(capsys, 'predict', kept, unknown, '--format', 'csv')[1] == first # as many threads: the same digits
    one = next(unknown.rglob('*.png'))
    code, out, _ = ask(capsys, 'predict', kept, one, '--format', 'json')
    assert code == 0 and [r['path'] for r in json.loads(out)] == [str(one)]


def test_a_report_counts_what_folders_say(folder, capsys):
    kept, unknown = folder / 'c.safetensors', folder / 'unknown'
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--predict', unknown, '--format', 'json',
                         '--save', kept, '--report')
    rows = json.loads(out)
    right = sum(r['predicted'] == r['path'].split('/')[-2] for r in rows)
    assert code == 0 and f'{right} of 15 right, {right/15:.1%}' in err and 'mean confidence' in err
    matrix = [line.split()[2:] for line in err.splitlines()
              if line[:2].strip().isdigit() and line.split()[1] in rows[0]['probabilities']]
    assert ([int(row[i].replace('·', '0')) for i, row in enumerate(matrix)]
            == [sum(r['predicted'] == r['path'].split('/')[-2] == c for r in rows) for c in rows[0]['probabilities']])
    shutil.copy(rows[0]['path'], unknown / 'loose.png')
    (unknown / 'zebra').mkdir()
    shutil.copy(rows[0]['path'], unknown / 'zebra' / '0.png')
    assert '2 more are in no folder with the name of a class' in ask(capsys, 'predict', kept, unknown, '--report')[2]
    code, out, err = ask(capsys, 'predict', kept, unknown / 'zebra', '--report')
    assert code == 2 and not out and 'nothing to compare with; the classes are ape, bee, elk, emu, ox' in err
    # those it has, each by one that hasn't seen it
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--report')
    assert code == 0 and ' of 10 right' in err


def test_a_sheet_shows_mistakes_first(folder, capsys, tmp_path):
    shutil.copy(next((folder / 'unknown/ox').iterdir()), folder / 'support/elk/stray.png')
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--sheet', tmp_path / 'sheet.png',
                         '--format', 'json')
    assert code == 0 and f'11 of 11 pictures are on {tmp_path}/sheet.png' in err
    page = Image.open(tmp_path / 'sheet.png')
    assert page.width > 600 and page.height > 300
    truth = {str(p): p.parent.name for p in (folder / 'support').rglob('*.png')}
    rows = [NamedImage(r['path'], r['predicted'], np.array([*r['probabilities'].values()]), truth[r['path']])
            for r in json.loads(out)]
    first = worst_first(rows)
    wrong = [r for r in first if r.wrong]
    assert any(r.path.endswith('stray.png') for r in wrong) and first[:len(wrong)] == wrong
    assert [r.confidence for r in wrong] == sorted((r.confidence for r in wrong), reverse=True)
    others = [r.confidence for r in first[len(wrong):]]
    assert others == sorted(others)
    assert (contact_sheet(rows, tmp_path / 'few.pdf', most=1) == 1
            and (tmp_path / 'few.pdf').read_bytes().startswith(b'%PDF'))


@pytest.mark.parametrize('words, named', [(['--sheet', 'page.xyz'], '--sheet must end with'),
                                          (['--sheet', 'page'], '--sheet must end with')])
def test_a_sheet_of_no_kind_is_refused_before_the_work(folder, capsys, words, named):
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', *words)
    assert code == 2 and named in err and not out


def test_predict_names_what_is_wrong(folder, capsys):
    model = models_folder / 'omniglot.safetensors'
    for words, named in (((model, folder / 'unknown'), 'no fitted classifier'),
                         ((folder / 'nowhere', folder / 'unknown'), 'neither a file')):
        code, out, err = ask(capsys, 'predict', *words)
        assert code == 2 and named in err and not out and 'Traceback' not in err
    kept = folder / 'c.safetensors'
    assert ask(capsys, 'adapt', 'omniglot', folder / 'support', '--save', kept)[0] == 0
    (folder / 'empty').mkdir()
    for place, named in ((folder / 'nowhere', 'not a folder'), (folder / 'empty', 'no images'), (kept, 'no images')):
        code, out, err = ask(capsys, 'predict', kept, place)
        assert code == 2 and named in err and not out


def test_an_interval_of_a_share_stays_within_0_and_1():
    for n in (1, 5, 40):
        for right in range(n + 1):
            low, high = wilson_interval(right, n)
            assert 0 <= low <= right/n + 1e-9 and right/n - 1e-9 <= high <= 1 and high - low > .05


@pytest.mark.parametrize('model', sorted(p.stem for p in models_folder.glob('*.safetensors')))
def test_a_packaged_model_travels_with_the_package_and_its_card_says_what_it_is(model):
    card = (models_folder / f'{model}.md').read_text()
    record = load_meta(models_folder / f'{model}.safetensors')[1]['record']
    kept = json.loads((models_folder.parent.parent / f'nbs/results/tables/{record}.json').read_text())
    assert (models_folder / f'{model}.safetensors').stat().st_size < 1e6
    # all but the grades
    head, tail = (part.splitlines() for part in model_card(kept, model).split('\n| statistics | accuracy |'))
    assert card.splitlines()[:len(head)] == head and card.splitlines()[-5:] == tail[-5:]
    for norm, pair in kept['test']['norms'].items():
        assert (f"| {norm} | {100*pair['single']['accuracy'][-1]:.2f} "
                f"± {100*pair['single']['ci95'][-1]:.2f} |") in card
    assert kept['starts'][-1]['commit'] in card and re.search("licence|terms", card)
    assert 'models' in (models_folder.parent.parent / 'MANIFEST.in').read_text()


def test_a_temperature_changes_how_sure_and_not_what(task):
    x, y, targets, _ = task
    plain, calm = (FewShotClassifier(temperature=t).fit(x, y) for t in (1., 2.))
    cooled = np.sqrt(plain.predict_proba(targets))
    assert np.allclose(calm.predict_proba(targets), cooled/cooled.sum(1, keepdims=True), atol=1e-5)
    assert (calm.predict(targets) == plain.predict(targets)).all()
    for wrong in (0., -1., float('nan'), 'warm'):
        with pytest.raises(ValueError, match='temperature must be above 0'):
            FewShotClassifier(temperature=wrong).fit(x, y)


def test_none_of_these_has_its_price_in_false_alarms(task, tmp_path):
    x, y, targets, _ = task
    c = FewShotClassifier().fit(x, y)
    shares = [float(s) for s in c.thresholds_]
    assert (shares == sorted(shares)
            and [c.threshold(s) for s in shares] == sorted(c.thresholds_.values())) # more alarms, a higher bar
    assert (c.is_unknown(targets, .2) == (c.predict_proba(targets).max(1) < c.threshold(.2))).all()
    c.save(tmp_path / 'kept.safetensors')
    kept = FewShotClassifier.load(tmp_path / 'kept.safetensors')
    assert kept.thresholds_ == c.thresholds_ and kept.temperature_ == c.temperature_ != 1
    with pytest.raises(ValueError, match='must be one of 0.01, 0.05'): c.threshold(.3)
    for other in (FewShotClassifier(norm='targets'), FewShotClassifier(n_steps=3), FewShotClassifier(temperature=1.)):
        with pytest.raises(ValueError, match='was not measured'): other.fit(x, y).threshold(.05)
    with pytest.raises(ValueError, match='was not measured'): c.adapted_at(2).threshold(.05)


def test_the_commands_say_none_of_these(folder, capsys, task):
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(np.repeat(np.repeat(noise[::7, ::7], 7, 0), 7, 1)).save(folder / 'unknown' / 'ox' / 'stranger.png')
    kept = folder / 'kept.safetensors'
    words = ('--unknown', '0.2', '--format', 'json', '--report')
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--predict', folder / 'unknown',
                         '--save', kept, *words)
    rows = json.loads(out)
    bound = FewShotClassifier.load(kept).threshold(.2)
    assert code == 0 and all((r['predicted'] == 'none of these') == (max(r['probabilities'].values()) < bound)
                             for r in rows)
    assert any(r['predicted'] == 'none of these' for r in rows) and '?: none of these' in err
    assert ask(capsys, 'predict', kept, folder / 'unknown', *words)[1] == out
    assert 'none of these' not in ask(capsys, 'predict', kept, folder / 'unknown')[1]
    code, out, err = ask(capsys, 'adapt', 'omniglot', folder / 'support', '--unknown', '0.3')
    assert code == 2 and 'must be one of' in err and not out
