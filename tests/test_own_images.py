"Own folders of images: every kind of file, splits, what is left out, and a run from folder to predictions."
import dataclasses
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mamlpp_nb.classifier import FewShotClassifier, read_pretrained
from mamlpp_nb.cli import _folder, main
from mamlpp_nb.tasks import image_folder, load_data
from mamlpp_nb.config import Config, configure, load_splits, presets, set_up
from mamlpp_nb.maml import MetaParameters, read_checkpoint
from mamlpp_nb.runs import Pretrained, begin_from, first_state, read_config, read_metrics, run_setup, run_splits
from mamlpp_nb.training import replay, train_run


def picture(c, i, mode='L', size=(20, 20)):
    "Image i of class c: a bar whose place is the class's, and noise of the image's."
    pixels = np.random.default_rng(100*c + i).integers(200, 256, size, dtype=np.uint8)
    pixels[c % size[0]] = 0
    return Image.fromarray(pixels).convert(mode)


def write(place, classes, images=4, suffix='png', **kw):
    for c in classes:
        (place / f'class{c:02d}').mkdir(parents=True, exist_ok=True)
        for i in range(images): picture(c, i, **kw).save(place / f'class{c:02d}' / f'{i}.{suffix}')
    return place


def as_zip(folder, path):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*.*')): z.write(p, Path(folder.name) / p.relative_to(folder))
    return path


def test_a_folder_and_a_zip_of_it_are_the_same_data(tmp_path, own_cache):
    folder = write(tmp_path / 'set', range(10))
    ours, zipped = image_folder(folder), image_folder(as_zip(folder, tmp_path / 'set.zip'))
    for s in ours: assert ours[s].names == zipped[s].names and torch.equal(ours[s].of_class(0), zipped[s].of_class(0))
    assert [len(d) for d in ours.values()] == [6, 2, 2]
    assert len({n for d in ours.values() for n in d.names}) == 10 # every class in one split


def test_whoever_has_split_is_believed(tmp_path, own_cache):
    for s, classes in (('train', range(5)), ('val', range(5, 8)), ('test', range(8, 10))):
        write(tmp_path / 'set' / s, classes)
    splits = image_folder(tmp_path / 'set', shares='1/1/98', seed=3)
    assert ({s: d.names for s, d in splits.items()}
            == {s: tuple(f'class{c:02d}' for c in classes)
                for s, classes in (('train', range(5)), ('val', range(5, 8)), ('test', range(8, 10)))})


def test_the_shuffle_belongs_to_the_seed_and_the_cut_to_the_shares(tmp_path, own_cache):
    folder = write(tmp_path / 'set', range(20), 1)
    assert (image_folder(folder, seed=1)['train'].names
            == image_folder(folder, seed=1)['train'].names != image_folder(folder, seed=2)['train'].names)
    assert [len(d) for d in image_folder(folder, shares='50/25/25').values()] == [10, 5, 5]
    for shares in ('50/50', 'a/b/c', '60/50/-10', '0/0/0'):
        with pytest.raises(ValueError, match='shares'): image_folder(folder, shares=shares)


@pytest.mark.parametrize('suffix, mode', [
    ('png', 'L'), ('png', '1'), ('png', 'P'), ('png', 'LA'), ('png', 'I;16'), ('jpg', 'L'), ('jpg', 'CMYK'),
    ('bmp', 'RGB'), ('gif', 'L'), ('tif', 'L'), ('webp', 'RGB'), ('png', 'RGBA'), ('pgm', 'L')])
def test_kinds_of_files(tmp_path, own_cache, suffix, mode):
    folder = tmp_path / 'set'
    for c in range(5):
        (folder / f'{c}').mkdir(parents=True)
        for i in range(2):
            image = picture(c, i)
            image = Image.fromarray(np.asarray(image).astype(np.uint16)*257) if mode == 'I;16' else image.convert(mode)
            image.save(folder / f'{c}' / f'{i}.{suffix}')
    d = image_folder(folder, size=20)['train']
    assert d.images.shape[1:] == (1, 20, 20) # grey, also where a file has three channels or a palette
    c = int(d.names[0])
    shown = d.of_class(0)[0].float().mean(0)
    assert shown[c].mean() < 40 and shown[c + 5].mean() > 180 # the bar is dark, the ground is light


def test_one_coloured_image_makes_all_of_them_colour(tmp_path, own_cache):
    folder = write(tmp_path / 'set', range(5), 2)
    assert image_folder(folder)['train'].images.shape[1:] == (1, 20, 20)
    Image.new('RGB', (9, 31), (255, 0, 0)).save(folder / 'class00' / 'red.png')
    splits = image_folder(folder)
    assert splits['train'].images.shape[1:] == (3, 20, 20)
    assert sum(int(d.count.sum()) for d in splits.values()) == 11 # ragged, and of another shape


@pytest.mark.parametrize('mode, side, chosen', [
    ('L', 32, 32), ('RGB', 32, 32), ('L', 28, 28), ('L', 105, 32), ('RGB', 200, 84), ('RGB', 50, 50), ('L', 9, 16)])
def test_the_pictures_choose_the_size_within_what_can_be_trained(tmp_path, own_cache, mode, side, chosen):
    folder = write(tmp_path / 'set', range(5), 2, mode=mode, size=(side, side))
    if mode == 'RGB': Image.new('RGB', (side, side), (255, 0, 0)).save(folder / 'class00' / '0.png')
    picture(0, 2, size=(300, 10)).save(folder / 'class00' / 'odd.png') # one of another shape changes nothing
    splits = image_folder(folder)
    assert splits['train'].images.shape[2:] == (chosen, chosen)
    assert any(f'sides of {min(10, side)} to 300 pixels: read at {chosen}x{chosen}' in line
               for line in splits['train'].notes)
    assert image_folder(folder, size=24)['train'].images.shape[2:] == (24, 24) # whoever says a size gets it


def test_files_that_cannot_be_read_are_named_also_the_second_time(tmp_path, own_cache):
    folder = write(tmp_path / 'set', range(6), 3)
    (folder / 'class01' / 'bad.png').write_bytes(b'not a picture')
    (folder / 'class02' / 'half.png').write_bytes((folder / 'class02' / '0.png').read_bytes()[:60])
    (folder / 'notes.txt').write_text('nothing')
    for _ in range(2):
        splits = image_folder(folder)
        assert sum(int(d.count.sum()) for d in splits.values()) == 18
        said = '\n'.join(splits['train'].refused)
        assert 'bad.png' in said and 'half.png' in said


def test_classes_that_are_too_small_are_named_and_too_few_refused(tmp_path, own_cache):
    folder = write(tmp_path / 'set', range(20), 4)
    write(tmp_path / 'set', [20], 2)
    config, said = Config(data=str(folder), n_way=3, n_target=3, test_targets=3), []
    splits = load_splits(config, said.append)
    assert sum(map(len, splits.values())) == 20 and any('class20 (2)' in line for line in said)
    with pytest.raises(ValueError, match='5-way tasks need at least 5 classes'):
        load_splits(Config(data=str(folder), n_way=5, n_target=3, test_targets=3), said.append)
    with pytest.raises(ValueError, match='0 in train'):
        load_splits(Config(data=str(folder), n_way=3, n_target=9, test_targets=9), said.append)


def empty(folder): folder.mkdir(parents=True)


def loose(folder):
    folder.mkdir(parents=True)
    picture(0, 0).save(folder / '0.png')


def partly(folder):
    write(folder / 'train', range(5))
    write(folder / 'other', range(2))


def leaking(folder):
    for split, classes in (('train', range(5)), ('val', range(5, 8)), ('test', range(4, 8))):
        write(folder / split, classes)


def broken(folder):
    for c in range(5):
        (folder / f'{c}').mkdir(parents=True)
        (folder / f'{c}' / '0.png').write_bytes(b'x')


def a_text(folder):
    folder.parent.mkdir(exist_ok=True, parents=True)
    folder.write_text('images')


@pytest.mark.parametrize('make, named', [
    (empty, 'no images'),
    (loose, 'no images|for each class'),
    (partly, 'not all of train, val and test'),
    (leaking, 'more than one of train, val and test'),
    (broken, 'none|no image|cannot'),
    (a_text, 'neither a folder nor a zip')])
def test_what_is_no_data_is_refused_and_leaves_no_cache(tmp_path, own_cache, make, named):
    make(tmp_path / 'set')
    with pytest.raises(ValueError, match=named): image_folder(tmp_path / 'set')
    # leaking classes are read before they are compared
    if make is not leaking: assert not [p for p in own_cache.rglob('*') if p.is_file() and p.suffix != '.lock']
    assert not list(own_cache.rglob('*.part*'))
    with pytest.raises(ValueError, match='folder of images'): load_data(str(tmp_path / 'nowhere'))


small = dict(filters=8, n_tasks=2, epochs=1, iterations=3, multi_step_epochs=1, n_target=2, test_targets=2,
             validation_tasks=4, test_tasks=4)


def test_from_a_folder_to_predictions_by_command(tmp_path, own_cache, capsys):
    folder = write(tmp_path / 'signs', range(25), 4)
    words = ['train', '--data', str(folder), '--out', str(tmp_path / 'run'), '--device', 'cpu',
             *(w for k, v in small.items() for w in (f'--{k}', str(v)))]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert '25 classes, 100 grey images, 20x20 pixels' in said and 'a minute on this machine' in said
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())['config']
    assert config['shared_head'] and config['data'] == str(folder) and not config['rotate']
    # complete: nothing is trained again
    assert main(words) == 0 and 'going on after outer step 3 of 3' in capsys.readouterr().out
    assert main(['adapt', str(tmp_path / 'run'), str(folder), '--format', 'json']) in (0, None)
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 100 and set(rows[0]['probabilities']) == {p.name for p in folder.iterdir()}


def test_a_preset_or_a_folder_is_asked_for(capsys):
    assert main(['train']) == 2 and '--data with a folder of your own images' in ''.join(capsys.readouterr())
    assert (main(['train', '--data', '/nowhere/at/all']) == 2
            and "no data set '/nowhere/at/all'" in ''.join(capsys.readouterr()))


@pytest.mark.parametrize('method', ['maml', 'mamlpp', 'meta-sgd'])
def test_rows_of_a_shared_head_stay_one(tmp_path, method):
    config = Config(data='glyphs', method=method, shared_head=True, n_way=4, **{**small, 'iterations': 4})
    train_run(config, tmp_path / 'run', say=lambda text: None)
    model = FewShotClassifier.from_pretrained(str(tmp_path / 'run'))
    head, rates = read_pretrained(model.model).meta.start, read_pretrained(model.model).meta.step_sizes
    for k in ('head.weight', 'head.bias'):
        assert torch.equal(head[k], head[k][:1].expand_as(head[k]))
        if method == 'meta-sgd': assert torch.equal(rates[k], rates[k].narrow(1, 0, 1).expand_as(rates[k]))
    untrained = first_state(config, set_up(config, load_data('glyphs'))).model.start['head.weight']
    assert not torch.equal(untrained, head['head.weight']) # it did learn


# --- a folder that changes under a run

few_words = ('--epochs 2 --iterations 2 --validation_tasks 3 --test_tasks 3 --filters 4 --n_tasks 1 --n_steps 2 '
             '--n_way 2 --n_target 1 --test_targets 1 --keep 1 --device cpu').split()


@pytest.fixture
def begun(tmp_path, own_cache, capsys):
    "A run on a folder of 15 classes, stopped after its first outer step."
    folder = write(tmp_path / 'set', range(1, 16))
    assert main(['train', '--data', str(folder), '--out', str(tmp_path / 'run'), *few_words, '--minutes', '1e-9']) == 3
    capsys.readouterr()
    return folder, tmp_path / 'run'


def split_of(run): return {s: sorted(c) for s, c in json.loads((run / 'split.json').read_text()).items()}


def test_a_class_that_came_after_the_run_began_is_left_out_and_said(begun, capsys):
    folder, run = begun
    before = split_of(run)
    write(folder, [0])
    write(folder, [40])
    assert main(['train', '--data', str(folder), '--out', str(run), *few_words]) == 0
    said = capsys.readouterr().out
    assert '2 classes that came after the run began are left out: class00, class40' in said and split_of(run) == before
    assert sorted(before['train'] + before['val'] + before['test']) == [f'class{c:02d}' for c in range(1, 16)]
    from mamlpp_nb.runs import read_config, run_splits
    now = run_splits(run, read_config(run)[0], lambda text: None)
    assert {s: sorted(d.names) for s, d in now.items()} == before


def test_a_run_keeps_the_size_of_its_pictures_when_larger_ones_come(begun, capsys):
    folder, run = begun
    write(folder, range(20, 25), 20, size=(60, 60))
    assert image_folder(folder)['train'].images.shape[2:] == (32, 32)
    assert main(['train', '--data', str(folder), '--out', str(run), *few_words]) == 0
    assert '20x20 pixels' in capsys.readouterr().out and read_pretrained(run).size == 20


def test_presets_of_own_images_take_minutes_and_the_paper_is_asked_for(tmp_path):
    for name in ('grey-images-5w1s', 'grey-images-5w5s', 'colour-images-5w1s', 'colour-images-5w5s'):
        short, long = presets[name], presets[f'{name}-paper']
        assert short.epochs*short.iterations == 1000 and long.epochs*long.iterations >= 50_000
        assert long.filters > short.filters and short.shared_head and long.shared_head and not long.rotate
    a, b = (_folder(name, configure(name, data=str(tmp_path / 'set')))
            for name in ('grey-images-5w1s', 'grey-images-5w1s-paper'))
    assert a.name == 'set-5w1s-mamlpp-seed0' and b.name == 'set-5w1s-paper-mamlpp-seed0'


def test_a_class_that_is_gone_is_an_error_and_a_changed_one_is_said(begun, capsys):
    folder, run = begun
    picture(3, 99).save(folder / 'class03' / 'more.png')
    assert main(['evaluate', str(run), '--tasks', '3', '--device', 'cpu']) == 0
    assert 'images of 1 classes have changed since the run began: class03' in capsys.readouterr().out
    for p in (folder / 'class05').iterdir(): p.unlink()
    (folder / 'class05').rmdir()
    assert main(['train', '--data', str(folder), '--out', str(run), *few_words]) == 2
    assert "'class05' among them" in capsys.readouterr().err


def test_a_folder_that_has_moved_is_named_with_data(begun, capsys):
    folder, run = begun
    moved = folder.rename(folder.with_name('elsewhere'))
    assert main(['evaluate', str(run), '--tasks', '3', '--device', 'cpu']) == 2
    assert f'were in {folder}, where there is nothing now' in capsys.readouterr().err
    assert main(['evaluate', str(run), '--tasks', '3', '--data', str(moved), '--device', 'cpu']) == 0
    assert main(['replay', str(run), '--iteration', '0', '--data', str(moved)]) == 0
    assert main(['train', '--data', str(moved), '--out', str(run), *few_words]) == 0
    assert 'going on after outer step 1' in capsys.readouterr().out


# --- beginning from a model

def own_run(folder, out, *words): return main(['train', '--data', str(folder), '--out', str(out), *few_words, *words])


def same_bits(a, b):
    a, b = (read_checkpoint(run / 'last.safetensors')[0] for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def school(tmp_path, own_cache, capsys):
    "A finished run on other pictures of the same kind, and a folder of own classes."
    other, folder = write(tmp_path / 'other', range(30, 45)), write(tmp_path / 'set', range(1, 16))
    assert own_run(other, tmp_path / 'school') == 0
    capsys.readouterr()
    return tmp_path / 'school', folder


def test_a_run_begins_from_another_and_says_so(school, tmp_path, capsys):
    model, folder = school
    assert own_run(folder, tmp_path / 'run', '--from', str(model)) == 0
    assert f'beginning from {model}' in capsys.readouterr().out
    kept = json.loads((tmp_path / 'run/config.json').read_text())
    assert kept['config']['start_from'] == str(model) and len(kept['starts'][0]['start_from']) == 16
    config, splits = Config(**kept['config']), run_splits(tmp_path / 'run', Config(**kept['config']), lambda text: None)
    begun, learned = run_setup(tmp_path / 'run', config, splits).meta, read_pretrained(model).meta
    for k, t in begun.named().items():
        assert torch.equal(t, learned.named()[k]) # the head, too: both have one shared row
    assert not torch.equal(first_state(config, set_up(config, splits)).meta.start['conv0.weight'],
                           begun.start['conv0.weight'])
    repeated = replay(tmp_path / 'run', 0, say=lambda text: None)
    assert repeated['loss'] == repeated['recorded'] # the first step was taken from there
    assert not same_bits(model, tmp_path / 'run')


def test_a_run_that_began_from_a_model_stops_and_goes_on_without_it(school, tmp_path, capsys):
    model, folder = school
    assert own_run(folder, tmp_path / 'whole', '--from', str(model)) == 0
    for _ in range(2): assert own_run(folder, tmp_path / 'run', '--from', str(model), '--minutes', '1e-9') == 3
    config = read_config(tmp_path / 'run')[0]
    shutil.rmtree(model) # the run has its own copy
    assert own_run(folder, tmp_path / 'run', '--from', str(model)) == 0
    assert same_bits(tmp_path / 'whole', tmp_path / 'run')
    assert (replay(tmp_path / 'run', 1, say=lambda text: None)['loss']
            == read_metrics(tmp_path / 'whole')[0]['losses'][1])
    assert len({start['start_from'] for start in read_config(tmp_path / 'run')[1]}) == 1
    with pytest.raises(ValueError, match='start_from'):
        train_run(dataclasses.replace(config, start_from=''), tmp_path / 'run', say=lambda text: None)


def test_the_network_of_the_packaged_model_comes_along(tmp_path, own_cache, capsys):
    folder, words = write(tmp_path / 'set', range(1, 16)), few_words.copy()
    i = words.index('--filters')
    del words[i:i+2]
    words[words.index('--n_steps') + 1] = '5'
    assert main(['train', '--data', str(folder), '--out', str(tmp_path / 'run'), '--from', 'omniglot', *words]) == 0
    config = read_config(tmp_path / 'run')[0]
    assert ((config.start_from, config.filters, config.image_size, config.n_way, config.shared_head)
            == ('omniglot', 32, 28, 2, True))
    assert read_pretrained(tmp_path / 'run').size == 28 and '28x28 pixels' in capsys.readouterr().out
    # what is learned already is soon lost at the rate of a beginning
    assert config.outer_lr < configure('grey-images-5w1s').outer_lr
    assert main(['train', '--data', str(folder), '--out', str(tmp_path / 'faster'), '--from', 'omniglot',
                 '--outer_lr', '.002', *words]) == 0
    assert read_config(tmp_path / 'faster')[0].outer_lr == .002


@pytest.mark.parametrize('words, named', [
    (['--filters', '8'], 'filters 4 there, 8 asked for'),
    (['--image_size', '28'], '20x20 grey images there, 28x28 grey images here'),
    (['--n_steps', '3'], 'n_steps 2 there, 3 asked for'),
    (['--method', 'maml'], "method 'mamlpp' there, 'maml' asked for"),
    (['--strided', 'true'], 'strided False there'),
    (['--inner_lr', '.1'], 'not both')])
def test_a_model_that_does_not_fit_is_refused_with_what_differs_and_nothing_is_written(
        school, tmp_path, capsys, words, named):
    model, folder = school
    assert own_run(folder, tmp_path / 'run', '--from', str(model), *words) == 2
    assert named in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_grey_model_refuses_colours_and_a_model_that_is_not_there_is_named(school, tmp_path, capsys):
    model, folder = school
    Image.new('RGB', (20, 20), (255, 0, 0)).save(folder / 'class01' / 'red.png')
    assert own_run(folder, tmp_path / 'run', '--from', str(model)) == 2
    assert '20x20 grey images there, 20x20 colour images here' in capsys.readouterr().err
    assert own_run(folder, tmp_path / 'run', '--from', str(tmp_path / 'nowhere')) == 2
    assert 'nor one of omniglot' in capsys.readouterr().err and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('method', ['mamlpp', 'meta-sgd'])
def test_rows_of_the_head_are_taken_where_the_ways_agree_and_else_their_mean(method):
    config = Config(data='glyphs', method=method, **{**small, 'n_way': 4})
    setup = set_up(config, load_data('glyphs'))
    tables = {g: {k: torch.rand_like(t) for k, t in table.items()} for g, table in setup.meta._asdict().items()}
    model = Pretrained(MetaParameters(**tables), setup.net, config, 1, 28)
    rows, rates = tables['start']['head.weight'], tables['step_sizes']['head.weight']
    alike, more, shared = (
        begin_from(set_up(c, load_data('glyphs')), c, model).meta
        for c in (config, dataclasses.replace(config, n_way=6), dataclasses.replace(config, shared_head=True)))
    assert torch.equal(alike.start['head.weight'], rows) and alike.start['head.weight'] is not rows
    for meta, way in ((more, 6), (shared, 4)):
        assert (torch.allclose(meta.start['head.weight'], rows.mean(0).expand(way, -1))
                and meta.start['head.weight'].requires_grad)
        if method == 'meta-sgd':
            assert torch.allclose(meta.step_sizes['head.weight'], rates.mean(1, keepdim=True).expand(-1, way, -1))
        assert torch.equal(meta.start['conv1.weight'], tables['start']['conv1.weight'])
