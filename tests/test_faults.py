"""What goes wrong for users, in one place; docs/reliability.md tells what happens."""
import csv
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import yaml
from conftest import SMALL, trained_densenet, write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_training import SMALL_MODEL, assert_same_training, load, same

from timm_densese.cli import main
from timm_densese.data.splits import split_images
from timm_densese.demo import generate_images
from timm_densese.errors import CheckpointMismatchError, SplitError, TrainingError
from timm_densese.training import TrainConfig, train


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp('faults'), 20)


def config(data, output, **kwargs):
    return TrainConfig(**{**SMALL_MODEL, 'data_dir': str(data), 'output': str(output), 'patience': 0, **kwargs})


def run(*args):
    result = subprocess.run([sys.executable, '-m', 'timm_densese', *map(str, args)], capture_output=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert 'Traceback' not in result.stderr, result.stderr[-3000:]
    return result


# A killed process.


def train_alone(options):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train(TrainConfig(**options))


def start_training(options):
    """Train in a process that has imported everything: 20 of them would else spend their time on imports."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_densese.training', 'torch.utils.tensorboard'])
    process = context.Process(target=train_alone, args=(options,))
    process.start()
    return process


def test_twenty_kills_change_nothing(data, tmp_path):
    options = vars(config(data, tmp_path / 'whole', epochs=60, drop=.2))
    whole = start_training(options)
    whole.join()
    assert whole.exitcode == 0

    output = tmp_path / 'killed'
    options = {**options, 'output': str(output)}
    rng = random.Random(0)
    killed = 0
    while killed < 20:
        resume = str(output / 'last.pth.tar') if (output / 'last.pth.tar').exists() else ''
        process = start_training({**options, 'resume': resume})
        process.join(rng.uniform(.3, .8))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    assert killed == 20
    process = start_training({**options, 'resume': str(output / 'last.pth.tar')})
    process.join()
    assert_same_training(tmp_path / 'whole', output)


# The disk and the folder.


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs', str(folder)], capture_output=True,
                             text=True) if shutil.which('mount') else None
    if mounted is None or mounted.returncode:
        pytest.skip(f'a small file system is missing: mount -t tmpfs failed ({mounted and mounted.stderr.strip()})')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_disk_full(data, small_disk, tmp_path):
    output = small_disk / 'run'
    train(config(data, output, epochs=1))
    before = load(output)
    filler = small_disk / 'filler'
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    resume = str(output / 'last.pth.tar')
    with pytest.raises(TrainingError, match=r'(?s)could not be written.*MB are free.*Make room and go on'):
        train(config(data, output, epochs=3, resume=resume))
    assert same(load(output), before)
    assert not (output / 'tmp.pth.tar').exists()
    filler.unlink()
    shutil.copytree(output, tmp_path / 'moved')  # to where there is room for all of it
    resume = str(tmp_path / 'moved' / 'last.pth.tar')
    assert train(config(data, tmp_path / 'moved', epochs=3, resume=resume))['best']
    with open(tmp_path / 'moved' / 'summary.csv', newline='') as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['0', '1', '2']


def test_two_trainings_into_one_folder(data, tmp_path):
    first = start_training(vars(config(data, tmp_path, epochs=200)))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / 'last.pth.tar').exists():
            assert time.monotonic() < deadline
            time.sleep(.02)
        with pytest.raises(TrainingError, match='Another training is writing to'):
            train(config(data, tmp_path, epochs=300, resume=str(tmp_path / 'last.pth.tar')))
        with pytest.raises(TrainingError, match='holds a training already'):
            train(config(data, tmp_path))
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    shutil.rmtree(tmp_path)
    train(config(data, tmp_path, epochs=1))  # a killed training holds nothing
    with pytest.raises(TrainingError, match='holds a training already'):
        train(config(data, tmp_path))


# Images.


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
    Image.new('1', (30000, 30000)).save(folder / 'bomb.png')
    unreadable += ['cut.jpg', 'empty.png', 'notes.jpg', 'bomb.png']
    (folder / 'Thumbs.db').write_bytes(b'not looked at')
    return readable, unreadable


def test_damaged_images_from_split_to_prediction(trained, tmp_path):
    generate_images(tmp_path / 'images', per_class=14, size=40)
    readable, unreadable = damage(tmp_path / 'images' / 'spots')
    result = run('data', 'split', tmp_path / 'images', '--output', tmp_path / 'split', '--val', '.25', '--test', '.25')
    assert result.returncode == 0, result.stderr
    for name in unreadable:
        assert re.search(f'left out, not decodable.*{re.escape(name)}', result.stdout), name
    with open(tmp_path / 'split' / 'split.csv', newline='') as file:
        rows = {row['file']: row for row in csv.DictReader(file)}
    assert len(rows) == 28 + len(readable) + len(unreadable)
    stored = {path.stem: path for path in (tmp_path / 'split').glob('*/*/*')}
    assert len(stored) == 14 + len(readable) + 14 - 14  # spots and stripes share the generated names
    assert Image.open(stored['turned']).size == (20, 60)  # upright
    wide = np.asarray(Image.open(stored['wide']).convert('RGB'))
    assert len(np.unique(wide)) > 200  # scaled, not cut off

    result = run('train', tmp_path / 'split', '--output', tmp_path / 'run', '--epochs', 1, '--workers', 0, '--img-size',
                 32, '--model-kwargs', 'growth_rate=4', 'block_config=(2,2,2)')
    assert result.returncode == 0, result.stderr
    result = run('evaluate', tmp_path / 'run' / 'last.pth.tar', tmp_path / 'split', '--output', tmp_path / 'report')
    assert result.returncode == 0, result.stderr
    result = run('predict', trained[1], tmp_path / 'images' / 'spots')
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 14 + len(readable)
    for name in unreadable:
        assert re.search(f'not readable.*{re.escape(name)}', result.stderr), name
    assert f'{len(unreadable)} of {14 + len(readable) + len(unreadable)} images could not be read' in result.stderr


def test_an_image_that_is_damaged_after_the_split(data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')
    broken = min((tmp_path / 'data' / 'train' / 'spots').iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    result = run('train', tmp_path / 'data', '--output', tmp_path / 'run', '--epochs', 1, '--workers', 0, '--img-size',
                 32, '-b', 2, '--model-kwargs', 'growth_rate=4', 'block_config=(2,2,2)')
    assert result.returncode == 0
    assert result.stderr.count(f'not readable, the next image takes its place: {broken}') == 1


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


@pytest.mark.parametrize(('change', 'message'), [
    (lambda d: (d / 'val' / 'spots').rename(d / 'val' / 'dots'), 'the same two or more classes'),
    (lambda d: shutil.rmtree(d / 'val' / 'spots'), 'the same two or more classes'),
    (lambda d: [p.unlink() for p in (d / 'train' / 'spots').iterdir()], 'the same two or more classes'),
    (lambda d: shutil.rmtree(d / 'train' / 'spots'), 'the same two or more classes'),
    (lambda d: [p.unlink() for c in (d / 'train').iterdir() for p in c.iterdir()], 'holds no images'),
    (lambda d: shutil.rmtree(d / 'train'), 'is not there'),
])
def test_folders_that_cannot_be_trained_on(data, tmp_path, change, message):
    shutil.copytree(data, tmp_path / 'data')
    change(tmp_path / 'data')
    with pytest.raises(TrainingError, match=message):
        train(config(tmp_path / 'data', tmp_path / 'run'))


# Numbers and checkpoints.


def test_a_loss_that_is_no_number(data, tmp_path):
    train(config(data, tmp_path, epochs=1))
    before = load(tmp_path)
    with pytest.raises(TrainingError, match=r'loss is nan in batch \d+ of epoch [12]'):
        train(config(data, tmp_path, epochs=3, resume=str(tmp_path / 'last.pth.tar'), lr=1e30, warmup_epochs=0,
                     batch_size=4))
    assert same(load(tmp_path)['state_dict'], before['state_dict'])
    assert all(torch.isfinite(t).all() for t in load(tmp_path)['state_dict'].values())


@pytest.mark.parametrize('how', ['resume', 'initial_checkpoint', 'pretrained_path'])
def test_a_checkpoint_of_another_architecture(data, tmp_path, how):
    train(config(data, tmp_path / 'other', epochs=1, model='resnet10t', model_kwargs={}))
    checkpoint = tmp_path / 'other' / 'last.pth.tar'
    with pytest.raises((TrainingError, CheckpointMismatchError), match=r'last.pth.tar is no checkpoint|does not fit'):
        train(config(data, tmp_path / 'run', **{how: str(checkpoint)}))
    assert not (tmp_path / 'run' / 'last.pth.tar').exists()
    # Told the wrong model, it says which tensors do not fit.
    args = yaml.safe_load((tmp_path / 'other' / 'args.yaml').read_text())
    (tmp_path / 'other' / 'args.yaml').write_text(yaml.safe_dump({**args, 'model': 'se_densenet169'}))
    assert main(['publish', str(checkpoint), 'owner/name', '--output', str(tmp_path / 'published')]) == 1


# Fuzzing.


def pictures():
    """Distinct pictures by number; hashes of noise are far apart."""
    return {i: np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8) for i in range(14)}


PICTURES = pictures()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                   HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from('ab'), st.integers(0, 13), st.integers(0, 6), st.sampled_from(
    ['.png', '.bmp', ' mirrored.png', ' broken.jpg'])), min_size=8, max_size=40),
    st.sampled_from([(.2, .2, None), (.25, 0, None), (.2, .2, 2), (0, .3, None)]), st.integers(0, 3))
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
        assert re.search('too few for|two or more classes', reason)
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


@pytest.fixture(scope='module')
def densenet():
    torch.manual_seed(0)
    return trained_densenet('densenet121', **SMALL)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damaged_checkpoint_is_refused_by_name_or_loads_exactly(densenet, data):
    state_dict = {k: v.clone() for k, v in densenet.state_dict().items()}
    names = [k for k in state_dict if not k.endswith('num_batches_tracked')]
    damaged = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    fatal = []
    for name in damaged:
        how = data.draw(st.sampled_from(['drop', 'rename', 'pad', 'flatten', 'scalar', 'add', 'contiguous', 'double']))
        value = state_dict[name]
        if how in ('drop', 'rename'):
            del state_dict[name]
        if how == 'rename':
            state_dict[f'{name}x'] = value
        elif how == 'pad':
            state_dict[name] = torch.cat([value, value])
        elif how == 'flatten':
            state_dict[name] = value[None]
        elif how == 'scalar':
            state_dict[name] = value.sum()
        elif how == 'add':
            state_dict[f'{name}.more'] = value
        elif how == 'contiguous':
            state_dict[name] = value.clone(memory_format=torch.contiguous_format)
        elif how == 'double':
            state_dict[name] = value.double()
        if how not in ('contiguous', 'double'):
            fatal.append(f'{name}.more' if how == 'add' else name)
    placement = data.draw(st.sampled_from(['final', 'stage', 'layer']))
    model: nn.Module = timm.create_model('se_densenet121', se_placement=placement, **SMALL).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if fatal:
        with pytest.raises(CheckpointMismatchError) as error:
            model.load_state_dict(state_dict)
        for name in fatal:
            assert name in str(error.value)
        assert same(dict(model.state_dict()), before)
    else:
        model.load_state_dict(state_dict)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = densenet.eval()(x)
            assert (model(x) - expected).norm() / expected.norm() < 1e-5
