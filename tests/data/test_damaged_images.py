"""Files of every kind among the images, from the split to the prediction."""
import csv
import re

import numpy as np
import pytest
from conftest import run_cli, run_training
from PIL import Image

from timm_densese.demo import generate_images


def damage(folder):
    """Files of every kind among the images of a class: those that can be read, and those that cannot."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    readable, unreadable = [], []

    def save(name, image, **options):
        image.save(folder / name, **options)
        readable.append(name)

    save('cmyk.jpg', Image.fromarray(rng.integers(0, 255, (40, 60, 4), dtype=np.uint8), 'CMYK'))
    save('wide.png', Image.fromarray(rng.integers(0, 65535, (40, 60), dtype=np.uint16)))
    exif = Image.Exif()
    exif[0x0112] = 8
    save('turned.jpg', Image.fromarray(rng.integers(0, 255, (20, 60, 3), dtype=np.uint8)), exif=exif)
    save('animated.gif', Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)), save_all=True,
         append_images=[picture.convert('L').resize((40, 40))])
    save('point.png', Image.new('RGB', (1, 1), (90, 50, 10)))
    picture.save(folder / 'cut.jpg')
    (folder / 'cut.jpg').write_bytes((folder / 'cut.jpg').read_bytes()[:400])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'notes.jpg').write_text('This is no image.')
    Image.new('1', (14000, 13000)).save(folder / 'bomb.png')
    unreadable += ['cut.jpg', 'empty.png', 'notes.jpg', 'bomb.png']
    (folder / 'Thumbs.db').write_bytes(b'not looked at')
    return readable, unreadable


@pytest.mark.slow
def test_damaged_images_from_split_to_prediction(trained, tmp_path):
    generate_images(tmp_path / 'images', per_class=14, size=40)
    readable, unreadable = damage(tmp_path / 'images' / 'spots')
    result = run_cli('data', 'split', tmp_path / 'images', '--output', tmp_path / 'split', '--val', '.25', '--test',
                     '.25')
    assert result.returncode == 0, result.stderr
    for name in unreadable:
        assert re.search(f'left out, not readable.*{re.escape(name)}', result.stdout), name
    with open(tmp_path / 'split' / 'split.csv', newline='') as file:
        rows = {row['file']: row for row in csv.DictReader(file)}
    assert len(rows) == 28 + len(readable) + len(unreadable)
    stored = {path.stem: path for path in (tmp_path / 'split').glob('*/*/*')}
    assert len(stored) == 14 + len(readable) + 14 - 14  # spots and stripes share the generated names
    assert Image.open(stored['turned']).size == (20, 60)  # upright
    wide = np.asarray(Image.open(stored['wide']).convert('RGB'))
    assert len(np.unique(wide)) > 200  # scaled, not cut off

    run_training(tmp_path / 'split', tmp_path / 'run')
    result = run_cli('evaluate', tmp_path / 'run' / 'last.pth.tar', tmp_path / 'split', '--output',
                     tmp_path / 'report')
    assert result.returncode == 0, result.stderr
    result = run_cli('predict', trained[1], tmp_path / 'images' / 'spots')
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 14 + len(readable)
    for name in unreadable:
        assert re.search(f'not readable.*{re.escape(name)}', result.stderr), name
    assert f'{len(unreadable)} of {14 + len(readable) + len(unreadable)} images could not be read' in result.stderr
