"""The embedded loop: its files, its resumption, its processes, and what it refuses."""
import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import SMALL, write_split

from timm_densese.cli import main
from timm_densese.errors import TrainingError
from timm_densese.publish import publish
from timm_densese.training import TrainConfig, train

ROOT = Path(__file__).parent.parent
SMALL_MODEL = dict(model='se_densenet121', model_kwargs=dict(SMALL, growth_rate=4), img_size=32, workers=0)
SMALL_ARGS = ('--model-kwargs', 'growth_rate=4', 'block_config=(2,2,2)', '--img-size', '32')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp('data'), 30)


def summary(output):
    with open(output / 'summary.csv', newline='') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def load(output, name='last.pth.tar'):
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options, as in timm's checkpoints
        return torch.load(output / name, weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_training(whole, resumed):
    expected, found = load(whole), load(resumed)
    for key in ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch'):
        assert same(expected[key], found[key]), key
    assert (resumed / 'summary.csv').read_bytes() == (whole / 'summary.csv').read_bytes()
    assert same(load(whole, 'model_best.pth.tar')['state_dict'], load(resumed, 'model_best.pth.tar')['state_dict'])


def command(*args, processes=1):
    start = ([sys.executable, '-m', 'timm_densese'] if processes == 1 else
             [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(processes), '--standalone',
              '-m', 'timm_densese'])
    return [*start, 'train', *map(str, args)]


ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}  # several processes of torch on few cores wait for each other otherwise


def test_learns_and_leaves_files_that_timm_reads(data, tmp_path, capsys):
    result = train(TrainConfig(data_dir=str(data), output=str(tmp_path), epochs=10, lr=1e-2, **SMALL_MODEL))
    assert result['classes'] == ['spots', 'stripes']
    assert result['best']['loss'] < result['before']['loss'] - .02
    rows = summary(tmp_path)
    assert [row['epoch'] for row in rows] == list(range(10))
    assert min(row['eval_loss'] for row in rows) == result['best']['loss']
    assert {'train_loss', 'eval_top1', 'eval_balanced_top1', 'lr'} <= set(rows[0])
    assert (tmp_path / 'curves.png').stat().st_size > 5000
    args = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert args['class_names'] == ['spots', 'stripes']
    assert args['model'] == 'se_densenet121'
    assert args['input_size'] == [3, 32, 32]

    best = load(tmp_path, 'model_best.pth.tar')
    assert best['epoch'] == result['best_epoch']
    model = timm.create_model('se_densenet121', num_classes=2, checkpoint_path=str(tmp_path / 'model_best.pth.tar'),
                              **SMALL_MODEL['model_kwargs'])
    assert same(dict(model.state_dict()), dict(best['state_dict_ema']))  # timm takes the averaged weights
    publish(tmp_path / 'model_best.pth.tar', 'owner/name', to=tmp_path / 'published')
    published = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True)
    assert same(dict(published.state_dict()), dict(best['state_dict_ema']))
    assert published.pretrained_cfg['label_names'] == ['spots', 'stripes']
    pytest.importorskip('tensorboard', reason='tensorboard is missing: pip install .[test]')
    assert list(tmp_path.glob('events.out.tfevents.*'))
    progress = capsys.readouterr().err
    assert 'loss=' in progress
    assert 'lr=' in progress


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    args = ('--epochs', 6, '--drop', .3, '--patience', 0, '--workers', 1, *SMALL_ARGS)
    subprocess.run(command(data, '--output', tmp_path / 'whole', *args), check=True, env=ENV, capture_output=True)
    output = tmp_path / 'killed'
    process = subprocess.Popen(command(data, '--output', output, *args), env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (output / 'summary.csv').exists() or len(summary(output)) < 2:
        assert time.monotonic() < deadline
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(summary(output)) < 6

    subprocess.run(command(data, '--output', output, *args, '--resume', output / 'last.pth.tar'), check=True, env=ENV,
                   capture_output=True)
    assert_same_training(tmp_path / 'whole', output)


def test_killed_between_its_two_checkpoints(data, tmp_path):
    options = dict(data_dir=str(data), output=str(tmp_path), lr=0., warmup_lr=0., warmup_epochs=0, eval_metric='top1',
                   model_ema=False, **SMALL_MODEL)
    train(TrainConfig(epochs=1, **options))
    (tmp_path / 'checkpoint-0.pth.tar').unlink()
    (tmp_path / 'model_best.pth.tar').unlink()
    result = train(TrainConfig(epochs=2, resume=str(tmp_path / 'last.pth.tar'), **options))
    assert result['best_epoch'] == 0  # the second epoch is no better
    assert load(tmp_path, 'model_best.pth.tar')['epoch'] == 0
    assert load(tmp_path)['epoch'] == 1


@pytest.mark.parametrize('model', [
    SMALL_ARGS,
    ('--model', 'resnet10t', '--img-size', '32'),  # plain nn.BatchNorm2d
])
def test_two_processes_give_one_processes_metrics(data, tmp_path, model):
    args = ('--epochs', 2, '--workers', 0, '--opt', 'sgd', '--lr', .005, *model)
    subprocess.run(command(data, '--output', tmp_path / 'one', '-b', 8, *args), check=True, env=ENV,
                   capture_output=True)
    result = subprocess.run(command(data, '--output', tmp_path / 'two', '-b', 4, *args, processes=2), env=ENV,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for one, two in zip(summary(tmp_path / 'one'), summary(tmp_path / 'two'), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    one, two = load(tmp_path / 'one')['state_dict'], load(tmp_path / 'two')['state_dict']
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize('options', [
    dict(amp=True, grad_accum_steps=3, clip_grad=1.),
    dict(grad_checkpointing=True, channels_last=False, model_ema=False, class_weights=False),
    dict(no_aug=True, layer_decay=None, eval_metric='balanced_top1'),
    dict(torchcompile=True, model_kwargs=dict(growth_rate=4, block_config=(1, 1))),
    dict(model='resnet18', model_kwargs={}),
])
def test_options_train(data, tmp_path, options):
    result = train(TrainConfig(**{
        'data_dir': str(data), 'output': str(tmp_path), 'epochs': 1, **SMALL_MODEL, **options}))
    assert result['best_epoch'] == 0
    assert ('state_dict_ema' in load(tmp_path)) == options.get('model_ema', True)
    assert not any('_orig_mod' in key for key in load(tmp_path)['state_dict'])


def test_accumulation_gives_the_gradient_of_the_whole_batch(data, tmp_path):
    """On a net without batch norm, two half batches make the update of one batch."""
    states = []
    for batch_size, steps in ((12, 1), (6, 2)):
        output = tmp_path / str(steps)
        train(TrainConfig(
            data_dir=str(data), output=str(output), epochs=1, warmup_epochs=0, model='convnext_atto', img_size=32,
            workers=0, batch_size=batch_size, grad_accum_steps=steps, opt='sgd', lr=.01, model_ema=False,
            layer_decay=None))
        states.append(load(output)['state_dict'])
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_stops_early(data, tmp_path, capsys):
    result = train(TrainConfig(data_dir=str(data), output=str(tmp_path), epochs=9, lr=0., warmup_epochs=0,
                               warmup_lr=0., model_ema=False, eval_metric='top1', patience=2, **SMALL_MODEL))
    assert len(summary(tmp_path)) == result['best_epoch'] + 3 < 9
    assert 'No better top1 in 2 epochs' in capsys.readouterr().out


def test_infinite_loss_stops_and_keeps_the_last_checkpoint(data, tmp_path):
    train(TrainConfig(data_dir=str(data), output=str(tmp_path), epochs=1, **SMALL_MODEL))
    before = (tmp_path / 'last.pth.tar').read_bytes()
    poisoned = load(tmp_path)
    poisoned['state_dict']['features.conv0.weight'].fill_(float('inf'))
    torch.save(poisoned, tmp_path / 'poisoned.pth.tar')
    with pytest.raises(TrainingError, match=r'The loss is nan in batch 0 of epoch 1\. Lower --lr'):
        train(TrainConfig(data_dir=str(data), output=str(tmp_path), epochs=3, resume=str(tmp_path / 'poisoned.pth.tar'),
                          **SMALL_MODEL))
    assert (tmp_path / 'last.pth.tar').read_bytes() == before
    with pytest.raises(TrainingError, match='validation loss is nan after epoch 0'):
        train(TrainConfig(data_dir=str(data), output=str(tmp_path / 'jump'), epochs=1, lr=1e30, warmup_epochs=0,
                          batch_size=36, model_ema=False, **SMALL_MODEL))
    assert not (tmp_path / 'jump' / 'last.pth.tar').exists()


def test_refusals(data, tmp_path, capsys):
    def refuse(match, **options):
        with pytest.raises(TrainingError, match=match):
            train(TrainConfig(**{'data_dir': str(data), 'output': str(tmp_path / 'out'), 'epochs': 1,
                                 **SMALL_MODEL, **options}))
        assert not (tmp_path / 'out').exists()

    refuse('data split SRC', data_dir=str(tmp_path))
    refuse('--output', output='')
    refuse('one of loss, top1', eval_metric='f1')
    refuse('there is no such file', resume='nowhere.pth.tar')
    refuse('could not be loaded', pretrained_path='nowhere.pth')
    refuse('--pretrained-path FILE', initial_checkpoint='nowhere.pth')
    train(TrainConfig(data_dir=str(data), output=str(tmp_path / 'out'), epochs=1, **SMALL_MODEL))
    with pytest.raises(TrainingError, match='holds a training already'):
        train(TrainConfig(data_dir=str(data), output=str(tmp_path / 'out'), epochs=1, **SMALL_MODEL))
    (data.parent / 'other' / 'train' / 'spots').mkdir(parents=True)
    for source in (data / 'train' / 'spots').iterdir():
        (data.parent / 'other' / 'train' / 'spots' / source.name).write_bytes(source.read_bytes())
    (data.parent / 'other' / 'val').symlink_to(data / 'val')
    with pytest.raises(TrainingError, match=r"found \['spots'\] and \['spots', 'stripes'\]"):
        train(TrainConfig(data_dir=str(data.parent / 'other'), output=str(tmp_path / 'x'), **SMALL_MODEL))


def test_command_line_and_recipe(data, tmp_path, capsys, monkeypatch):
    got = []
    monkeypatch.setattr('timm_densese.training.train', got.append)
    recipe = str(ROOT / 'configs' / 'msld.yaml')
    assert main(['train', str(data), '-c', recipe, '--output', 'out', '--no-pretrained', '--lr', '2e-4',
                 '--model-kwargs', 'se_placement=stage', 'rd_channels=8']) == 0
    config = got[0]
    values = yaml.safe_load(Path(recipe).read_text())
    for key, value in values.items():
        if key not in ('lr', 'pretrained'):
            assert getattr(config, key) == value, key
    assert (config.lr, config.pretrained, config.data_dir) == (2e-4, False, str(data))
    assert config.model_kwargs == {'se_placement': 'stage', 'rd_channels': 8}

    (tmp_path / 'wrong.yaml').write_text('learning_rate: 1\n')
    assert main(['train', str(data), '-c', str(tmp_path / 'wrong.yaml')]) == 1
    assert 'has no option learning_rate' in capsys.readouterr().err
    assert main(['train', str(data), '-c', str(tmp_path / 'nowhere.yaml')]) == 1
    assert 'there is no such file' in capsys.readouterr().err
