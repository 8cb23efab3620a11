"""Predictions as a user asks for them, and image files as users have them."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_cli
from PIL import Image

from timm_densese.checkpoints import load_model
from timm_densese.cli import main
from timm_densese.data.images import find_images, read_image
from timm_densese.errors import ImagesError
from timm_densese.predict import predict
from timm_densese.thresholds import Calibration


def test_prints_a_table_json_and_csv(trained, tmp_path, capsys):
    test = trained[0] / 'test'
    (tmp_path / 'metrics.json').write_text('{"temperature": 2.5}')
    args = ['predict', str(trained[1]), str(test / 'spots'), str(test / 'stripes' / '*.png')]
    assert main(args) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 24
    assert 'not calibrated' in said.err
    assert '24/24' in said.err  # progress

    assert main([*args, '--json', '--output', str(tmp_path / 'a' / 'p.csv'), '--calibration',
                 str(tmp_path / 'metrics.json')]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['calibrated']
    assert len(found['predictions']) == 24
    with open(tmp_path / 'a' / 'p.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    loaded = load_model(str(trained[1]))
    path = found['predictions'][7]['file']
    from timm.data import create_transform
    with torch.inference_mode():
        logits = loaded.model(create_transform(**loaded.data_config)(Image.open(path).convert('RGB'))[None])
    expected = (logits / 2.5).softmax(1)[0]
    for prediction in found['predictions'][7]['predictions']:
        i = ['spots', 'stripes'].index(prediction['class'])
        assert prediction['probability'] == pytest.approx(expected[i].item(), rel=1e-4)
        assert any(row['file'] == path and float(row['probability']) == prediction['probability'] for row in rows)


def test_rows_for_python(trained, tmp_path):
    shutil.copy(min((trained[0] / 'test' / 'spots').iterdir()), tmp_path / 'b.png')
    (tmp_path / 'a.png').write_bytes(b'')
    rows = predict(str(trained[1]), [str(tmp_path)], top_k=1)
    assert [row['file'] for row in rows] == [str(tmp_path / 'a.png'), str(tmp_path / 'b.png')]
    assert 'UnidentifiedImageError' in rows[0]['error']
    loaded = load_model(str(trained[1]))
    assert predict(loaded, [str(tmp_path / 'b.png')], top_k=1) == rows[1:]
    cold, = predict(loaded, [str(tmp_path / 'b.png')], calibration=Calibration(.5))
    warm, = predict(loaded, [str(tmp_path / 'b.png')])
    ratio, doubled = (p[0]['probability'] / p[1]['probability'] for p in (warm['predictions'], cold['predictions']))
    assert doubled == pytest.approx(ratio ** 2, rel=1e-4)


def test_what_cannot_be_read_stops_nothing(trained, tmp_path):
    image = min((trained[0] / 'test' / 'spots').iterdir())
    for name in ('a.png', 'c.png'):
        shutil.copy(image, tmp_path / name)
    (tmp_path / 'b.png').write_bytes(image.read_bytes()[:200])
    result = run_cli('predict', trained[1], tmp_path, '--json')
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert [row['file'] for row in found['predictions']] == [str(tmp_path / 'a.png'), str(tmp_path / 'c.png')]
    assert list(found['unreadable']) == [str(tmp_path / 'b.png')]
    assert '1 of 3 images could not be read' in result.stderr
    assert 'Traceback' not in result.stderr


def test_images_are_read_as_a_person_sees_them(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / 'turned.png')), np.rot90(pixels, -1))

    wide = (np.arange(54).reshape(6, 9) * 1200).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    found = np.asarray(read_image(tmp_path / 'wide.png'))[..., 0]
    assert np.array_equal(found, wide >> 8)
    assert len(np.unique(found)) == 54  # PIL's own conversion makes all but the first 255

    Image.fromarray(pixels).convert('CMYK').save(tmp_path / 'cmyk.jpg')
    Image.fromarray(pixels[..., 0]).save(tmp_path / 'gray.png')
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    frames[0].save(tmp_path / 'animated.png', save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / 'alpha.webp', lossless=True)
    for name in ('cmyk.jpg', 'gray.png', 'animated.png', 'alpha.webp'):
        image = read_image(tmp_path / name)
        assert (image.mode, image.size) == ('RGB', (9, 6)), name
    assert np.array_equal(np.asarray(read_image(tmp_path / 'animated.png')), pixels)
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(tmp_path / 'float.tiff')
    with pytest.raises(ValueError, match='floating-point'):
        read_image(tmp_path / 'float.tiff')


def test_find_images(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for name in ('a/1.png', 'a/b/2.JPG', 'a/notes.txt', 'odd'):
        (tmp_path / name).write_bytes(b'x')

    def names(*sources):
        return [path.relative_to(tmp_path).as_posix() for path in find_images([str(tmp_path / s) for s in sources])]

    assert names('a') == ['a/1.png', 'a/b/2.JPG']
    assert names('odd', 'a/**/*.JPG', 'a') == ['odd', 'a/b/2.JPG', 'a/1.png']
    with pytest.raises(ImagesError, match='there are no images'):
        names('a', 'missing/*.png')


def test_a_name_that_is_not_utf8_loses_no_work(trained, tmp_path, capsys):
    """Written with its bytes to tables, and shown escaped, also by an output that takes no others."""
    shutil.copytree(trained[0] / 'test', tmp_path / 'test')
    first = next((tmp_path / 'test' / 'spots').iterdir())
    first.rename(tmp_path / 'test' / 'stripes' / 'caf\udce9.png')  # so that it is among the worst errors
    table = tmp_path / 'p.csv'
    assert main(['predict', str(trained[1]), str(tmp_path / 'test'), '-j', '0', '--csv', str(table)]) == 0
    assert b'caf\xe9.png' in table.read_bytes()
    assert main(['evaluate', str(trained[1]), str(tmp_path), '--output', str(tmp_path / 'report'), '-j', '0']) == 0
    assert 'caf\\udce9.png' in (tmp_path / 'report' / 'report.html').read_text(encoding='utf-8')
