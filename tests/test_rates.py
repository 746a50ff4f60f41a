"""The charts of learned rates: their data, where the slider starts, what the player carries; the statistics;
changed rates."""
import html
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mamlpp_nb.maml import MetaParameters
from mamlpp_nb.rates import (RateChart, dealt_anew, draw_rates, observations, rate_chart, rates_player, rates_slider,
                             source_observations, with_rates)
from mamlpp_nb.reproduce import read_records

matplotlib.use('Agg')
names = ['conv0.weight', 'conv1.weight', 'conv2.weight', 'conv3.weight', 'head.weight', 'head.bias']


def record(seed, validation, steps=5):
    def table(e):
        return {**{k: [seed + e + i / 10 + s / 100 for s in range(steps)] for i, k in enumerate(names)},
                'conv0.bias': [.1]}
    return {'seed': seed, 'config': {'inner_lr': .1},
            'epochs': [{'epoch': e, 'validation': {'accuracy': [.2, v]}, 'step_sizes': table(e)}
                       for e, v in enumerate(validation)]}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=6), min_size=1, max_size=4))
def test_a_chart_holds_what_the_records_hold(validation):
    chart = rate_chart([record(s, v) for s, v in enumerate(validation)], 'made')
    epochs = min(map(len, validation))
    assert (chart.values.shape == (len(validation), epochs, 6, 5)
            and chart.seeds == list(range(len(validation))) and chart.names == names)
    assert chart.best == [max(range(epochs), key=lambda e: (v[e], -e)) for v in validation] # of equals the earlier
    for s, best in enumerate(chart.best):
        assert np.allclose(chart.at_best()[s], [[s + best + i / 10 + k / 100 for k in range(5)] for i in range(6)])


def test_charts_of_the_committed_records():
    for table, found in ((t, read_records('nbs/results/tables', t))
                         for t in ('omniglot', 'omniglot-small', 'mini-imagenet', 'mini-imagenet-small')):
        for row, records in found.items():
            if 'mamlpp' not in row: continue
            chart = rate_chart(records, row)
            assert chart.values.shape == (len(records), len(records[0]['epochs']), 6, records[0]['config']['n_steps'])
            for r, best in zip(records, chart.best):
                assert (r['epochs'][best]['validation']['accuracy'][-1]
                        == max(e['validation']['accuracy'][-1] for e in r['epochs']))
                assert r['test']['models'][0] == f'best-epoch-{best:03d}' # the model that was tested


def test_records_without_rates_are_refused():
    with pytest.raises(ValueError, match='learned per layer'):
        rate_chart(read_records('nbs/results/tables', 'omniglot-small')['5w1s-maml'], 'MAML')
    with pytest.raises(ValueError, match='finished an epoch'): rate_chart([], 'none')


def chart(): return rate_chart([record(0, [.1, .9, .3]), record(2, [.5, .2, .4])], 'made')


def test_the_slider_starts_at_the_best_epoch_of_each_seed():
    drawn = draw_rates(chart())
    assert [t.get_text() for t in drawn.get_legend().get_texts()] == ['seed 0, epoch 2', 'seed 2, epoch 1']
    first = [line.get_ydata() for line in drawn.lines if len(line.get_ydata()) > 5]
    assert (np.allclose(first[0][~np.isnan(first[0])], chart().values[0, 1].T.ravel())
            and np.allclose(first[1][~np.isnan(first[1])], chart().values[1, 0].T.ravel()))
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
    assert (first['title'], first['seeds'], first['names']) == (
        'made', [0, 2], ['conv0', 'conv1', 'conv2', 'conv3', 'head', 'head.bias'])
    assert ([f['name'] for f in first['frames']] == ['best', '1', '2', '3']
            and [f['epochs'] for f in first['frames']] == [[2, 1], [1, 1], [2, 2], [3, 3]])
    assert (np.allclose(first['frames'][0]['rates'], chart().at_best())
            and np.allclose([f['rates'] for f in first['frames'][1:]], chart().values.swapaxes(0, 1)))
    assert first['low'] < chart().values.min() and first['high'] > chart().values.max()


def test_a_long_run_is_thinned_a_flat_one_has_an_axis_and_a_title_is_only_text():
    long = chart()._replace(title='</script>"<b>&', values=np.full((2, 100, 6, 5), .1))
    first, second = carried(rates_player(long, chart(), most=4))
    assert [f['name'] for f in first['frames']] == ['best', '1', '51', '100'] and first['low'] < .1 < first['high']
    assert first['title'] == long.title and '</script>"' not in rates_player(long) and second['title'] == 'made'
    with pytest.raises(ValueError, match='at least one'): rates_player()


places = ('Omniglot, one shot', 'Omniglot, five shots', 'mini-ImageNet, one shot', 'mini-ImageNet, five shots')


def made(*tables, start=1.):
    return RateChart('made', list(range(len(tables))), names, np.stack(tables)[:, None], [0] * len(tables), start)


def everywhere(*tables, **more): return observations(dict.fromkeys(places, made(*tables, **more)), n=50)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(.01, 100))
def test_numbers_are_in_units_of_the_start(seed, unit):
    tables = np.random.default_rng(seed).normal(size=(3, 6, 5))
    for alone, scaled in zip(everywhere(*tables), everywhere(*unit * tables, start=unit)):
        assert np.allclose(alone['values'], scaled['values'], rtol=1e-6) and alone['verdict'] == scaled['verdict']


def test_rates_that_never_moved_say_nothing():
    "A value that a rate began with is no observation, however well it fits a sentence"
    with np.errstate(invalid='ignore'):
        assert not [o['about'] for o in everywhere(*[np.full((6, 5), .01)] * 3, start=.01)
                    if o['verdict'] in ('in direction', 'as said')]


def test_random_rates_seldom_confirm_a_sentence():
    g = np.random.default_rng(0)
    said = [o['verdict'] for _ in range(20)
            for o in observations({name: made(*g.normal(size=(3, 6, 5)) + .5) for name in places}, n=200)
            if o['chance']]
    assert sum(v in ('as said', 'in direction') for v in said) < .1 * len(said)


def test_a_single_seed_says_nothing_and_what_is_missing_is_not_tested():
    g = np.random.default_rng(0)
    assert {o['verdict'] for o in everywhere(g.normal(size=(6, 5)))} == {'not shown'} # it has no interval
    assert ({o['verdict'] for o in observations({})} == {'not tested'}
            and len(observations({})) == len(source_observations))


def test_each_sentence_has_its_charts():
    assert {name for o in source_observations for name in o.charts} == set(places)
    assert all(o.rule in ('above', 'below') and o.part in ('conv', 'weight', 'all') for o in source_observations)
    about_mirrors, = (o for o in source_observations if 'mirror' in o.about)
    assert about_mirrors.charts == ('mini-ImageNet, one shot',) # of which the source says it


def test_mirrors():
    a = np.random.default_rng(0).normal(size=(6, 5))
    asked = [o for o in source_observations if 'mirror' in o.about or 'magnitudes are alike' in o.about]
    signs, sizes = observations({places[2]: made(a, -a)}, asked)
    assert signs['values'] == pytest.approx([-1]) and sizes['values'] == pytest.approx([1])


def test_dealt_anew_keeps_each_seeds_rates():
    tables = np.random.default_rng(0).normal(size=(3, 6, 5))
    dealt, = dealt_anew([tables], 7)
    assert dealt.shape == (7, 3, 6, 5) and not np.allclose(dealt[0], dealt[1])
    assert np.allclose(np.sort(dealt.reshape(7, 3, -1)), np.sort(tables.reshape(3, -1)))


def test_changed_rates_change_nothing_else():
    meta = MetaParameters({'w': torch.ones(2)}, {'g': torch.ones(3, 2)},
                          {'w': torch.arange(3.).view(3, 1), 'v': torch.full((3, 1), .5), 'idle': torch.ones(1)})
    new = with_rates(meta, lambda t: t * torch.tensor([[2.], [0.]]))
    assert (new.step_sizes['w'].flatten().tolist() == [0, 2, 4] and not new.step_sizes['v'].any()
            and new.step_sizes['idle'] is meta.step_sizes['idle'])
    assert (new.start is meta.start and new.per_step is meta.per_step
            and meta.step_sizes['w'].flatten().tolist() == [0, 1, 2])
    assert with_rates(meta, lambda t: t).step_sizes['w'].shape == (3, 1)
    with pytest.raises(ValueError, match='shape'): with_rates(meta, lambda t: t[:1])
    with pytest.raises(ValueError, match='no step size'):
        with_rates(meta._replace(step_sizes={'w': torch.ones(1)}), lambda t: t)


def test_the_players_script_ships_with_the_package():
    root = Path(__file__).parent.parent
    assert (root / 'mamlpp_nb/rates_player.js').read_text() in rates_player(chart())
    assert 'mamlpp_nb/*.js' in (root / 'MANIFEST.in').read_text() and "'*.js'" in (root / 'setup.py').read_text()
    assert '</script' not in (root / 'mamlpp_nb/rates_player.js').read_text() # it would end the script that holds it
