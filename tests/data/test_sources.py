"""Folders and tables as people have them: what is read of them, what is refused, and where the message points."""
import csv
import shutil
from collections import Counter
from pathlib import Path

import pytest
import timm.data
from PIL import Image

from timm_densese.cli import main
from timm_densese.data.groups import find_patients
from timm_densese.data.sources import find_source
from timm_densese.data.splits import read_split, split_images
from timm_densese.errors import SplitError


def plain_images(root, classes, n=20, name='{i:03}.png', start=0):
    """Images of one colour each, all different: quick to read, and names and tables alone tell what belongs together.
    """
    for k, label in enumerate(classes):
        for i in range(n):
            file = root / label / name.format(i=i, label=label)
            file.parent.mkdir(parents=True, exist_ok=True)
            number = start + 1000 * k + i
            Image.new('RGB', (8, 8), (number % 251, number // 251, k)).save(file)
    return root


def groups_of(output):
    return {row['file']: row['group'] for row in read_split(output).rows}


def patients_of(src, **options):
    images = find_source(src)
    find_patients(images, src, **options)
    return {image.path.relative_to(src).as_posix(): image.patient for image in images}


# Tables.

PATIENTS = [(f'{label}/{i:03}.png', f'p{label}{i // 2}') for label in 'AB' for i in range(20)]


def as_csv(rows, head='file,patient', change=lambda text: text, encoding='utf-8'):
    return change('\n'.join([head, *map(','.join, rows)]) + '\n').encode(encoding)


@pytest.mark.parametrize('content', [
    as_csv(PATIENTS),
    as_csv(PATIENTS, encoding='utf-8-sig'),
    as_csv(PATIENTS, encoding='utf-16'),
    as_csv(PATIENTS, encoding='utf-16-le'),
    as_csv(PATIENTS, change=lambda text: 'sep=;\r\n' + text.replace(',', ';').replace('\n', '\r\n')),
    as_csv(PATIENTS, change=lambda text: text.replace(',', '\t')),
    as_csv(PATIENTS, change=lambda text: text.replace('/', '\\')),
    as_csv(PATIENTS, change=lambda text: text.replace('.png', '')),
    as_csv(PATIENTS, change=lambda text: text.replace('.png', '.JPG').replace('A/', './a/')),
    as_csv(PATIENTS, change=lambda text: text.replace('A/', '/data/src/A/').replace('B/', 'src/B/')),
    as_csv(PATIENTS, head='Image ID,Lesion_ID'),
    as_csv([(f, f'"{p}, or so"', '1') for f, p in PATIENTS], head='filename,patient_id,age'),
    as_csv([*PATIENTS, ('', ''), ('C/elsewhere.png', 'p')]),
    as_csv(PATIENTS, head='ImageID,PatientID'),
    as_csv([(f, str(i), p) for i, (f, p) in enumerate(PATIENTS)], head='File Name,lesion_id,Patient No.'),
    as_csv([(f, '', p) for f, p in PATIENTS], head='file,patient,lesion'),
    as_csv([(f, '60', p) for f, p in PATIENTS], head='file,patient_age,subject-id'),
    as_csv([('9', f, p) for f, p in PATIENTS], head='image_id,image,person'),
], ids=['plain', 'bom', 'utf16', 'utf16 without a mark', 'semicolons', 'tabs', 'backslashes', 'no extension',
        'other extension and case', 'paths from above', 'other names', 'quotes', 'other rows',
        'as in DICOM', 'beside a lesion', 'beside a blank one', 'beside an age',
        'beside a number'])
def test_groups_tables_of_every_form(tmp_path, content):
    plain_images(tmp_path / 'src', 'AB')
    (tmp_path / 'groups.csv').write_bytes(content)
    found = patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv')
    assert {file: patient.removesuffix(', or so') for file, patient in found.items()} == dict(PATIENTS)


@pytest.mark.parametrize('blank', ['', ' ', 'NA', 'nan', 'None', 'unknown', '?', '#N/A', '<NA>'])
def test_a_blank_patient_is_not_known(tmp_path, blank):
    plain_images(tmp_path / 'src', 'AB')
    rows = [(f, blank if i else p) for i, (f, p) in enumerate(PATIENTS)]
    (tmp_path / 'groups.csv').write_bytes(as_csv(rows))
    found = patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv')
    assert [patient for patient in found.values() if patient] == ['pA0']


@pytest.mark.parametrize(('one', 'other'), [('p 1', 'p  1'), ('p 1', 'p\u00a01'), ('\u00e9', 'e\u0301')])
def test_patients_that_look_the_same_are_the_same(tmp_path, one, other):
    plain_images(tmp_path / 'src', 'AB')
    (tmp_path / 'groups.csv').write_bytes(as_csv((f, one if i % 2 else other) for i, (f, _) in enumerate(PATIENTS)))
    assert set(patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv').values()) == {one}


@pytest.mark.parametrize(('one', 'other'), [('7', '007'), ('7', '7.0'), ('P7', 'p7')])
def test_patients_that_may_be_one_are_told(tmp_path, capsys, one, other):
    plain_images(tmp_path / 'src', 'AB')
    (tmp_path / 'groups.csv').write_bytes(as_csv((f, one if i % 2 else other) for i, (f, _) in enumerate(PATIENTS)))
    assert set(patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv').values()) == {one, other}
    said = capsys.readouterr().out
    assert 'WARNING: 1 patients are written in two ways' in said
    assert f'such as {" and ".join(sorted((one, other)))}' in said


@pytest.mark.parametrize(('content', 'message'), [
    (b'PK\x03\x04\x14\x00\x06\x00 rest of an .xlsx', 'is a file of Excel. Save it as CSV'),
    (as_csv([(f, 'Müller') for f, _ in PATIENTS], encoding='cp1252'), r'row 2: M\xfcller is not UTF-8'),
    (as_csv([(f'C:/data/{f}', p) for f, p in PATIENTS]), 'its first row has C:/data/A/000.png'),
    (as_csv([(str(i), f, p) for i, (f, p) in enumerate(PATIENTS)]), 'names 2 columns, and a row has 3 cells: 0,A'),
    (as_csv([(f, 'nevus, atypical', p) for f, p in PATIENTS], head='file,label,patient'), 'quote what holds'),
])
def test_tables_that_cannot_be_read_say_why(tmp_path, content, message):
    plain_images(tmp_path / 'src', 'AB')
    (tmp_path / 'groups.csv').write_bytes(content)
    with pytest.raises(SplitError) as error:
        patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv')
    assert message in str(error.value)


def test_patients_of_a_pattern_are_compared_as_those_of_a_table(tmp_path, capsys):
    plain_images(tmp_path / 'src', 'A', name='patient7_{i}.png')
    plain_images(tmp_path / 'src', 'B', name='Patient07_{i}.png')
    assert set(patients_of(tmp_path / 'src', group_regex=r'(?i)(patient\d+)').values()) == {'patient7', 'Patient07'}
    assert 'WARNING: 1 patients are written in two ways' in capsys.readouterr().out
    for old, new in (('patient7', 'e\u0301'), ('Patient07', '\u00e9')):
        for file in (tmp_path / 'src').rglob(f'{old}*'):
            file.rename(file.with_name(file.name.replace(old, new)))
    assert set(patients_of(tmp_path / 'src', group_regex='(.*)_').values()) == {'\u00e9'}


def test_accents_of_a_mac_in_file_names(tmp_path):
    """As one sign in the table, as two on the disk."""
    plain_images(tmp_path / 'src', 'AB', name='e\u0301{i:03}.png')
    rows = [(f.replace('/', '/\u00e9'), p) for f, p in PATIENTS]
    (tmp_path / 'groups.csv').write_bytes(as_csv(rows))
    assert list(patients_of(tmp_path / 'src', groups=tmp_path / 'groups.csv').values()) == [p for _, p in PATIENTS]


def test_the_column_of_labels_is_named(tmp_path, capsys):
    plain_images(tmp_path / 'src', 'AB')
    rows = [(f, 'x', 'nan' if i == 3 else f[0]) for i, (f, _) in enumerate(PATIENTS)]
    (tmp_path / 'labels.csv').write_bytes(as_csv(rows, head='file,class,label'))
    images = find_source(tmp_path / 'src', labels=tmp_path / 'labels.csv')
    said = capsys.readouterr().out
    assert f'classes: label of {tmp_path / "labels.csv"}' in said
    assert 'left out, without a label' in said
    assert {image.label for image in images if not image.error} == {'A', 'B'}


def test_what_may_be_patients_is_said(tmp_path, capsys):
    """Patients that differ in capitals, and a table of labels that has none."""
    plain_images(tmp_path / 'src', 'AB')
    rows = [(f, p.upper() if i % 2 else p) for i, (f, p) in enumerate(PATIENTS)]
    (tmp_path / 'table.csv').write_bytes(as_csv(rows))
    patients_of(tmp_path / 'src', groups=tmp_path / 'table.csv')
    assert 'in two ways, by capitals or zeros, and taken for two, such as PA0 and pA0' in capsys.readouterr().out
    (tmp_path / 'table.csv').write_bytes(as_csv([(f, f[0]) for f, _ in PATIENTS], head='file,label'))
    split_images(tmp_path / 'src', tmp_path / 'out', labels=tmp_path / 'table.csv')
    assert 'is named like one: file, label' in capsys.readouterr().out


def test_those_without_a_patient_are_no_group(tmp_path):
    plain_images(tmp_path / 'src', 'AB')
    (tmp_path / 'groups.csv').write_bytes(as_csv([(f, '' if f[0] == 'A' else p) for f, p in PATIENTS]))
    split_images(tmp_path / 'src', tmp_path / 'out', groups=tmp_path / 'groups.csv')
    groups = groups_of(tmp_path / 'out')
    assert len({groups[f'A/{i:03}.png'] for i in range(20)}) == 20
    assert len({groups[f'B/{i:03}.png'] for i in range(20)}) == 10


@pytest.mark.parametrize(('content', 'message'), [
    (as_csv([*PATIENTS, ('A/000.png', 'other')]), 'row 2 that its patient is pA0, and in row 42 that it is other'),
    (as_csv([*PATIENTS, ('a\\000', 'other')]), 'row 42'),
    (as_csv(PATIENTS[1:]), 'has no row for 1 images'),
    (as_csv([('000.png', 'x')]), r'can mean .*A/000.png and .*B/000.png'),
    (as_csv(PATIENTS, head='file,age'), 'a column for the patient'),
    (as_csv(PATIENTS, head='x,patient'), 'a column for the file'),
    (as_csv([(f, p, 'x') for f, p in PATIENTS], head='file,patient,Patient'), 'two columns of the name patient'),
    (as_csv([]), 'has no rows'),
    (b'', 'has no rows'),
    (None, 'cannot be read'),
])
def test_groups_tables_that_are_refused(tmp_path, capsys, content, message):
    plain_images(tmp_path / 'src', 'AB')
    if content is not None:
        (tmp_path / 'groups.csv').write_bytes(content)
    with pytest.raises(SplitError, match=message) as error:
        split_images(tmp_path / 'src', tmp_path / 'out', groups=tmp_path / 'groups.csv')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_a_bad_pattern_is_one_line(tmp_path, capsys):
    plain_images(tmp_path / 'src', 'AB')
    assert main(['data', 'split', str(tmp_path / 'src'), '--output', str(tmp_path / 'out'), '--group-regex', '*_']) == 1
    assert 'is no pattern (nothing to repeat at position 0)' in capsys.readouterr().err


def test_patients_from_folders(tmp_path):
    for p in range(4):
        plain_images(tmp_path / 'src', 'AB', 3, f'patient{p:02}/x{{i}}.png', start=3 * p)
    found = patients_of(tmp_path / 'src', group_regex=r'^(patient\d+)/')
    assert set(found.values()) == {f'patient{p:02}' for p in range(4)}
    assert all(patient in file for file, patient in found.items())


@pytest.mark.slow
@pytest.mark.parametrize('head', ['image_id,dx,lesion_id', 'Filename,Class,Patient'])
def test_a_flat_folder_with_a_table_of_labels(tmp_path, capsys, head):
    """As HAM10000: two folders of parts, a metadata file of ids, and lesions that have several pictures."""
    plain_images(tmp_path / 'src', ['part_1', 'part_2'], 30, 'ISIC_{label}_{i}.png')
    shutil.copy(tmp_path / 'src' / 'part_1' / 'ISIC_part_1_0.png', tmp_path / 'src' / 'extra.png')
    rows = [(f'ISIC_part_{part}_{i}', ('nv', 'mel')[i % 2], f'L{part}{i // 4}{i % 2}') for part in (1, 2)
            for i in range(30)]
    (tmp_path / 'meta.csv').write_bytes(as_csv(rows, head))
    split_images(tmp_path / 'src', tmp_path / 'out', labels=tmp_path / 'meta.csv')
    found = [row for row in read_split(tmp_path / 'out').rows if not row['error']]
    assert Counter(row['label'] for row in found) == {'nv': 30, 'mel': 30}
    assert len({row['group'] for row in found}) == len({row[2] for row in rows})
    assert 'left out, without a' in capsys.readouterr().out
    assert [row['file'] for row in read_split(tmp_path / 'out').rows if row['error']] == ['extra.png']


def test_a_flat_folder_without_a_table(tmp_path):
    plain_images(tmp_path, ['src'])
    with pytest.raises(SplitError, match=r'20 images in no class folders\. Give --labels'):
        split_images(tmp_path / 'src', tmp_path / 'out')


# Layouts.


def refusal(src, **options):
    with pytest.raises(SplitError) as error:
        split_images(src, src.parent / 'out', **options)
    assert not (src.parent / 'out').exists()
    return str(error.value)


def test_an_unpacked_archive_is_refused_with_where_to_point(tmp_path):
    src = tmp_path / 'zip'
    plain_images(src / 'Original Images' / 'Original Images', ['Monkey Pox', 'Others'])
    plain_images(src / 'Augmented Images' / 'Augmented Images', ['Monkeypox_augmented', 'Others_augmented'], start=5000)
    for part in ('Train', 'Val', 'Test'):
        plain_images(src / 'Fold1' / 'Fold1' / 'Fold1' / part, ['Monkeypox', 'Others'], 3)
    message = refusal(src)
    assert f'{src / "Original Images" / "Original Images"} (Monkey Pox 20, Others 20)' in message
    assert f'{src / "Fold1" / "Fold1" / "Fold1"} (split already' in message


@pytest.mark.parametrize('inner', ['dataset', 'a/b/c', 'raw data'])
def test_class_folders_further_down(tmp_path, inner):
    plain_images(tmp_path / 'src' / inner, 'AB')
    assert f'{tmp_path / "src" / inner} (A 20, B 20)' in refusal(tmp_path / 'src')


@pytest.mark.slow
@pytest.mark.parametrize('names', [('day0', 'day1'), ('left', 'right'), ('original', 'p2')])
def test_folders_within_classes_are_no_classes(tmp_path, names):
    for k, name in enumerate(names):
        plain_images(tmp_path / 'src', 'AB', 10, f'{name}/{{i}}.png', start=100 * k)
    split_images(tmp_path / 'src', tmp_path / 'out')
    assert {row['label'] for row in read_split(tmp_path / 'out').rows} == {'A', 'B'}


@pytest.mark.parametrize('augmented', ['Mpox_augmented', 'aug_Mpox', 'Mpox (augmented)', 'Mpox-aug'])
def test_classes_that_are_copies_by_their_names(tmp_path, augmented):
    plain_images(tmp_path / 'src', ['Mpox', 'Others', augmented])
    message = refusal(tmp_path / 'src')
    assert f'{augmented} is no class of its own' in message
    assert '\n' not in message


@pytest.mark.parametrize(('classes', 'message'), [
    (['a', 'A'], 'differ in case, zeros or the form of their accents only'),
    (['x1', 'x01'], 'differ in case, zeros or the form of their accents only'),
    (['\u00e9', 'e\u0301'], 'differ in case, zeros or the form of their accents only'),
    (['5²', 'b'], 'that timm cannot read'),
])
def test_class_names_that_others_read_otherwise(tmp_path, classes, message):
    plain_images(tmp_path / 'src', classes)
    assert message in refusal(tmp_path / 'src')


# Official test sets.


@pytest.mark.slow
@pytest.mark.parametrize(('train', 'test'), [('train', 'test'), ('Training', 'Testing'), ('TRAIN', 'test_set')])
def test_an_official_test_set_stays_as_it_is(tmp_path, capsys, train, test):
    src = tmp_path / 'src'
    plain_images(src / train, 'AB')
    plain_images(src / test, 'AB', 6, start=500)
    assert 'split already' in refusal(src)
    assert '--keep-test' in refusal(src)
    shutil.copy(src / test / 'A' / '000.png', src / train / 'A' / 'leak.png')
    split_images(src, tmp_path / 'out', keep_test=True, val=.2)
    assert 'WARNING: 1 images outside the official test set are of patients or pictures in it' in (
        capsys.readouterr().out)
    split_of = {row['file']: row['split'] for row in read_split(tmp_path / 'out').rows}
    assert {split for file, split in split_of.items() if file.startswith(test)} == {'test'}
    counts = Counter(split for file, split in split_of.items() if file.startswith(train))
    assert counts['val'] in (8, 9)
    assert counts['train'] == 41 - counts['val']


def test_no_folder_vanishes(tmp_path, capsys):
    src = plain_images(tmp_path / 'src', 'ABC')
    for file in (src / 'C').iterdir():
        file.rename(file.with_name(f'IM{file.stem}'))
    assert 'is an image, but its name does not end as one, so that C would be left out' in refusal(src)
    for file in (src / 'C').iterdir():
        file.write_text('no image')
    find_source(src)
    assert f'left out, no folder of images: {src / "C"}, with files such as IM000' in capsys.readouterr().out


def test_a_third_folder_beside_an_official_test_set(tmp_path):
    for name in ('train', 'test', 'train2'):
        src = plain_images(tmp_path / 'src' / name, 'AB').parent
    assert 'train2 holds images, and its name says neither train, val nor test' in refusal(src, keep_test=True)


@pytest.mark.parametrize(('broken', 'message'), [
    ('train', 'no image of A, B can be read'), ('train/B', 'no image of B can be read'),
    ('test', 'None of the images of')])
def test_official_sets_that_cannot_be_read(tmp_path, broken, message):
    for i, name in enumerate(('train', 'test')):
        src = plain_images(tmp_path / 'src' / name, 'AB', start=100 * i).parent
    for file in (src / broken).rglob('*.png'):
        file.write_bytes(b'none')
    with pytest.raises(SplitError, match=message):
        split_images(src, tmp_path / 'out', keep_test=True)


def test_an_official_test_set_with_other_classes(tmp_path):
    plain_images(tmp_path / 'src' / 'train', 'AB')
    plain_images(tmp_path / 'src' / 'test', 'AC', start=500)
    assert 'has classes that its other images lack: C' in refusal(tmp_path / 'src', keep_test=True)
    shutil.rmtree(tmp_path / 'src' / 'test')
    assert '--keep-test takes a folder with train/ and test/' in refusal(tmp_path / 'src', keep_test=True)


# What is written.


def test_timm_reads_what_is_written_as_it_is_read_here(tmp_path, capsys):
    """Hidden folders, folders in classes, links, other formats, transparency, and names that timm or systems refuse."""
    src = plain_images(tmp_path / 'src', 'AB', 12)
    plain_images(src, ['.ipynb_checkpoints', '__MACOSX'], 2)
    plain_images(src, 'AB', 3, 'day1/{i}².webp', start=300)
    plain_images(src, 'AB', 2, 'a:b{i}.png', start=400)
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(src / 'A' / 'clear.png')
    (tmp_path / 'blob').write_bytes((src / 'A' / 'clear.png').read_bytes() + b' ')
    (src / 'A' / 'link.png').symlink_to('../../blob')
    split_images(src, tmp_path / 'out')
    out = capsys.readouterr().out
    assert '6 images are of a format that timm does not read' in out
    assert '2 images are transparent' in out
    assert '10 images are stored under another name' in out
    count = 0
    for split in ('train', 'val', 'test'):
        dataset = timm.data.create_dataset('', root=str(tmp_path / 'out'), split=split)
        assert list(dataset.reader.class_to_idx) == ['A', 'B']
        assert all(image.convert('RGB').size == (8, 8) for image, _ in dataset)
        count += len(dataset)
    assert count == 36
    white = [row for row in read_split(tmp_path / 'out').rows if row['file'] == 'A/clear.png']
    with Image.open(tmp_path / 'out' / white[0]['split'] / 'A' / 'clear.png') as image:
        assert image.convert('RGB').getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.slow
def test_copies_on_request(tmp_path, capsys):
    src = plain_images(tmp_path / 'src', 'AB')
    split_images(src, tmp_path / 'linked')
    assert 'The files are hard links' in capsys.readouterr().out
    split_images(src, tmp_path / 'copied', copy=True)
    assert 'hard links' not in capsys.readouterr().out
    for name, links in (('linked', 2), ('copied', 1)):
        assert {p.stat().st_nlink for p in (tmp_path / name).rglob('*.png')} == {links}


def test_a_table_of_names_that_are_not_utf8(tmp_path):
    src = plain_images(tmp_path / 'src', 'AB')
    file = src / 'A' / '000.png'
    file.rename(Path(str(file.parent / 'caf\udce9.png')))
    split_images(src, tmp_path / 'out')
    assert 'A/caf\udce9.png' in groups_of(tmp_path / 'out')
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 40


def test_read_split_of_folds_and_folders_in_them(tmp_path):
    split_images(plain_images(tmp_path / 'src', 'AB'), tmp_path / 'out', folds=2, val=.2)
    for where, column in (('fold0', 'fold0'), ('fold1/test', 'fold1')):
        table = read_split(tmp_path / 'out' / where)
        assert table.column == column
        assert len(table.hashes('test')) == 20
    assert read_split(tmp_path / 'src').rows == []
    with open(tmp_path / 'out' / 'split.csv', encoding='utf-8', newline='') as file:
        assert list(csv.DictReader(file)) == table.rows
