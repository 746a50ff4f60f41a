"Files as people have them: broken ones, links, leftovers, strange depths of pixels, layouts, and a cache with a limit."
import io
import os
import struct
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mamlpp_nb import files, pictures
from mamlpp_nb.cli import main
from mamlpp_nb.files import cache_command, cache_entries, kept_tensors, walk
from mamlpp_nb.layouts import class_pictures
from mamlpp_nb.pictures import (PictureFile, decode, image_pixels, list_images, open_picture, picture_suffixes,
                                plain_image)
from mamlpp_nb.tasks import image_folder, load_data


def draw(place, *names, value=0):
    for i, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(150, 256, (20, 20), dtype=np.uint8)
        pixels[value + i % 5] = 0
        Image.fromarray(pixels).save(place / name)
    return place


def classes(place, names='abc', n=3):
    return draw(place, *(f'{c}/{i}.png' for c in names for i in range(n)))


def adapt(capsys, *words):
    code = main(['adapt', 'omniglot', *map(str, words)])
    return (code, *capsys.readouterr())


def link(place, target):
    try: place.symlink_to(target)
    except OSError: pytest.skip('no links on this system')


# broken files

@pytest.mark.parametrize('error', [SyntaxError('broken PNG'), struct.error('unpack'), EOFError(), MemoryError(),
                                   IndexError('x'), TypeError('x'), RecursionError()])
def test_whatever_pillow_raises_names_the_file(error):
    def use(image): raise error
    with pytest.raises(ValueError, match='cannot read the image a/b.png'): open_picture('a/b.png', lambda: png(), use)
    with pytest.raises(ValueError, match='cannot read the image a/b.png'):
        decode(PictureFile('a', 'a/b.png', lambda: exec('raise error', {'error': error})))


def png(size=(400, 400)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)).save(out, 'png')
    return out.getvalue()


def flipped(content, at): return content[:at] + bytes([content[at] ^ 0x80]) + content[at+1:]


broken = {'chunk name': flipped(png(), png().rfind(b'IDAT')), 'cut': png()[:5000],
          'nothing': b'', 'text': b'no picture'}


@pytest.mark.parametrize('kind', broken)
def test_a_broken_file_is_named_and_left_out_by_every_command(kind, tmp_path, own_cache, capsys):
    support, unknown = classes(tmp_path / 'support'), classes(tmp_path / 'unknown', n=1)
    for place in (support / 'a', unknown / 'b'): (place / 'bad.png').write_bytes(broken[kind])
    code, out, err = adapt(capsys, support, '--predict', unknown)
    assert code == 0 and err.count('bad.png') == 2 and 'Traceback' not in err and len(out.splitlines()) == 4
    splits = image_folder(support)
    assert sum(int(d.count.sum()) for d in splits.values()) == 9
    assert any('bad.png' in line for line in splits['train'].refused)


def test_a_picture_that_was_opened_before_it_broke(capsys):
    from mamlpp_nb.classifier import image_batch
    image = Image.open(io.BytesIO(broken['chunk name']))
    with pytest.raises(ValueError, match='cannot read the image'): image_batch([image])


# pixels

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('suffix, kind', [('png', np.uint16), ('tif', np.uint16), ('tif', np.int32)])
def test_depths_of_grey(bits, suffix, kind, tmp_path):
    ramp = np.linspace(0, 2**bits - 1, 400).round().reshape(20, 20)
    Image.fromarray(ramp.astype(kind)).save(tmp_path / f'x.{suffix}')
    with Image.open(tmp_path / f'x.{suffix}') as image: pixels = image_pixels(plain_image(image))[0]
    assert np.abs(pixels.astype(float) - 255*ramp/(2**bits - 1)).max() <= .51


def test_numbers_of_32_bits_and_below_zero(tmp_path):
    Image.fromarray(np.linspace(0, 3e6, 400).astype(np.int32).reshape(20, 20)).save(tmp_path / 'x.tif')
    assert image_pixels(plain_image(Image.open(tmp_path / 'x.tif'))).max() == 255
    with pytest.raises(ValueError, match='below 0'): plain_image(Image.fromarray(np.full((4, 4), -3, np.int32)))


@pytest.mark.parametrize('bits', [12, 16])
def test_colours_of_16_bits_are_never_shown_black(bits, tmp_path):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    ramp = np.linspace(0, 2**bits - 1, 300).round().astype('>u2').reshape(10, 10, 3)
    rows = b''.join(b'\0' + row.tobytes() for row in ramp)
    head = struct.pack('>IIBBBBB', 10, 10, 16, 2, 0, 0, 0)
    (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head)
                                     + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    image = Image.open(tmp_path / 'x.png')
    if bits == 16: assert image_pixels(plain_image(image, 'RGB')).max() == 255
    else:
        with pytest.raises(ValueError, match='save it with 8 bits'): plain_image(image, 'RGB')


# HEIC, and other files

def test_files_that_are_not_read_are_told_with_the_reason(tmp_path, own_cache, capsys):
    if '.heic' in picture_suffixes(): pytest.skip('pillow-heif is installed')
    support = classes(tmp_path / 'support')
    (support / 'a/phone.HEIC').write_bytes(b'x')
    (support / 'a/read.txt').write_bytes(b'x')
    _, _, err = adapt(capsys, support)
    assert 'phone.HEIC' in err and 'pillow-heif' in err and 'read.txt' in err
    said = '\n'.join(image_folder(support)['train'].refused)
    assert 'phone.HEIC' in said and 'pillow-heif' in said and 'read.txt' in said


@pytest.fixture
def heif(monkeypatch):
    "A stand-in for pillow-heif: its files are PNG files of another name."
    class Plugin(ImageFile.ImageFile): pass
    before = dict(Image.EXTENSION), dict(Image.OPEN), list(Image.ID)
    def register():
        Image.register_open('HEIF', Plugin)
        Image.register_extensions('HEIF', ['.heic', '.heif'])
    monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=register))
    picture_suffixes.cache_clear()
    yield
    picture_suffixes.cache_clear()
    for now, then in zip((Image.EXTENSION, Image.OPEN), before):
        now.clear()
        now.update(then)
    Image.ID[:] = before[2]


def test_heic_is_read_where_pillow_heif_is(tmp_path, heif):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/phone.heic').write_bytes(png((20, 20)))
    skipped = []
    found, = list_images(tmp_path, skipped=skipped)
    assert decode(found).shape == (1, 20, 20) and not skipped


# links and leftovers

def test_links_are_followed(tmp_path, own_cache, capsys):
    real = classes(tmp_path / 'real', 'abcde')
    draw(tmp_path / 'real', 'apart.png')
    for c in 'abcde':
        (tmp_path / 'linked').mkdir(exist_ok=True)
        link(tmp_path / 'linked' / c, real / c)
    link(tmp_path / 'file' , tmp_path / 'linked') # a link to a folder of links
    assert [f.name for f in class_pictures(tmp_path / 'linked')] == [c for c in 'abcde' for _ in range(3)]
    assert sum(int(d.count.sum()) for d in image_folder(tmp_path / 'file').values()) == 15
    code, out, _ = adapt(capsys, tmp_path / 'linked', '--format', 'csv')
    assert code == 0 and len(out.splitlines()) == 16
    (tmp_path / 'x').mkdir()
    link(tmp_path / 'x/one.png', real / 'apart.png')
    assert len(list_images(tmp_path / 'x')) == 1


def test_a_change_behind_a_link_is_noticed(tmp_path, own_cache):
    real = classes(tmp_path / 'real', 'abcde')
    (tmp_path / 'linked').mkdir()
    for c in 'abcde': link(tmp_path / 'linked' / c, real / c)
    before = image_folder(tmp_path / 'linked')['train'].images.clone()
    draw(real, 'a/new.png')
    assert len(image_folder(tmp_path / 'linked')['train'].images) == len(before) + 1


@pytest.mark.parametrize('where, target', [('a/round', '.'), ('a/round', 'a'), ('self', 'self'), ('a/b/c', 'a')])
def test_links_in_a_circle_are_refused(where, target, tmp_path, own_cache, capsys):
    support = classes(tmp_path / 'support')
    (support / where).parent.mkdir(parents=True, exist_ok=True)
    link(support / where, support / target)
    code, out, err = adapt(capsys, support)
    assert code == 2 and 'leads back' in err and support.name in err and not out
    with pytest.raises(ValueError, match='leads back'): image_folder(support)


def test_a_link_to_nothing_is_named(tmp_path, own_cache, capsys):
    support = classes(tmp_path / 'support')
    link(support / 'gone', tmp_path / 'nowhere')
    link(support / 'a/gone.png', tmp_path / 'nowhere.png')
    code, _, err = adapt(capsys, support)
    assert code == 0 and 'gone.png is a link to nothing' in err and 'support/gone is a link to nothing' in err
    assert sum('link to nothing' in line for line in image_folder(support)['train'].refused) == 2


leftovers = ['@eaDir/1.png', 'a/@eaDir/1.png', '__MACOSX/a/._1.png', 'lost+found/1.png', '.git/1.png', 'a/._1.png',
             '$RECYCLE.BIN/1.png', '#recycle/1.png', 'a/Thumbs.db', '.DS_Store']


@pytest.mark.parametrize('zipped', [False, True])
def test_what_systems_leave_behind_is_no_class(zipped, tmp_path, own_cache):
    place = classes(tmp_path / 'set', 'abcde')
    for name in leftovers:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(png((20, 20)))
    if zipped:
        with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as z:
            for p in sorted(place.rglob('*')): z.write(p, p.relative_to(tmp_path))
        place = tmp_path / 'set.zip'
    splits = image_folder(place)
    assert sorted(n for d in splits.values() for n in d.names) == [*'abcde']
    assert sum(int(d.count.sum()) for d in splits.values()) == 15
    assert any('left behind' in line for line in splits['train'].refused)


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    classes(tmp_path)
    scan = os.scandir
    def scandir(place):
        if str(place).endswith('b'): raise PermissionError(13, 'Permission denied')
        return scan(place)
    monkeypatch.setattr(os, 'scandir', scandir)
    skipped = []
    assert [f.name for _, _, inside in walk(tmp_path, skipped) for f in inside] == ['0.png', '1.png', '2.png']*2
    assert 'cannot be opened (Permission denied)' in skipped[0]


# layouts

def test_one_rule_for_folders_below_a_class(tmp_path, own_cache, capsys):
    support = classes(tmp_path / 'support', 'bcdefg')
    draw(support, 'a/day/0.png', 'a/night/1.png', 'a/night/late/2.png')
    code, out, err = adapt(capsys, support, '--format', 'csv')
    assert code == 0 and out.splitlines()[0] == 'path,predicted,a,b,c,d,e,f,g' and len(out.splitlines()) == 22
    assert '7 classes' in err and 'a (day, night, night/late)' in err
    splits = image_folder(support)
    assert sorted(n for d in splits.values() for n in d.names) == [*'abcdefg']
    assert any('a (day, night, night/late)' in line for line in splits['train'].notes)
    assert image_folder(support)['val'].notes == splits['train'].notes # also from the cache


def test_a_folder_in_a_class_is_no_new_class(tmp_path, capsys):
    support = classes(tmp_path / 'support')
    draw(support, 'a/more/9.png')
    code, out, err = adapt(capsys, support, '--format', 'csv')
    assert code == 0 and out.splitlines()[0] == 'path,predicted,a,b,c' and 'a (more)' in err


def test_pictures_in_no_class_are_named(tmp_path, own_cache, capsys):
    support = draw(classes(tmp_path / 'support'), 'stray.png')
    assert 'stray.png is in no folder' in adapt(capsys, support)[2]
    assert any('stray.png is in no folder' in line for line in image_folder(support)['train'].refused)


def test_a_zip_of_something_split_is_split(tmp_path, own_cache):
    for s, names in (('train', 'abc'), ('val', 'de'), ('test', 'fg')): classes(tmp_path / 'set' / s, names)
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as z:
        for p in sorted((tmp_path / 'set').rglob('*.png')): z.write(p, p.relative_to(tmp_path))
    for place in (tmp_path / 'set.zip', tmp_path / 'set'):
        assert {s: ''.join(d.names) for s, d in image_folder(place).items()} == {
            'train': 'abc', 'val': 'de', 'test': 'fg'}


@pytest.mark.parametrize('images, rows', [('images', '{c}{i}.png'), ('images', '{c}/{i}.png'),
                                          ('.', '{c}/{i}.png'), ('images', 'images/{c}{i}.png')])
@pytest.mark.parametrize('head, encoding', [('filename,label', 'utf-8'), ('filename;label', 'utf-8-sig')])
def test_own_images_split_by_tables(images, rows, head, encoding, tmp_path, own_cache):
    for s, names in (('train', 'abc'), ('val', 'de'), ('test', 'fg')):
        lines = [head]
        for c in names:
            for i in range(2):
                name = rows.format(c=c, i=i)
                draw(tmp_path / images, name.removeprefix('images/'))
                lines.append(f'{name}{head[8]}class {c}')
        (tmp_path / f'{s}.csv').write_text('\n'.join(lines), encoding=encoding)
    draw(tmp_path / images, 'nobody.png')
    splits = load_data(str(tmp_path))
    assert {s: d.names for s, d in splits.items()} == {
        s: tuple(f'class {c}' for c in names) for s, names in (('train', 'abc'), ('val', 'de'), ('test', 'fg'))}
    assert ((splits['train'].count == 2).all()
            and any('no table names' in line and 'nobody.png' in line for line in splits['train'].refused))


def test_tables_that_do_not_fit_are_refused(tmp_path, own_cache):
    draw(tmp_path, 'a/0.png', 'b/0.png')
    for s in ('train', 'val', 'test'): (tmp_path / f'{s}.csv').write_text('filename,label\n0.png,a\n')
    with pytest.raises(ValueError, match='2 files of that name'): image_folder(tmp_path)
    (tmp_path / 'val.csv').unlink()
    with pytest.raises(ValueError, match='not all of train.csv, val.csv and test.csv'): image_folder(tmp_path)


def test_a_broken_zip_is_named(tmp_path, own_cache):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z: z.writestr('a/0.png', png())
    (tmp_path / 'cut.zip').write_bytes((tmp_path / 'x.zip').read_bytes()[:-30])
    for place in (tmp_path / 'cut.zip', tmp_path / 'nothing.zip'):
        place.touch()
        with pytest.raises(ValueError, match=f'{place.name} is n'): image_folder(place)
    for s in ('train', 'val', 'test'): (tmp_path / f'{s}.zip').write_bytes(b'x')
    with pytest.raises(ValueError, match='train.zip is no zip'): image_folder(tmp_path)


# the cache

def keep(name, n=1000): return kept_tensors(name, [], lambda: ({'x': torch.zeros(n, dtype=torch.uint8)}, {}))
def kept(): return [e.path.name.split('-')[0] for e in cache_entries()]


@pytest.fixture
def four(own_cache):
    for i, name in enumerate('abcd'):
        keep(name)
        os.utime(cache_entries()[-1].path, (i + 1, i + 1))


def test_the_cache_keeps_under_its_limit_and_what_was_used_last(four, monkeypatch):
    keep('a') # used again
    assert kept() == [*'bcda']
    monkeypatch.setenv('MAMLPP_CACHE_GB', '2.5e-6')
    keep('e')
    assert kept() == ['a', 'e']
    keep('large', 10_000) # more than the limit: stays, alone
    assert kept() == ['large']


def test_the_command_lists_limits_and_clears(four, capsys):
    cache_command()
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 5 and 'in 4 files' in said and str(files.cache_folder()) in said
    cache_command(limit=2.5e-6)
    assert kept() == ['c', 'd'] and 'deleted a-' in capsys.readouterr().out
    (files.cache_folder() / 'compiled').mkdir()
    cache_command(clear=True)
    assert not kept() and (files.cache_folder() / 'compiled').is_dir() # decoded images only
    for options in ({'limit': -1}, {'limit': float('nan')}, {'limit': 1, 'clear': True}):
        with pytest.raises(ValueError, match='limit'): cache_command(**options)


def test_drafts_of_a_stopped_writer_are_cleared_after_a_day(four):
    old, new = (files.cache_folder() / f'x.{pid}.part.safetensors' for pid in (1, 2))
    for draft in (old, new): draft.write_bytes(b'x'*100)
    os.utime(old, (1, 1))
    cache_command(clear=True)
    assert not old.exists() and new.exists()


def test_the_ground_imports_nothing_of_the_book():
    for module in (files, pictures, sys.modules['mamlpp_nb.layouts']):
        names = {getattr(v, '__module__', '') for v in vars(module).values() if callable(v)}
        assert {n for n in names if n and n.startswith('mamlpp_nb')} <= {
            f'mamlpp_nb.{m}' for m in ('files', 'pictures', 'layouts', 'progress')}
