"What a card says of a model is what comes out again."
import json

import numpy as np
import pytest
import torch

from mamlpp_nb.cards import Answers, ask, calibration_error, fit_temperature, grade_sizes, sizes_table
from mamlpp_nb.cli import main
from mamlpp_nb.maml import load_meta, save_meta
from mamlpp_nb.runs import models_folder, read_pretrained
from mamlpp_nb.tasks import find_omniglot, load_data

packaged = sorted(p.stem for p in models_folder.glob('*.safetensors'))


@pytest.mark.skipif(not find_omniglot(), reason='the card was made on Omniglot, which is not under the data root')
@pytest.mark.parametrize('model, way, shot', [('omniglot', 2, 1), ('omniglot', 5, 5), ('omniglot-20way', 2, 10)])
def test_a_row_of_the_card_comes_out_again(model, way, shot):
    test = load_data('omniglot')['test']
    row = sizes_table(grade_sizes(model, test, (way,), (shot,))).splitlines()[-1]
    card = (models_folder / f'{model}.md').read_text(encoding='utf-8')
    there = next(line for line in card.splitlines() if line.startswith(f'| {way} | {shot} |'))
    def numbers(line):
        return [float(w) for w in line.replace('|', ' ').replace('±', ' ').replace('→', ' ').split() if w != '-']
    assert np.allclose(numbers(row), numbers(there), atol=.3) # another processor rounds otherwise


@pytest.mark.parametrize('model', packaged)
def test_the_calibration_of_a_packaged_model_covers_what_its_card_grades(model):
    rows = read_pretrained(model).calibration
    ways = (2, 5, 10) if model == 'photos' else (2, 5, 10, 20) # mini-ImageNet has 16 validation classes
    assert {(r['way'], r['shot']) for r in rows} == {(w, s) for w in ways for s in (1, 5, 10)}
    for r in rows:
        bounds = [r['thresholds'][k] for k in sorted(r['thresholds'], key=float)]
        assert .1 < r['temperature'] < 100 and 0 < bounds[0] and bounds == sorted(bounds) and bounds[-1] <= 1


def test_strangers_are_of_a_class_that_was_not_taught(drawn):
    a, = ask('omniglot', drawn['test'], 3, 2, n_tasks=1, n_target=4)
    assert (a.outputs.shape == (12, 3) and a.strangers.shape == (4, 3)
            and sorted(a.truth.tolist()) == [0]*4 + [1]*4 + [2]*4)


def test_a_model_without_calibration_gets_grades_all_the_same(drawn, tmp_path):
    about = load_meta(models_folder / 'omniglot.safetensors')
    save_meta(tmp_path / 'plain.safetensors', about[0], {k: v for k, v in about[1].items() if k != 'calibration'})
    row, = grade_sizes(tmp_path / 'plain.safetensors', drawn['test'], (2,), (1,), n_tasks=4)
    assert set(row) == {'way', 'shot', 'n_tasks', 'accuracy', 'calibration_error'} and row['n_tasks'] == 10
    assert sizes_table([row]).splitlines()[-1].count('| - ') == 2


def test_calibration_error_and_temperature_by_hand():
    assert calibration_error(torch.ones(4), torch.ones(4).bool()) == 0
    assert abs(calibration_error(torch.full((4,), .9), torch.tensor([True, True, False, False])) - .4) < 1e-6
    outputs, truth = torch.tensor([[4., 0.], [4., 0.], [4., 0.], [4., 0.]]), torch.tensor([0, 0, 0, 1]) # three in four
    found = fit_temperature([Answers(outputs, truth, outputs[:0])])
    assert abs(found - 4/np.log(3)) < .05*found # softmax(4/T) = 3/4


def test_the_command_names_what_is_wrong(capsys, tmp_path):
    for words, named in ((['nothing'], 'no model'),
                         (['omniglot', '--ways', 'two'], 'ways must be whole numbers'),
                         (['omniglot', '--shots', '0'], 'shots must be'),
                         (['omniglot', '--tasks', '1'], 'tasks must be at least 2')):
        assert main(['card', *words]) == 2 and named in capsys.readouterr().err


@pytest.mark.skipif(not find_omniglot(),
                    reason='the packaged model is graded on Omniglot, which is not under the data root')
def test_the_command_prints_and_keeps_what_it_measured(capsys, tmp_path):
    assert main(['card', 'omniglot', '--ways', '2', '--shots', '1', '--tasks', '4',
                 '--record', str(tmp_path / 'r.json'), '--json']) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path / 'r.json').read_text())
    assert (json.loads(said.splitlines()[-1])['rows'] == kept['rows'] and kept['commit'] and kept['device']
            and sizes_table(kept['rows']) in said)
