"The charts of learned rates: their data, where the slider starts, what the player carries; the statistics; changed rates."
import html
import json
import re

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mamlpp_nb.maml import MetaParameters
from mamlpp_nb.rates import RateChart, draw_rates, mirrored, observations, rate_chart, rates_player, rates_slider, with_rates
from mamlpp_nb.reproduce import read_records

matplotlib.use('Agg')
names = ['conv0.weight', 'conv1.weight', 'conv2.weight', 'conv3.weight', 'head.weight', 'head.bias']


def record(seed, validation, steps=5):
    def table(e): return {**{k: [seed + e + i / 10 + s / 100 for s in range(steps)] for i, k in enumerate(names)}, 'conv0.bias': [.1]}
    return {'seed': seed, 'epochs': [{'epoch': e, 'validation': {'accuracy': [.2, v]}, 'step_sizes': table(e)} for e, v in enumerate(validation)]}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=6), min_size=1, max_size=4))
def test_a_chart_holds_what_the_records_hold(validation):
    chart = rate_chart([record(s, v) for s, v in enumerate(validation)], 'made')
    epochs = min(map(len, validation))
    assert chart.values.shape == (len(validation), epochs, 6, 5) and chart.seeds == list(range(len(validation))) and chart.names == names
    assert chart.best == [max(range(epochs), key=lambda e: (v[e], -e)) for v in validation] # of equals the earlier
    for s, best in enumerate(chart.best):
        assert np.allclose(chart.at_best()[s], [[s + best + i / 10 + k / 100 for k in range(5)] for i in range(6)])


def test_charts_of_the_committed_records():
    for table, found in ((t, read_records('nbs/results/tables', t)) for t in ('omniglot', 'omniglot-small', 'mini-imagenet', 'mini-imagenet-small')):
        for row, records in found.items():
            if 'mamlpp' not in row: continue
            chart = rate_chart(records, row)
            assert chart.values.shape == (len(records), len(records[0]['epochs']), 6, records[0]['config']['n_steps'])
            for r, best in zip(records, chart.best):
                assert r['epochs'][best]['validation']['accuracy'][-1] == max(e['validation']['accuracy'][-1] for e in r['epochs'])
                assert r['test']['models'][0] == f'best-epoch-{best:03d}' # the model that was tested


def test_records_without_rates_are_refused():
    with pytest.raises(ValueError, match='learned per layer'): rate_chart(read_records('nbs/results/tables', 'omniglot-small')['5w1s-maml'], 'MAML')
    with pytest.raises(ValueError, match='finished an epoch'): rate_chart([], 'none')


def chart(): return rate_chart([record(0, [.1, .9, .3]), record(2, [.5, .2, .4])], 'made')


def test_the_slider_starts_at_the_best_epoch_of_each_seed():
    drawn = draw_rates(chart())
    assert [t.get_text() for t in drawn.get_legend().get_texts()] == ['seed 0, epoch 2', 'seed 2, epoch 1']
    first = [line.get_ydata() for line in drawn.lines if len(line.get_ydata()) > 5]
    assert np.allclose(first[0][~np.isnan(first[0])], chart().values[0, 1].T.ravel()) and np.allclose(first[1][~np.isnan(first[1])], chart().values[1, 0].T.ravel())
    shorter = chart()._replace(title='two epochs', values=chart().values[:, :2])
    choice, slider, _ = rates_slider(chart(), shorter).children
    assert slider.value == -1 and [v for _, v in slider.options] == [-1, 0, 1, 2]
    slider.value = 2
    choice.value = 1 # the other chart has no third epoch
    assert slider.value == -1 and [v for _, v in slider.options] == [-1, 0, 1]
    with pytest.raises(ValueError, match='at least one'): rates_slider()


def carried(player): return json.loads(html.unescape(re.search('data-charts="([^"]*)"', player)[1]))


def test_the_player_carries_what_the_chart_holds():
    first, = carried(rates_player(chart()))
    assert (first['title'], first['seeds'], first['names']) == ('made', [0, 2], ['conv0', 'conv1', 'conv2', 'conv3', 'head', 'head.bias'])
    assert [f['name'] for f in first['frames']] == ['best', '1', '2', '3'] and [f['epochs'] for f in first['frames']] == [[2, 1], [1, 1], [2, 2], [3, 3]]
    assert np.allclose(first['frames'][0]['rates'], chart().at_best()) and np.allclose([f['rates'] for f in first['frames'][1:]], chart().values.swapaxes(0, 1))
    assert first['low'] < chart().values.min() and first['high'] > chart().values.max()


def test_a_long_run_is_thinned_a_flat_one_has_an_axis_and_a_title_is_only_text():
    long = chart()._replace(title='</script>"<b>&', values=np.full((2, 100, 6, 5), .1))
    first, second = carried(rates_player(long, chart(), most=4))
    assert [f['name'] for f in first['frames']] == ['best', '1', '51', '100'] and first['low'] < .1 < first['high']
    assert first['title'] == long.title and '</script>"' not in rates_player(long) and second['title'] == 'made'
    with pytest.raises(ValueError, match='at least one'): rates_player()


def made(*tables): return RateChart('made', list(range(len(tables))), names, np.stack(tables)[:, None], [0] * len(tables))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(.01, 100))
def test_verdicts_do_not_depend_on_the_unit_and_one_seed_can_refute(seed, unit):
    g = np.random.default_rng(seed)
    a, b = g.normal(size=(2, 6, 5))
    def verdicts(*tables): return [o['verdict'] for o in observations(*[made(*tables)] * 4)]
    for alone, scaled in zip(observations(*[made(a, b)] * 4), observations(*[made(unit * a, unit * b)] * 4)): assert np.allclose(alone['values'], scaled['values'], rtol=1e-6)
    for both, one, other in list(zip(verdicts(a, b), verdicts(a), verdicts(b)))[:5]: assert (both == 'confirmed') == (one == other == 'confirmed')
    assert verdicts(a)[10] == 'not tested' # a single seed has no mirror
    assert observations(None)[0] == {'number': 1, 'about': 'the last convolution learns fastest', 'values': [], 'verdict': 'not tested'}


def test_mirrors():
    a = np.random.default_rng(0).normal(size=(6, 5))
    (signs, sizes), = mirrored(made(a, -a))
    assert signs == pytest.approx(-1) and sizes == pytest.approx(1)


def test_changed_rates_change_nothing_else():
    meta = MetaParameters({'w': torch.ones(2)}, {'g': torch.ones(3, 2)}, {'w': torch.arange(3.).view(3, 1), 'v': torch.full((3, 1), .5), 'idle': torch.ones(1)})
    new = with_rates(meta, lambda t: t * torch.tensor([[2.], [0.]]))
    assert new.step_sizes['w'].flatten().tolist() == [0, 2, 4] and not new.step_sizes['v'].any() and new.step_sizes['idle'] is meta.step_sizes['idle']
    assert new.start is meta.start and new.per_step is meta.per_step and meta.step_sizes['w'].flatten().tolist() == [0, 1, 2]
    assert with_rates(meta, lambda t: t).step_sizes['w'].shape == (3, 1)
    with pytest.raises(ValueError, match='shape'): with_rates(meta, lambda t: t[:1])
    with pytest.raises(ValueError, match='no step size'): with_rates(meta._replace(step_sizes={'w': torch.ones(1)}), lambda t: t)
