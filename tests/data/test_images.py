"""One reading of a folder, and of every file that looks like an image."""
import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from timm_densese.data.images import find_images, list_images, read_image
from timm_densese.errors import ImagesError
from timm_densese.files import printable

# Folders.


def write(file, colour='red', **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), colour).save(file, **options)
    return file


@pytest.mark.parametrize('classes', [
    ['Measles', 'chickenpox', 'Monkeypox'], [str(i) for i in range(1, 12)], ['img9', 'IMG10', 'a-b', 'a_b', 'ä', 'Z']])
def test_classes_and_images_are_in_timms_order(tmp_path, classes):
    for label in classes:
        for name in ('x10.png', 'X9.jpg', 'b.jpeg', 'A.PNG'):
            write(tmp_path / label / name)
    reader = create_dataset('', root=str(tmp_path)).reader
    ours = list_images(tmp_path)
    assert ours.classes == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    assert [(str(path), label) for path, label in ours.samples] == reader.samples


def test_names_on_which_timms_order_fails_or_varies(tmp_path):
    for label in ('b', 'B', '10²'):
        write(tmp_path / label / '3².png')
    assert list_images(tmp_path).classes == ['10²', 'B', 'b']


def test_what_is_hidden_is_no_class_and_no_image(tmp_path):
    kept = [write(tmp_path / label / 'day1' / 'x.png') for label in ('A', 'B', 'Thumbs')]
    for hidden in ('.ipynb_checkpoints/x.png', '__MACOSX/A/x.png', '.git/x.png', 'A/.hidden/x.png',
                   'A/._x.png', 'A/@eaDir/x.png', 'B/.x.png'):
        write(tmp_path / hidden)
    (tmp_path / 'A' / 'Thumbs.db').write_bytes(b'x')
    (tmp_path / 'empty').mkdir()
    found = list_images(tmp_path)
    assert found.classes == ['A', 'B', 'Thumbs']
    assert [path for path, _ in found.samples] == kept == find_images([str(tmp_path)])


def test_images_in_no_class_are_told(tmp_path):
    write(tmp_path / 'A' / 'x.png')
    loose = write(tmp_path / 'y.png')
    assert list_images(tmp_path).loose == [loose]
    with pytest.raises(ImagesError, match='is not a folder'):
        list_images(tmp_path / 'nowhere')


def test_links_are_followed_and_circles_end(tmp_path):
    """Folders as in a Hub cache, a class that is a link, and links back up."""
    write(tmp_path / 'blobs' / 'x', format='png')
    write(tmp_path / 'elsewhere' / 'deep' / 'y.png')
    root = tmp_path / 'snapshot'
    (root / 'A').mkdir(parents=True)
    os.symlink('../../blobs/x', root / 'A' / 'x.png')
    os.symlink('../elsewhere', root / 'B')
    os.symlink('../../blobs/gone', root / 'A' / 'gone.png')
    os.symlink('..', root / 'A' / 'up')
    os.symlink('.', root / 'A' / 'itself')
    os.symlink(tmp_path, root / 'C')
    found = list_images(root)
    assert found.classes == ['A', 'B']
    assert [path.relative_to(root).as_posix() for path, _ in found.samples] == ['A/gone.png', 'A/x.png', 'B/deep/y.png']
    with pytest.raises(FileNotFoundError):
        read_image(root / 'A' / 'gone.png')


@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() == 0, reason='root reads every folder')
def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    write(tmp_path / 'A' / 'x.png')
    (tmp_path / 'A').chmod(0)
    with pytest.raises(ImagesError, match='cannot be read'):
        list_images(tmp_path)


def test_images_by_name_that_are_not_read_are_listed(tmp_path):
    names = ('a.HEIC', 'b.cr2', 'c.dcm', 'd.svg', 'e.eps', 'f.svs', 'g.jpg')
    (tmp_path / 'A').mkdir()
    for name in (*names, 'notes.txt', 'data.h5', 'film.mpg'):
        (tmp_path / 'A' / name).write_bytes(b'\0\0\0\x18ftypheic' + bytes(400))
    found = list_images(tmp_path)
    assert sorted(path.name for path, _ in found.samples) == sorted(names)
    for path, _ in found.samples:
        with pytest.raises((ValueError, OSError)):
            read_image(path)


def test_a_name_that_is_not_utf8(tmp_path):
    (tmp_path / 'A').mkdir()
    file = Path(os.fsdecode(os.fsencode(tmp_path / 'A') + b'/caf\xe9.png'))
    write(file)
    assert [path for path, _ in list_images(tmp_path).samples] == [file]
    assert read_image(file).size == (4, 4)
    assert printable(file.name) == 'caf\\xe9.png'


# Files.


def transparent(colour):
    """An image whose corner is transparent, over a colour that nobody is to see."""
    image = Image.new('RGBA', (8, 8), (*colour, 0))
    image.paste((10, 20, 30, 255), (2, 2, 6, 6))
    return image


def test_transparent_is_white_in_every_mode(tmp_path):
    for name, colour in (('black', (0, 0, 0)), ('red', (255, 0, 0))):
        image = transparent(colour)
        image.save(tmp_path / f'{name}.png')
        image.save(tmp_path / f'{name}.webp', lossless=True, exact=True)
        image.save(tmp_path / f'{name}.tif')
        image.convert('LA').save(tmp_path / f'{name}_la.png')
    blue = Image.new('RGB', (8, 8), (0, 0, 255))
    blue.paste((10, 20, 30), (2, 2, 6, 6))
    blue.save(tmp_path / 'rgb_trns.png', transparency=(0, 0, 255))
    blue.convert('L').save(tmp_path / 'l_trns.png', transparency=blue.convert('L').getpixel((0, 0)))
    palette = blue.quantize(8)
    palette.save(tmp_path / 'p.png', transparency=palette.getpixel((0, 0)))
    palette.save(tmp_path / 'p.gif', transparency=palette.getpixel((0, 0)))
    grey = np.full((8, 8), 3000, np.uint16)
    grey[2:6, 2:6] = 60000
    Image.fromarray(grey).save(tmp_path / 'i16_trns.png', transparency=3000)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 13
    for file in files:
        assert read_image(file).getpixel((0, 0)) == (255, 255, 255), file.name
        assert max(read_image(file).getpixel((4, 4))) < 240, file.name


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('name', ['x.png', 'x.tif', 'big_endian.tif', 'int32.tif'])
def test_grey_of_many_bits_shows_those_that_it_uses(tmp_path, bits, name):
    values = np.linspace(0, 2 ** bits - 1, 256).astype(np.uint16).reshape(16, 16)
    kind = {'big_endian.tif': '>u2', 'int32.tif': np.int32}.get(name, np.uint16)
    Image.fromarray(values.astype(kind)).save(tmp_path / name)
    shown = np.asarray(read_image(tmp_path / name)).astype(int)
    assert abs(shown[..., 0] - np.arange(256).reshape(16, 16)).max() <= 1
    assert (shown == shown[..., :1]).all()


def test_a_tiff_that_names_its_range(tmp_path):
    dark = np.full((4, 4), 500, np.uint16)
    Image.fromarray(dark).save(tmp_path / 'x.tif', tiffinfo={281: 4095})
    assert read_image(tmp_path / 'x.tif').getpixel((0, 0)) == (31,) * 3


def test_numbers_of_no_known_range_are_refused(tmp_path):
    values = np.arange(16, dtype=np.int32).reshape(4, 4)
    for name, pixels in (('float', values.astype(np.float32)), ('negative', values - 5), ('huge', values * 100000)):
        Image.fromarray(pixels).save(tmp_path / f'{name}.tif')
        with pytest.raises(ValueError, match='of unknown range; convert it'):
            read_image(tmp_path / f'{name}.tif')


@pytest.mark.parametrize(('bits', 'alpha'), [(12, False), (12, True), (16, False), (16, True)])
def test_colours_of_16_bits_are_not_black(tmp_path, bits, alpha):
    levels = np.linspace(0, 2 ** bits - 1, 16).astype(np.uint16).reshape(4, 4, 1)
    pixels = np.concatenate([levels] * 3 + ([np.full_like(levels, 0xffff)] if alpha else []), 2).astype('>u2')
    write_png(tmp_path / 'x.png', 4, 4, 16, 6 if alpha else 2,
              zlib.compress(b''.join(b'\0' + row.tobytes() for row in pixels)))
    if bits == 16:
        assert read_image(tmp_path / 'x.png').getpixel((3, 3)) == (255, 255, 255)
    else:
        with pytest.raises(ValueError, match='PIL cuts off'):
            read_image(tmp_path / 'x.png')


def write_png(file, width, height, depth, colour, compressed_rows):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    file.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0))
        + chunk(b'IDAT', compressed_rows) + chunk(b'IEND', b''))


def bombs(root):
    """Small files that would be large: by area, by one side, of several formats."""
    for name, size in (('square', (60000, 60000)), ('nearly', (12000, 12000)), ('wide', (2 ** 24, 1)),
                       ('tall', (1, 300000)), ('strip', (20, 200000))):
        row = bytes(1 + -(-size[0] // 8))
        compress = zlib.compressobj(9)
        rows = b''.join(compress.compress(row) for _ in range(min(size[1], 3000))) + compress.flush()
        write_png(root / f'{name}.png', *size, 1, 0, rows)
    Image.new('1', (9000, 9000)).save(root / 'x.tif', compression='group4')
    Image.new('L', (20000, 5), 7).save(root / 'x.gif')
    gif = bytearray((root / 'x.gif').read_bytes())
    gif[6:10] = struct.pack('<HH', 65535, 65535)
    (root / 'screen.gif').write_bytes(gif)


@pytest.mark.slow
def test_small_files_take_no_gigabytes(tmp_path, run_alone):
    bombs(tmp_path)
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 1e6
    out = run_alone(tmp_path, function=forked.read_images)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert int(lines[-1].split()[1]) < 200
    assert len(lines) == 9
    assert all('Error' in line and 'pixels' in line for line in lines[:-1])


@pytest.mark.skipif(find_spec('pillow_heif') is None, reason='pillow-heif is missing: pip install pillow-heif')
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    (tmp_path / 'A').mkdir()
    Image.linear_gradient('L').convert('RGB').save(tmp_path / 'A' / 'photo.HEIC', quality=90)
    (path, _), = list_images(tmp_path).samples
    assert np.abs(np.asarray(read_image(path), int) - np.asarray(Image.linear_gradient('L'))[..., None]).mean() < 3
