"Where images come from, and what happens when they are missing, broken or strange."
import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mamlpp_nb import tasks
from mamlpp_nb.files import data_root
from mamlpp_nb.pictures import list_images
from mamlpp_nb.tasks import cached, characters, glyphs, omniglot, read_classes


def png(seed, size=(105, 105)):
    pixels = np.random.default_rng(seed).random((size[1], size[0])) > .1
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).convert('1').save(buffer, 'png')
    return buffer.getvalue()


drawings = [png(i) for i in range(9)]


def small_omniglot(root, zipped, per_class=1):
    "Omniglot's tree with all its 1,623 classes but few drawings."
    for half, n in (('images_background', 964), ('images_evaluation', 659)):
        files = {f'{half}/Alphabet_{half[7]}/character{c:04d}/{c:04d}_{d:02d}.png': drawings[(c + d) % 9]
                 for c in range(n) for d in range(per_class)}
        root.mkdir(parents=True, exist_ok=True)
        if zipped:
            with zipfile.ZipFile(root / f'{half}.zip', 'w') as z:
                for name, content in files.items(): z.writestr(name, content)
                z.writestr(f'__MACOSX/{half}/._junk.png', b'not an image')
        else:
            for name, content in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            (root / half / '.DS_Store').write_bytes(b'junk')


@pytest.mark.parametrize('layout', ['.', 'omniglot', 'omniglot-py'])
def test_omniglot_is_found_zipped(tmp_path, own_cache, layout):
    small_omniglot(tmp_path / layout, zipped=True)
    splits = omniglot(tmp_path)
    assert [len(d) for d in splits.values()] == [1150, 50, 423]
    assert splits['train'].images.shape == (1623, 1, 28, 28) and splits['train'].images.unique().tolist() == [0, 255]


def test_folders_and_zips_give_the_same_pixels_and_the_second_time_comes_from_the_cache(
        tmp_path, own_cache, monkeypatch):
    small_omniglot(tmp_path / 'a/omniglot', zipped=True)
    small_omniglot(tmp_path / 'b/omniglot', zipped=False)
    a, b = omniglot(tmp_path / 'a'), omniglot(tmp_path / 'b')
    assert torch.equal(a['test'].images, b['test'].images) and a['test'].names == b['test'].names
    monkeypatch.setattr(tasks, 'read_images', lambda *_: pytest.fail('decoded again'))
    assert torch.equal(omniglot(tmp_path / 'a')['test'].images, a['test'].images)


def test_a_changed_source_is_decoded_again(tmp_path, own_cache):
    small_omniglot(tmp_path / 'omniglot', zipped=False)
    before = omniglot(tmp_path)['train'].images.clone()
    next((tmp_path / 'omniglot').rglob('*.png')).write_bytes(png(12345))
    assert not torch.equal(omniglot(tmp_path)['train'].images, before)


def test_a_damaged_cache_is_noticed_and_made_again(tmp_path, own_cache):
    small_omniglot(tmp_path / 'omniglot', zipped=True)
    good = omniglot(tmp_path)['train'].images.clone()
    kept, = own_cache.glob('*.safetensors')
    kept.write_bytes(kept.read_bytes()[:5000])
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(omniglot(tmp_path)['train'].images, good)
    assert torch.equal(omniglot(tmp_path)['train'].images, good)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / 'cache').write_text('a file where the folder should be')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'x').write_text('')
    one = tasks.ClassImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [1], ['a'])
    with pytest.warns(UserWarning, match='could not keep'):
        assert len(cached('few', [tmp_path / 'x'], lambda: one)) == 1


def test_missing_omniglot_names_both_ways_out(tmp_path, own_cache, monkeypatch):
    import torchvision
    def no_network(*a, **k): raise OSError('no network')
    monkeypatch.setattr(torchvision.datasets, 'Omniglot', no_network)
    with pytest.raises(FileNotFoundError) as e: omniglot(tmp_path)
    for word in (str(tmp_path), 'images_background.zip', 'MAMLPP_DATA', 'network'): assert word in str(e.value)


def test_a_download_is_used(tmp_path, own_cache, monkeypatch):
    import torchvision
    def download(root, background, download): small_omniglot(tmp_path / 'omniglot-py', zipped=True)
    monkeypatch.setattr(torchvision.datasets, 'Omniglot', download)
    assert len(omniglot(tmp_path)['test']) == 423


def test_half_an_omniglot_is_refused(tmp_path, own_cache):
    for half in ('images_background', 'images_evaluation'):
        folder = tmp_path / half / 'Greek/character01'
        folder.mkdir(parents=True)
        (folder / f'{half}.png').write_bytes(drawings[0])
    with pytest.raises(ValueError, match='1 character classes.*1623'): omniglot(tmp_path)


@pytest.mark.parametrize('content', [b'', b'no image at all', drawings[0][:200], drawings[0][:-40]],
                         ids=['empty', 'text', 'cut', 'cut late'])
@pytest.mark.parametrize('zipped', [False, True])
def test_an_unreadable_image_is_named(tmp_path, content, zipped):
    source = tmp_path / 'data'
    for c in 'ab':
        (source / c).mkdir(parents=True)
        (source / c / '1.png').write_bytes(drawings[0])
    (source / 'b/2.png').write_bytes(content)
    if zipped:
        with zipfile.ZipFile(tmp_path / 'data.zip', 'w') as z:
            for f in source.rglob('*.png'): z.write(f, f.relative_to(tmp_path))
        source = tmp_path / 'data.zip'
    with pytest.raises(ValueError, match=r'cannot read the image .*b/2\.png'): read_classes(list_images(source))


def test_images_of_different_sizes_are_named_and_can_be_resized(tmp_path):
    for c, size in (('a', (20, 20)), ('b', (30, 20))):
        (tmp_path / c).mkdir()
        (tmp_path / c / 'x.png').write_bytes(png(1, size))
    with pytest.raises(ValueError, match=r'a/x\.png is 20x20.*b/x\.png is 30x20'): read_classes(list_images(tmp_path))
    assert read_classes(list_images(tmp_path), size=16, mode='RGB').images.shape == (2, 3, 16, 16)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no images found'): read_classes(list_images(tmp_path))


def test_glyphs_are_a_function_of_the_seed(drawn):
    assert torch.equal(glyphs()['val'].images, drawn['val'].images)
    other = glyphs(seed=1, n_drawings=3, size=40)
    assert other['val'].images.shape == (1623 * 3, 1, 40, 40) and (other['val'].count == 3).all()
    assert not torch.equal(glyphs(seed=1)['val'].images, drawn['val'].images)


def test_glyphs_differ_within_and_between_classes(drawn):
    ink = 1 - drawn['test'].images / 255
    assert (ink.flatten(1).sum(1) > 3).all()                        # nobody drew nothing
    where = torch.nn.functional.avg_pool2d(ink, 4).view(1623, 20, -1) # roughly: strokes are thin
    within = (where[:, :10] - where[:, 10:]).norm(dim=2).mean()
    between = (where[:-1, :10] - where[1:, :10]).norm(dim=2).mean()
    assert 0 < within < .8 * between


def test_an_unknown_data_set_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'omniglot', 'glyphs'"): characters('imagenet')


def test_the_data_root_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv('MAMLPP_DATA', str(tmp_path))
    assert data_root() == tmp_path and characters()[0] == 'glyphs'


def photo(seed, size=(84, 84)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        buffer, 'jpeg')
    return buffer.getvalue()


def in_layout(layout, root, n_classes, n_images=2):
    "Photographs as somebody may have them; class c of a split, image i is photo(10c + i)."
    root.mkdir()
    for split, n in n_classes.items():
        lines = ['filename,label']
        for c in range(n):
            for i in range(n_images):
                content, name = photo(10*c + i), f'{split}/n{split}{c}/{i}.jpg'
                if layout.startswith('tables'):
                    name = f'n{split}{c}{i:08d}.jpg'
                    lines.append(f'{name},n{split}{c}')
                if layout == 'folders': path = root / name
                if layout in ('tables, a folder', 'tables, nested'):
                    path = root / 'images' / ('' if 'folder' in layout else f'n{split}{c}') / name
                if layout in ('folders', 'tables, a folder', 'tables, nested'):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                else:
                    archive = root / ('images.zip' if layout.startswith('tables')
                                      else f'{split}_{c % 2}.zip' if layout.startswith('several') else f'{split}.zip')
                    with zipfile.ZipFile(archive, 'a') as z: z.writestr(name, content)
        if layout.startswith('tables'):
            path = root / ('ravi' if 'nested' in layout else '.') / f'{split}.csv'
            path.parent.mkdir(exist_ok=True)
            path.write_text('\n'.join(lines))


@pytest.mark.parametrize('layout', ['folders', 'a zip per split', 'several zips of a split',
                                    'tables, a folder', 'tables, nested', 'tables, a zip'])
def test_mini_imagenet_in_the_layouts_people_have(layout, tmp_path, own_cache):
    n_classes = {'train': 4, 'val': 2, 'test': 3}
    in_layout(layout, tmp_path / 'mini_imagenet', n_classes)
    for _ in range(2): # decoded, then from the cache
        splits = tasks.mini_imagenet(tmp_path)
        assert ({s: len(d) for s, d in splits.items()} == n_classes
                and {s: d.split for s, d in splits.items()} == {s: s for s in n_classes})
        assert (splits['train'].names == ('ntrain0', 'ntrain1', 'ntrain2', 'ntrain3')
                and splits['test'].images.shape == (6, 3, 84, 84))
        expected = np.asarray(Image.open(io.BytesIO(photo(11)))).transpose(2, 0, 1)
        assert (splits['train'].of_class(1)[1].numpy() == expected).all()
    assert len(list(own_cache.glob('mini-imagenet-*.safetensors'))) == 3


def test_tables_of_mini_imagenet_that_do_not_fit(tmp_path, own_cache):
    root = tmp_path / 'mini_imagenet'
    in_layout('tables, a folder', root, {'train': 2, 'val': 2, 'test': 2})
    (root / 'images/nval100000001.jpg').unlink()
    with pytest.raises(ValueError, match='1 of the 4 images .*val.csv names .* nval100000001.jpg'):
        tasks.mini_imagenet(tmp_path)
    (root / 'val.csv').write_text('file,class\na,b\n')
    with pytest.raises(ValueError, match='columns filename and label'): tasks.mini_imagenet(tmp_path)
    assert not list(own_cache.glob('*val*')) # nothing half made is kept


def test_a_changed_image_is_decoded_again(tmp_path, own_cache):
    in_layout('tables, a folder', tmp_path / 'mini_imagenet', {'train': 2, 'val': 2, 'test': 2})
    before = tasks.mini_imagenet(tmp_path)['test'].of_class(0)[0].clone()
    path = tmp_path / 'mini_imagenet/images/ntest000000000.jpg'
    path.write_bytes(photo(99))
    os.utime(path, ns=(1, 1))
    assert not before.equal(tasks.mini_imagenet(tmp_path)['test'].of_class(0)[0])


def test_duplicates_on_the_real_photographs():
    try: splits = tasks.mini_imagenet()
    except FileNotFoundError: pytest.skip('no mini-ImageNet under the data root (set MAMLPP_DATA)')
    groups = tasks.find_duplicates(splits)
    assert (len(groups) == 8 and sum({s for s, *_ in g} == {'train', 'val'} for g in groups) == 6
            and not any(s == 'test' for g in groups for s, *_ in g))


def test_missing_data_sets_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('MAMLPP_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='train_0.zip'): tasks.load_data('mini-imagenet')
    with pytest.raises(ValueError, match="'omniglot', 'glyphs', 'mini-imagenet'"): tasks.load_data('mnist')


def test_a_small_zip_that_holds_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('a/b.png', bytes(100_000_000))
    assert (tmp_path / 'bomb.zip').stat().st_size < 200_000
    with pytest.raises(ValueError, match='b.png.*100 MB, more than'): read_classes(list_images(tmp_path / 'bomb.zip'))


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.new('1', (9_000, 9_000)).save(tmp_path / 'a/huge.png')
    assert (tmp_path / 'a/huge.png').stat().st_size < 1_000_000
    with pytest.raises(ValueError, match='huge.png.*9000x9000 pixels'): read_classes(list_images(tmp_path), 28)


def test_paths_in_an_archive_lead_nowhere(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z: z.writestr('../../outside/evil.png', drawings[0])
    before = {p for p in tmp_path.parent.rglob('*')}
    assert len(read_classes(list_images(tmp_path / 'a.zip'), 28)) == 1
    assert {p for p in tmp_path.parent.rglob('*')} == before
