"""What belongs together: pictures decide, names propose, patients have the last word."""
import random
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from timm_densese.data.splits import read_split, split_images
from timm_densese.errors import SplitError


def picture(seed, size=128):
    rng = np.random.default_rng(seed)
    coarse, fine = (Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((size, size), 3)
                    for n in (9, 30))
    return Image.blend(coarse, fine, .5)


def plain(seed, size=32):
    return Image.new('RGB', (size, size), (seed % 251, seed // 251 % 251, 9))


def turned(image, rng):
    return image.rotate(rng.uniform(-20, 20), resample=3).crop((12, 12, 116, 116))


def groups(root, **options):
    split_images(root / 'src', root / 'out', val=.2, **options)
    return {row['file']: row['group'] for row in read_split(root / 'out').rows}


NAMES = {
    'keras': (lambda i, rng: f'aug_{i}_{rng.randrange(10 ** 7)}', lambda stem: stem.split('_')[1]),
    'roboflow': (lambda i, rng: f'IMG_{i:04}_jpg.rf.{rng.getrandbits(128):032x}', lambda stem: stem.split('.rf.')[0]),
    'words': (lambda i, rng: f'IMG_{i:04}_aug_{rng.randrange(10 ** 6)}', lambda stem: stem.split('_aug_')[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize('tool', NAMES)
@pytest.mark.parametrize('textured', [True, False], ids=['textured', 'plain'])
def test_copies_that_tools_name(tmp_path, tool, textured):
    """Of pictures with texture by the pictures, and of some or all others by the names."""
    name, original = NAMES[tool]
    rng = random.Random(0)
    for label in 'AB':
        (tmp_path / 'src' / label).mkdir(parents=True)
        for i in range(4):
            for c in range(3):
                seed = 1000 * ord(label) + i
                image = turned(picture(seed), rng) if textured and i else plain(7 * seed + c)
                image.save(tmp_path / 'src' / label / f'{name(i, rng)}.png')
    found = groups(tmp_path)
    by_original = defaultdict(set)
    for file, group in found.items():
        by_original[file[0], original(file[2:-4])].add(group)
    assert len(by_original) == 8
    assert all(len(g) == 1 for g in by_original.values())
    assert len(set(found.values())) == 8


@pytest.mark.slow
@pytest.mark.parametrize('name', ['{label} ({i})', 'crop_{i:03}', 'aug{i:02}', 'aug_{i}', 'IMG_20240101_{i:04}',
                                  '{label}_{i}_1', 'lesion_crop_{i}', 'img{i} - 1'])
@pytest.mark.parametrize('draw', [picture, plain])
def test_numbers_are_no_copies(tmp_path, name, draw):
    for k, label in enumerate(('benign', 'malignant')):
        (tmp_path / 'src' / label).mkdir(parents=True)
        for i in range(1, 7):
            draw(100 * k + i, 64).save(tmp_path / 'src' / label / f'{name.format(label=label, i=i)}.png')
    assert len(set(groups(tmp_path).values())) == 12


@pytest.mark.slow
def test_names_that_the_pictures_refute_are_told(tmp_path, capsys):
    """Shots that are named as Keras names copies."""
    for k, label in enumerate('AB'):
        (tmp_path / 'src' / label).mkdir(parents=True)
        for i in range(5):
            for shot, number in enumerate((3, 870, 91234)):
                picture(1000 * k + 10 * i + shot, 64).save(tmp_path / 'src' / label / f'case_{i}_{number}.png')
    assert len(set(groups(tmp_path).values())) == 30
    out = capsys.readouterr().out
    assert 'copies by their names, but other pictures, so not linked; --groups joins them' in out


def test_a_table_of_patients_has_the_last_word_over_names(tmp_path):
    rows = ['file,patient']
    for k, label in enumerate('AB'):
        (tmp_path / 'src' / label).mkdir(parents=True)
        for i in range(12):
            plain(1000 * k + i).save(tmp_path / 'src' / label / f'x_{i // 3}_{i * 12345 % 99991}.png')
            rows.append(f'{label}/x_{i // 3}_{i * 12345 % 99991}.png,p{label}{i}')
    (tmp_path / 'groups.csv').write_text('\n'.join(rows))
    assert len(set(groups(tmp_path, groups=tmp_path / 'groups.csv').values())) == 24


def test_a_picture_of_two_patients_joins_them_and_is_told(tmp_path, capsys):
    for k, label in enumerate('AB'):
        (tmp_path / 'src' / label).mkdir(parents=True)
        for i in range(10):
            picture(100 * k + i, 64).save(tmp_path / 'src' / label / f'p{label}{i}_0.png')
    picture(3, 64).rotate(15).save(tmp_path / 'src' / 'A' / 'pA7_1.png')
    found = groups(tmp_path, group_regex=r'^(p\w+)_')
    assert found['A/pA3_0.png'] == found['A/pA7_0.png'] == found['A/pA7_1.png']
    assert 'WARNING: the same picture under two patients' in capsys.readouterr().out


@pytest.mark.slow
def test_a_class_of_copies_is_one_line(tmp_path):
    rng = random.Random(0)
    for label in ('Mpox', 'Others', 'more', 'other more'):
        (tmp_path / 'src' / label).mkdir(parents=True)
    for k, (label, copies) in enumerate((('Mpox', 'more'), ('Others', 'other more'))):
        for i in range(6):
            picture(100 * k + i).save(tmp_path / 'src' / label / f'{i}.png')
            for c in range(2):
                turned(picture(100 * k + i), rng).save(tmp_path / 'src' / copies / f'{i}{c}.png')
    with pytest.raises(SplitError, match=r'more is no class of its own: 1\d of its 12 images') as error:
        groups(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(('sizes', 'test', 'message'), [
    ((1,) * 20, .2, ''),
    ((6, 6, 6), .2, 'NOTE: test has 12 of 36 images (33%), and 7 (20%) were asked for'),
    ((30, 1, 1), .5, 'NOTE: test has the classes in other shares than asked for, by the groups: A'),
    ((30, 1, 1, 1), .2, 'were asked for: groups are not parted, and the largest has 30 images'),
], ids=['many', 'some', 'uneven', 'one with nearly all'])
def test_shares_that_groups_forbid(tmp_path, capsys, sizes, test, message):
    """Said where a share is missed, and refused where far from it."""
    for k, label in enumerate('AB'):
        (tmp_path / 'src' / label).mkdir(parents=True)
        for patient, size in enumerate(sizes):
            for i in range(size):
                plain(1000 * k + 70 * patient + i).save(tmp_path / 'src' / label / f'p{label}{patient}_{i}.png')
    try:
        split_images(tmp_path / 'src', tmp_path / 'out', test=test, val=0, group_regex=r'^(p\w+)_')
        said = capsys.readouterr().out
    except SplitError as e:
        said = str(e)
        assert not (tmp_path / 'out').exists()
    assert message in said
    assert bool(message) == ('asked for' in said)


def test_one_picture_in_many_images_is_told(tmp_path, capsys):
    """As where all share a background."""
    for i in range(120):
        path = tmp_path / 'src' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        plain(200 if i % 2 and i < 50 else i).save(path)
    assert len(set(groups(tmp_path).values())) == 96
    said = capsys.readouterr().out
    assert 'WARNING: 25 images are linked as one picture' in said
    assert 'have too little texture for a copy to be surely found' in said
    assert ' and 115 more' in said
