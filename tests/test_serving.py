"""A model's inner loop as a program: the same answers for other numbers of classes and pictures,
in PyTorch and in ONNX Runtime."""
import copy
import dataclasses

import numpy as np
import pytest
import torch

from mamlpp_nb import serving
from mamlpp_nb.classifier import FewShotClassifier
from mamlpp_nb.cli import main
from mamlpp_nb.maml import save_meta
from mamlpp_nb.config import Config, set_up
from mamlpp_nb.runs import read_pretrained
from mamlpp_nb.serving import convolution_back, exported_adaptation
from mamlpp_nb.tasks import EpisodeSampler, load_data

small = Config(data='glyphs', n_way=3, filters=4, n_steps=1, shared_head=True)


@pytest.fixture(scope='module')
def drawings(): return load_data('glyphs')


def a_model(folder, drawings, **changes):
    "The file of an untrained one, whose step sizes differ from layer to layer"
    config = dataclasses.replace(small, **changes)
    setup = set_up(config, drawings, compiled=False)
    sizes = {k: a * (1 + .1*i) for i, (k, a) in enumerate(setup.meta.step_sizes.items())}
    save_meta(folder / 'model.safetensors', setup.meta._replace(step_sizes=sizes),
              {'config': dataclasses.asdict(config), 'channels': 1, 'size': 28})
    return str(folder / 'model.safetensors')


def task(drawings, way, shot, keep=None):
    e = EpisodeSampler(drawings['test'], way, shot, 2)(1)
    return e.support_x[0][:keep], e.support_y[0][:keep], e.target_x[0]


def rows(y): return torch.eye(int(y.max()) + 1)[y]


@pytest.mark.parametrize('changes', [
    {'n_steps': 2}, {'method': 'meta-sgd'},
    *(pytest.param(c, marks=pytest.mark.weekly)
      for c in ({'strided': True}, {'method': 'maml', 'blocks': 3}))], ids=str)
def test_the_program_says_what_the_classifier_says(changes, tmp_path, drawings):
    model = a_model(tmp_path, drawings, **changes)
    run = exported_adaptation(model).module()
    for way, shot, keep in ((2, 1, None), (3, 2, None), (4, 3, 10), (7, 1, None)):
        x, y, targets = task(drawings, way, shot, keep)
        for temperature in (1., 2.5):
            ours = run(x, rows(y), targets, torch.tensor(temperature)).detach().numpy()
            theirs = FewShotClassifier(model, temperature=temperature).fit(x, y).predict_proba(targets)
            assert ours.shape == theirs.shape and np.allclose(ours, theirs, atol=1e-4)
    one = run(x, rows(y), targets[:1], torch.tensor(2.5)).detach().numpy()
    assert np.allclose(one, theirs[:1], atol=1e-4) # an answer depends on its picture alone
    if changes.get('n_steps') == 2:
        assert not np.allclose(
            one, FewShotClassifier(model, n_steps=1, temperature=2.5).fit(x, y).predict_proba(targets[:1]), atol=1e-3)


def test_separate_rows_keep_their_number_of_classes(tmp_path, drawings):
    model = a_model(tmp_path, drawings, shared_head=False)
    run = exported_adaptation(model).module()
    x, y, targets = task(drawings, 3, 2)
    theirs = FewShotClassifier(model, temperature=1.).fit(x, y).predict_proba(targets)
    assert np.allclose(run(x, rows(y), targets, torch.tensor(1.)).detach().numpy(), theirs, atol=1e-4)
    x, y, targets = task(drawings, 4, 2)
    with pytest.raises((RuntimeError, AssertionError)): run(x, rows(y), targets, torch.tensor(1.))


def test_what_a_record_can_not_hold_is_refused(tmp_path, drawings, monkeypatch):
    with pytest.raises(ValueError, match='grouped'):
        convolution_back(None, None, None, None, [1], [1], [1], False, [0], 2, [True]*3)
    found = read_pretrained('omniglot')
    other = found._replace(config=dataclasses.replace(found.config, loss='squared error'), net=copy.deepcopy(found.net))
    monkeypatch.setattr(serving, 'read_pretrained', lambda model: other)
    with pytest.raises(ValueError, match='only a classifier'): exported_adaptation('omniglot')


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    for words, named in ((('omniglot', tmp_path / 'm.tflite'), '.onnx or .pt2'),
                         (('nobody', tmp_path / 'm.pt2'), 'nobody'),
                         (('omniglot', tmp_path / 'no/m.pt2'), 'no folder'),
                         (('omniglot', tmp_path / 'm.pt2', '--steps', '-1'), 'at least 0')):
        assert main(['export', *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert named in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore')
def test_both_files_say_the_same(tmp_path, drawings, capsys):
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    model = a_model(tmp_path, drawings)
    for suffix in ('onnx', 'pt2'): assert main(['export', model, str(tmp_path / f'm.{suffix}')]) == 0
    assert 'support (n, 1, 28, 28)' in capsys.readouterr().out
    session, run = runtime.InferenceSession(tmp_path / 'm.onnx'), torch.export.load(tmp_path / 'm.pt2').module()
    for way, shot in ((2, 1), (5, 3)):
        x, y, targets = task(drawings, way, shot)
        given = dict(zip(('support', 'labels', 'images', 'temperature'), (x, rows(y), targets, torch.tensor(1.5))))
        served = session.run(None, {k: t.numpy() for k, t in given.items()})[0]
        theirs = FewShotClassifier(model, temperature=1.5).fit(x, y).predict_proba(targets)
        for ours in (served, run(*given.values()).detach().numpy()): assert np.allclose(ours, theirs, atol=1e-4)
