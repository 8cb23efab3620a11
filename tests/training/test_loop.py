"""The embedded loop: what it learns, its options, its processes, and when it stops."""
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from conftest import SMALL_RUN, load_saved, read_summary, run_cli, run_training, same, two_processes

from timm_densese.publish import publish


@pytest.mark.slow
def test_learns_and_leaves_files_that_timm_reads(small_split, tmp_path, capsys):
    result = run_training(small_split, tmp_path, epochs=10, lr=1e-2)
    assert result['classes'] == ['spots', 'stripes']
    assert result['best']['loss'] < result['before']['loss'] - .02
    rows = read_summary(tmp_path)
    assert [row['epoch'] for row in rows] == list(range(10))
    assert min(row['eval_loss'] for row in rows) == result['best']['loss']
    assert {'train_loss', 'eval_top1', 'eval_balanced_top1', 'lr'} <= set(rows[0])
    assert (tmp_path / 'curves.png').stat().st_size > 5000
    args = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert args['class_names'] == ['spots', 'stripes']
    assert args['model'] == 'se_densenet121'
    assert args['input_size'] == [3, 32, 32]

    best = load_saved(tmp_path, 'model_best.pth.tar')
    assert best['epoch'] == result['best_epoch']
    model = timm.create_model('se_densenet121', num_classes=2, checkpoint_path=str(tmp_path / 'model_best.pth.tar'),
                              **SMALL_RUN['model_kwargs'])
    assert same(dict(model.state_dict()), dict(best['state_dict_ema']))  # timm takes the averaged weights
    publish(tmp_path / 'model_best.pth.tar', 'owner/name', output=tmp_path / 'published')
    published = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True)
    assert same(dict(published.state_dict()), dict(best['state_dict_ema']))
    assert published.pretrained_cfg['label_names'] == ['spots', 'stripes']
    pytest.importorskip('tensorboard', reason='tensorboard is missing: pip install .[test]')
    assert list(tmp_path.glob('events.out.tfevents.*'))
    progress = capsys.readouterr().err
    assert 'loss=' in progress
    assert 'lr=' in progress


def torchrun(*args):
    result = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone',
                             '-m', 'timm_densese', *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(('start', 'model'), [
    (two_processes, ('--model-kwargs', 'growth_rate=4', 'block_config=(2,2,2)')),
    (two_processes, ('--model', 'resnet10t')),  # plain nn.BatchNorm2d
    (torchrun, ('--model', 'resnet10t')),
])
def test_two_processes_give_one_processes_metrics(small_split, tmp_path, start, model):
    args = ('train', small_split, '--epochs', 2, '--workers', 0, '--opt', 'sgd', '--lr', .005, '--img-size', 32, *model)
    assert run_cli(*args, '--output', tmp_path / 'one', '-b', 8).returncode == 0
    start(*args, '--output', tmp_path / 'two', '-b', 4)
    for one, two in zip(read_summary(tmp_path / 'one'), read_summary(tmp_path / 'two'), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    one, two = load_saved(tmp_path / 'one')['state_dict'], load_saved(tmp_path / 'two')['state_dict']
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize('options', [
    dict(amp=True, grad_accum_steps=3, clip_grad=1.),
    dict(grad_checkpointing=True, channels_last=False, model_ema=False, class_weights=False),
    dict(no_aug=True, layer_decay=None, eval_metric='balanced_top1'),
    pytest.param(dict(torchcompile=True, model_kwargs=dict(growth_rate=4, block_config=(1,))), marks=pytest.mark.slow),
    pytest.param(dict(model='resnet18', model_kwargs={}), marks=pytest.mark.slow),
])
def test_options_train(small_split, tmp_path, options):
    result = run_training(small_split, tmp_path, **options)
    assert result['best_epoch'] == 0
    assert ('state_dict_ema' in load_saved(tmp_path)) == options.get('model_ema', True)
    assert not any('_orig_mod' in key for key in load_saved(tmp_path)['state_dict'])


@pytest.mark.slow
def test_accumulation_gives_the_gradient_of_the_whole_batch(small_split, tmp_path):
    """On a net without batch norm, two half batches make the update of one batch."""
    states = []
    half = len(list((small_split / 'train').glob('*/*'))) // 2
    for batch_size, steps in ((2 * half, 1), (half, 2)):
        output = tmp_path / str(steps)
        run_training(small_split, output, warmup_epochs=0, model='convnext_atto', model_kwargs={},
                     batch_size=batch_size, grad_accum_steps=steps, opt='sgd', lr=.01, model_ema=False,
                     layer_decay=None)
        states.append(load_saved(output)['state_dict'])
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_stops_early(small_split, tmp_path, capsys):
    result = run_training(small_split, tmp_path, epochs=9, lr=0., warmup_epochs=0, warmup_lr=0., model_ema=False,
                          eval_metric='top1', patience=2)
    assert len(read_summary(tmp_path)) == result['best_epoch'] + 3 < 9
    assert 'No better top1 in 2 epochs' in capsys.readouterr().out
