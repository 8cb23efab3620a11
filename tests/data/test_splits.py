"""Splits that part nothing that belongs together."""
import csv
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import timm.data
from conftest import MSLD, hash_files, needs_msld
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_densese.cli import main
from timm_densese.data.images import list_images
from timm_densese.data.splits import split_images
from timm_densese.demo import generate_images
from timm_densese.errors import OptionError, SplitError


def read_split(out, column='split'):
    with open(out / 'split.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    return rows, {row['file']: row[column] for row in rows}


def patients_of(split_of, separator='-'):
    """The splits of each patient's images, by the part of a file's name before the separator."""
    splits = defaultdict(set)
    for name, split in split_of.items():
        splits[Path(name).name.split(separator)[0]].add(split)
    return splits


def picture(seed):
    """A picture with texture, large and small."""
    rng = np.random.default_rng(seed)
    coarse, fine = (Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((96, 96), 3)
                    for n in (7, 24))
    return Image.blend(coarse, fine, .5)


def plain(seed):
    return Image.new('RGB', (24, 24), (6 * seed % 256, 6 * seed // 256, 9))


def folder_of_images(root, patients=20, shots=1, draw=plain):
    for c, label in enumerate('ab'):
        (root / label).mkdir(parents=True)
        for patient in range(patients):
            for shot in range(shots):
                seed = (c * patients + patient) * shots + shot
                draw(seed).save(root / label / f'p{c}{patient:02}-{shot}.png')
    return root


@pytest.mark.slow
@needs_msld
def test_msld_split(tmp_path, capsys):
    before = hash_files(MSLD)
    assert main(['data', 'split', str(MSLD), '--output', str(tmp_path / 'out')]) == 0
    rows, split_of = read_split(tmp_path / 'out')
    patients = patients_of(split_of, '_')
    assert len(patients) == 162
    assert all(len(splits) == 1 for splits in patients.values())
    counts = Counter(split_of.values())
    for split, share in (('train', .7), ('val', .1), ('test', .2)):
        assert abs(counts[split] / 228 - share) < .02
        labels = Counter(row['label'] for row in rows if row['split'] == split)
        assert abs(labels['Monkeypox'] / labels.total() - 102 / 228) < .1  # val has two dozen images, in groups
        dataset = timm.data.create_dataset('', root=tmp_path / 'out', split=split)
        assert len(dataset) == counts[split]
        assert list(dataset.reader.class_to_idx) == ['Monkeypox', 'Others']
    assert '162 patients' in capsys.readouterr().out
    # MSLD holds one picture under two patients.
    assert split_of['Others/NM110_01.jpg'] == split_of['Others/NM68_01.jpg']
    assert hash_files(MSLD) == before


@pytest.mark.slow
def test_same_seed_same_split(tmp_path):
    src = folder_of_images(tmp_path / 'src', patients=8, draw=picture)
    splits = []
    for name, seed in (('x', 0), ('y', 0), ('z', 1)):
        split_images(src, tmp_path / name, seed=seed)
        splits.append((tmp_path / name / 'split.csv').read_bytes())
    assert splits[0] == splits[1] != splits[2]


def test_what_belongs_together_stays_together(tmp_path, capsys):
    src = folder_of_images(tmp_path / 'src', draw=picture)
    together = []
    for i, (name, change) in enumerate({
        'flip': lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        'turn': lambda im: im.rotate(90),
        'small': lambda im: im.resize((64, 64)),
        'bright': lambda im: im.point(lambda v: min(255, int(v * 1.1))),
    }.items()):
        original = f'a/p0{i:02}-0.png'
        change(picture(i)).save(src / 'a' / f'unrelated_{name}_name.png')
        together.append((original, f'a/unrelated_{name}_name.png'))
    shutil.copy(src / 'b' / 'p101-0.png', src / 'b' / 'other.png')  # same bytes
    together.append(('b/p101-0.png', 'b/other.png'))
    for name in ('plain1.png', 'plain1_aug_7.png'):  # too little texture for pictures to tell: a copy by its name
        Image.new('RGB', (96, 96), (200 + len(name), 0, 0)).save(src / 'b' / name)
    together.append(('b/plain1.png', 'b/plain1_aug_7.png'))
    # Transitively: p103 -> mirrored -> turned.
    mirrored = picture(23).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(src / 'b' / 'm.png')
    mirrored.rotate(20).save(src / 'b' / 'm_copy.png')
    together += [('b/p103-0.png', 'b/m.png'), ('b/m.png', 'b/m_copy.png')]

    split_images(src, tmp_path / 'out', report=tmp_path / 'report.png')
    rows, split_of = read_split(tmp_path / 'out')
    group_of = {row['file']: row['group'] for row in rows}
    for one, other in together:
        assert group_of[one] == group_of[other], (one, other)
        assert split_of[one] == split_of[other]
    assert len(set(group_of.values())) == 41  # and nothing else was grouped
    out = capsys.readouterr().out
    assert '1 repeats of the same bytes, 6 pairs that show the same picture, 1 copies by name' in out
    with Image.open(tmp_path / 'report.png') as report:
        assert report.size[1] > 500


@pytest.mark.slow
@pytest.mark.parametrize('how', ['regex', 'groups'])
def test_patients_from_names_or_a_table(tmp_path, how):
    src = folder_of_images(tmp_path / 'src', patients=12, shots=2)
    names = sorted(p.relative_to(src).as_posix() for p in src.rglob('*.png'))
    if how == 'regex':
        split_images(src, tmp_path / 'out', group_regex=r'^(p\d+)-')
    else:
        with open(tmp_path / 'groups.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('file', 'patient'), *((n, Path(n).name.split('-')[0]) for n in names)])
        split_images(src, tmp_path / 'out', groups=tmp_path / 'groups.csv')
    _, split_of = read_split(tmp_path / 'out')
    patients = patients_of(split_of)
    assert len(patients) == 24
    assert all(len(s) == 1 for s in patients.values())


@pytest.mark.slow
def test_folds_test_every_image_once(tmp_path):
    src = folder_of_images(tmp_path / 'src', patients=12, shots=2)
    images = split_images(src, tmp_path / 'out', val=.2, folds=4, group_regex=r'^(p\d+)-')
    assert all(Counter(image.splits)['test'] == 1 for image in images)
    for fold in range(4):
        _, split_of = read_split(tmp_path / 'out', f'fold{fold}')
        assert all(len(s) == 1 for s in patients_of(split_of).values())
        for split, count in Counter(split_of.values()).items():
            assert len(list((tmp_path / 'out' / f'fold{fold}' / split).rglob('*.png'))) == count


def test_folders_as_people_have_them(tmp_path, capsys):
    src = tmp_path / 'src'
    expected = 0
    for c, label in enumerate(('Mpox', 'other skin')):
        for i, name in enumerate((
                'A.JPG', 'b.jfif', 'deep/er/A.JPG', 'deep_er_A.png', 'c.jpeg', 'd.PNG', 'e.bmp', 'f.webp', 'g.tif',
                'h.jpg', 'i.jpg', 'j.jpg')):
            path = src / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = {'.jfif': 'JPEG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.tif': 'TIFF'}.get(path.suffix.lower())
            picture(100 * c + i).save(path, format=kind)
            expected += 1
        (src / label / 'broken.jpg').write_bytes(b'\xff\xd8\xff not a picture')
        (src / label / 'empty.png').write_bytes(b'')
        (src / label / 'notes.txt').write_text('not an image')
    (src / 'README.md').write_text('not a class')
    images = split_images(src, tmp_path / 'out', val=.2, test=.2)
    assert sum(not image.error for image in images) == expected
    assert capsys.readouterr().out.count('left out, not readable') == 4
    placed = [timm.data.create_dataset('', root=tmp_path / 'out', split=s) for s in ('train', 'val', 'test')]
    assert sum(map(len, placed)) == expected
    for dataset in placed:
        assert list(dataset.reader.class_to_idx) == ['Mpox', 'other skin']
        assert all(image.size == (96, 96) for image, _ in dataset)
    rows, _ = read_split(tmp_path / 'out')
    assert sum(row['error'] != '' and row['split'] == '' for row in rows) == 4


@pytest.mark.parametrize(('folder', 'name'), [('皮' * 80, '肤' * 80), ('1.2.' * 30, '3.' * 20)])
def test_long_names(tmp_path, folder, name):
    """A file system counts bytes, and what begins with a dot is hidden."""
    src = tmp_path / 'src'
    for i in range(20):
        path = src / 'ab'[i % 2] / folder / f'{name}{10 ** (i % 7)}.{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (32, 32), (9 * i, 0, 0)).save(path)
    split_images(src, tmp_path / 'out')
    assert sum(len(list_images(split).samples) for split in (tmp_path / 'out').iterdir() if split.is_dir()) == 20


@pytest.mark.slow
def test_links_where_it_can(tmp_path):
    src = folder_of_images(tmp_path / 'src')
    split_images(src, tmp_path / 'out')
    linked = [p for p in (tmp_path / 'out').rglob('*.png') if os.stat(p).st_nlink == 2]
    assert len(linked) == 40


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/dev/shm', os.W_OK), reason='a second file system is missing: /dev/shm')
def test_copies_where_it_cannot_link(tmp_path):
    src = folder_of_images(tmp_path / 'src')
    with tempfile.TemporaryDirectory(dir='/dev/shm') as other:
        if os.stat(other).st_dev == os.stat(src).st_dev:
            pytest.skip('a second file system is missing: /dev/shm is on that of the temporary folder')
        split_images(src, Path(other) / 'out')
        copies = list((Path(other) / 'out').rglob('*.png'))
        assert len(copies) == 40
        assert {p.read_bytes() for p in copies} == {p.read_bytes() for p in src.rglob('*.png')}


@pytest.mark.slow
@pytest.mark.parametrize(('change', 'message'), [
    (dict(val=.6, test=.5), 'leave something to train on'),
    (dict(val=0, test=.97), 'too few for a share of 97%'),
    (dict(val=.5, folds=2), 'folds 2 must be shares that leave something to train on'),
    (dict(folds=1), '2 folds or more'),
    (dict(folds=5, test=.5), 'each fold is tested on its own share'),
    (dict(keep_test=True, test=.2), 'the test set stays as it is'),
    (dict(groups=Path('x'), group_regex='x'), 'not both'),
    (dict(group_regex='nothing'), 'matches no file name'),
    (dict(folds=30), 'Class a has 20 groups'),
])
def test_wrong_options(tmp_path, change, message):
    src = folder_of_images(tmp_path / 'src')
    with pytest.raises(SplitError, match=message):
        split_images(src, tmp_path / 'out', **change)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['src']


@pytest.mark.parametrize(('report', 'message'), [
    ('src/a/pairs.png', 'lies inside'), ('pairs.txt', r'name it \.png or'), ('.', r'name it \.png or'),
    ('folder.png', 'is a folder: give a file'), ('file/pairs.png', 'file is a file, not a folder'),
])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, report, message):
    src = folder_of_images(tmp_path / 'src')
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'file').touch()
    with pytest.raises(OptionError, match=rf'^--report .*{message}'):
        split_images(src, tmp_path / 'out', report=tmp_path / report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.png', 'src']


@pytest.mark.slow
def test_a_report_is_not_written_into_what_it_is_linked_to(tmp_path):
    """As an image of an earlier split is to its source."""
    src = folder_of_images(tmp_path / 'src')
    first, second = sorted((src / 'a').iterdir())[:2]
    picture(0).save(first)
    picture(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(second)
    before = first.read_bytes()
    os.link(first, tmp_path / 'pairs.png')
    split_images(src, tmp_path / 'out', report=tmp_path / 'pairs.png')
    assert first.read_bytes() == before != (tmp_path / 'pairs.png').read_bytes()


def test_one_patient_with_nearly_all_images(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate([*['a/P0'] * 17, 'a/P1', 'b/P2', 'b/P3']):
        path = tmp_path / 'src' / f'{name}_{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    with pytest.raises(SplitError, match=r'2 of 20 images are left, too few .* smaller --val'):
        split_images(tmp_path / 'src', tmp_path / 'out', val=.2, folds=2, group_regex=r'^(P\d)')
    assert not (tmp_path / 'out').exists()


def test_refuses_folders_it_should_not_touch(tmp_path, capsys):
    src = folder_of_images(tmp_path / 'src')
    with pytest.raises(SplitError, match='nothing is to be written'):
        split_images(src, src / 'out')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.txt').write_text('years of work')
    with pytest.raises(SplitError, match='is not empty'):
        split_images(src, tmp_path / 'full')
    assert (tmp_path / 'full' / 'thesis.txt').read_text() == 'years of work'
    shutil.rmtree(src / 'b')
    with pytest.raises(SplitError, match=r"found \{'a': 20\}"):
        split_images(src, tmp_path / 'out')
    shutil.copytree(src / 'a', src / 'train' / 'a')
    with pytest.raises(SplitError, match='split already'):
        split_images(src, tmp_path / 'out')
    assert main(['data', 'split', str(tmp_path / 'nowhere'), '--output', str(tmp_path / 'out')]) == 1
    assert 'is not a folder' in capsys.readouterr().err


@pytest.mark.parametrize(('change', 'message'), [
    (lambda src: [shutil.rmtree(src / 'stripes'), (src / 'stripes').mkdir()], 'two or more classes'),
    (lambda src: shutil.rmtree(src / 'stripes'), 'two or more classes'),
    (lambda src: [path.unlink() for path in list(src.glob('*/*'))[1:]], 'two or more classes'),
    (lambda src: [path.unlink() for path in list((src / 'spots').iterdir())[1:]], 'too few for'),
    (lambda src: [path.unlink() for path in src.glob('*/*')], 'two or more classes'),
])
def test_folders_too_poor_to_split(tmp_path, change, message):
    generate_images(tmp_path / 'images', per_class=10, size=32)
    change(tmp_path / 'images')
    with pytest.raises(SplitError, match=message):
        split_images(tmp_path / 'images', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# Fuzzing.


def pictures():
    """Distinct pictures by number."""
    return {i: np.asarray(picture(i)) for i in range(14)}


PICTURES = pictures()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                   HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from('ab'), st.integers(0, 13), st.integers(0, 6), st.sampled_from(
    ['.png', '.bmp', ' mirrored.png', ' broken.jpg'])), min_size=8, max_size=40),
    st.sampled_from([(.2, .2, None), (.25, 0, None), (.2, None, 2), (0, .3, None)]), st.integers(0, 3))
def test_any_split_leaks_nothing_loses_nothing_and_repeats(tmp_path_factory, files, shares, seed):
    """Pictures under two classes, of several patients, repeated, mirrored and broken."""
    root = tmp_path_factory.mktemp('fuzz')
    for i, (label, picture, patient, suffix) in enumerate(files):
        folder = root / 'src' / label
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f'P{patient}_{i}{suffix}'
        pixels = PICTURES[picture]
        if 'broken' in suffix:
            path.write_bytes(b'\xff\xd8\xff' + bytes(20))
        else:
            Image.fromarray(pixels[:, ::-1] if 'mirrored' in suffix else pixels).save(path)
    val, test, folds = shares
    options = dict(val=val, test=test, folds=folds, seed=seed, group_regex=r'^(P\d+)_')
    try:
        images = split_images(root / 'src', root / 'out', **options)
    except SplitError as e:
        images, reason = [], str(e)
    if not images:
        assert re.search('too few for|two or more classes|is no class of its own|were asked for', reason)
        assert not (root / 'out').exists()
        return
    assert len(images) == len(files)
    assert split_images(root / 'src', root / 'again', **options) == images
    read = {image.path.name: int(re.search(r'_(\d+)', image.path.name)[1]) for image in images}
    for fold in range(folds or 1):
        by_key: dict = {}
        for image in images:
            _, picture, patient, suffix = files[read[image.path.name]]
            assert bool(image.error) == ('broken' in suffix)
            if not image.error:
                for key in (f'patient {patient}', f'picture {picture}'):
                    by_key.setdefault(key, set()).add(image.splits[fold])
        assert all(len(splits) == 1 for splits in by_key.values())
        stored = [p for p in (root / 'out' / (f'fold{fold}' if folds else '')).glob('*/*/*') if p.suffix != '.csv']
        assert len(stored) == sum(not image.error for image in images)
        again = [p.relative_to(root / 'again') for p in (root / 'again').rglob('*') if p.is_file()]
        assert sorted(again) == sorted(p.relative_to(root / 'out') for p in (root / 'out').rglob('*') if p.is_file())
    if folds:
        assert all(image.splits.count('test') == 1 for image in images if not image.error)
